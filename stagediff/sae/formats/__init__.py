"""Dictionaries of other libraries: in as an artifact, which may be S; any dictionary out for them. One file per library.

Only files are read and written; none of the packages is needed. `exchange` is what the steps and the command call; what each library's
files mean stands in `saelens`, `dictionary_learning` and `sparsify`, and in docs/formats.md.
"""

from stagediff.sae.formats.exchange import FORMATS, compute, export, resolve_import

__all__ = ["FORMATS", "compute", "export", "resolve_import"]
