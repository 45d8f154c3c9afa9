"""Readers of corpora: documents in their own order, or in a seeded one, without ever holding all texts.

Local files are read by an index: byte offsets of lines or pieces (8 bytes per document), or parquet row groups, which are shuffled first and their
documents then within a pool. A hub data set is streamed through a seeded buffer. Only built-in corpora, whose size is fixed, are in memory.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stagediff.errors import UserError
from stagediff.lm.documents import Document, prompt_of
from stagediff.lm.spec import CorpusSource

__all__ = ["Corpus", "Hub", "Indexed", "Listed", "Parquet", "jsonl", "plain"]

PIECE_BYTES, LONGEST_PIECE_BYTES = 2_000, 20_000
"""A text file is cut at the first blank line after the one, and at the latest at the first line's end after the other."""

POOL_DOCUMENTS = 100_000
"""Parquet: row groups are shuffled, then documents within a pool of row groups of at least so many (or one group)."""

HUB_BUFFER = 10_000
"""Hub streams: documents held for shuffling."""


class Corpus(Protocol):
    """Documents in their own order or in a seeded one."""

    def documents(self) -> Iterator[Document]:
        """Every document once, in the corpus' own order."""

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Document]:
        """Every document once, in an order that depends on the seed alone, from its `start`-th on.

        A place without a text (a blank line, a null) counts for `start`: it comes as a document with an empty text, to be passed over.
        """


class Listed:
    """A built-in corpus: its documents are in memory."""

    def __init__(self, documents: tuple[Document, ...]):
        self._documents = documents

    def documents(self) -> Iterator[Document]:
        return iter(self._documents)

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Document]:
        for i in np.random.default_rng(seed).permutation(len(self._documents))[start:]:
            yield self._documents[i]


Index = Callable[[Path], np.ndarray]
Reader = Callable[[bytes, Path, int], str | None]


class Indexed:
    """Files whose documents are byte ranges.

    `index(path)` gives where each begins, and the file's end: int64 [n + 1]. `read(bytes, path, number)` gives a range's text, or None where it
    holds none (a blank line).
    """

    def __init__(self, files: list[Path], root: Path, index: Index, read: Reader):
        self._files, self._root, self._index, self._read = files, root, index, read

    def documents(self) -> Iterator[Document]:
        first = 0
        for path in self._files:
            offsets = self._index(path)
            with path.open("rb") as file:
                for i in range(len(offsets) - 1):
                    text = self._read(file.read(offsets[i + 1] - offsets[i]), path, i)
                    if text is not None:
                        yield self._document(first + i, text, path)
            first += len(offsets) - 1

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Document]:
        offsets = [self._index(path) for path in self._files]
        ends = np.cumsum([len(o) - 1 for o in offsets])
        handles: dict[int, Any] = {}
        try:
            for number in np.random.default_rng(seed).permutation(int(ends[-1]))[start:]:
                f = int(np.searchsorted(ends, number, side="right"))
                i = int(number - (ends[f - 1] if f else 0))
                if f not in handles:
                    if len(handles) > 100:
                        handles.pop(next(iter(handles))).close()
                    handles[f] = self._files[f].open("rb")
                handles[f].seek(offsets[f][i])
                text = self._read(handles[f].read(offsets[f][i + 1] - offsets[f][i]), self._files[f], i)
                yield self._document(int(number), text or "", self._files[f])
        finally:
            for handle in handles.values():
                handle.close()

    def _document(self, number: int, text: str, path: Path) -> Document:
        return Document(number, text, path.relative_to(self._root).as_posix(), text, prompt_of(text))


def _line_index(path: Path) -> np.ndarray:
    """Where each line begins, and the file's end; 1 MiB is read at a time."""
    starts, at = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == at else np.append(offsets, at)


def _piece_index(path: Path) -> np.ndarray:
    """Cuts a text file at blank lines into pieces of some thousand bytes."""
    starts, at, size = [0], 0, 0
    with path.open("rb") as file:
        for line in file:
            at += len(line)
            size += len(line)
            if (not line.strip() and size >= PIECE_BYTES) or size >= LONGEST_PIECE_BYTES:
                starts.append(at)
                size = 0
    if starts[-1] != at:
        starts.append(at)
    return np.array(starts, np.int64)


def _jsonl_text(raw: bytes, path: Path, line: int, column: str) -> str | None:
    if not raw.strip():
        return None
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise UserError(
            f"Line {line + 1} of {path} cannot be read as JSON ({error}). Every line must hold one JSON object with the text under "
            f"{column!r}; mend or remove that line."
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"Line {line + 1} of {path} holds a JSON {type(record).__name__}; expected one object per line (JSON lines) with the text under {column!r}."
        )
    if column not in record:
        raise UserError(
            f"Line {line + 1} of {path} has no column {column!r}; its columns are: {', '.join(record) or 'none'}. Name the one that "
            "holds the text with `text:`."
        )
    return _string(record[column], column, f"line {line + 1} of {path}")


def _plain_text(raw: bytes, path: Path, piece: int) -> str | None:
    try:
        return raw.decode("utf-8").strip() or None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text file {path} is not UTF-8 ({error.reason} in its piece {piece + 1}). Convert it to UTF-8 first."
        ) from None


def _string(value: Any, column: str, place: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"Column {column!r} at {place} holds {type(value).__name__}, not text. Name a text column with `text:`.")
    return value or None


class Parquet:
    """Parquet files; one column of one row group (shuffled: one pool of row groups) is in memory."""

    def __init__(self, files: list[Path], root: Path, column: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._files, self._root, self._column = files, root, column
        self._groups: list[tuple[int, int, int, int]] = []  # file, group, its documents, number of the first
        count = 0
        for f, path in enumerate(files):
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(
                    f"{path} cannot be read as parquet ({error}). Expected a parquet file with a text column {column!r}."
                ) from None
            with file:
                schema = file.schema_arrow
                if column not in schema.names:
                    raise UserError(
                        f"{path} has no column {column!r}; its columns are: {', '.join(schema.names)}. Name the one that holds the "
                        "text with `text:`."
                    )
                kind = schema.field(column).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
                    raise UserError(
                        f"Column {column!r} of {path} holds {kind}, not text; the columns are: "
                        f"{', '.join(f'{n} ({schema.field(n).type})' for n in schema.names)}. Name a text column with `text:`."
                    )
                for g in range(file.num_row_groups):
                    n = file.metadata.row_group(g).num_rows
                    self._groups.append((f, g, n, count))
                    count += n

    def documents(self) -> Iterator[Document]:
        for group in self._groups:
            yield from (d for d in self._read(group) if d.text)

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Document]:
        rng = np.random.default_rng(seed)
        skip = start
        for pool in self._pools(rng):
            size = sum(group[2] for group in pool)
            order = rng.permutation(size)
            if skip >= size:
                skip -= size
                continue
            documents = list(itertools.chain.from_iterable(map(self._read, pool)))
            yield from (documents[i] for i in order[skip:])
            skip = 0

    def _pools(self, rng: np.random.Generator) -> list[list[tuple[int, int, int, int]]]:
        pools: list[list[tuple[int, int, int, int]]] = []
        for i in rng.permutation(len(self._groups)):
            group = self._groups[i]
            if not pools or sum(g[2] for g in pools[-1]) + group[2] > POOL_DOCUMENTS:
                pools.append([])
            pools[-1].append(group)
        return pools

    def _read(self, group: tuple[int, int, int, int]) -> Iterator[Document]:
        """The documents of a row group; a missing text comes as an empty one."""
        import pyarrow.parquet as pq

        f, g, _, first = group
        source = self._files[f].relative_to(self._root).as_posix()
        with pq.ParquetFile(self._files[f]) as file:
            texts = file.read_row_group(g, columns=[self._column]).column(0)
        for i, value in enumerate(texts):
            text = value.as_py() or ""
            yield Document(first + i, text, source, text, prompt_of(text))


class Hub:
    """A hub data set (or a folder in its layout), streamed at the digest's commit."""

    def __init__(self, source: CorpusSource):
        self._source = source

    def documents(self) -> Iterator[Document]:
        yield from (d for d in self._stream(None, 0) if d.text)

    def shuffled(self, seed: int, start: int = 0) -> Iterator[Document]:
        yield from self._stream(seed, start)

    def _stream(self, seed: int | None, start: int) -> Iterator[Document]:
        # A shuffled stream mixes its files too, so a document's number is its place in the order it is read in.
        for number, record in enumerate(itertools.islice(self._records(seed), start, None), start):
            yield self._document(number, record)

    def _records(self, seed: int | None) -> Iterator[dict[str, Any]]:
        import datasets

        name = self._source.path or ""
        revision = None if Path(name).is_dir() else self._source.digest
        try:
            stream = datasets.load_dataset(name, self._source.subset, split=self._source.hub_split, streaming=True, revision=revision)
            first = next(iter(stream), None)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"The data set {name!r} (subset {self._source.subset!r}, split {self._source.hub_split!r}) cannot be opened: "
                f"{reason}. Check its name, subset and split, and the network."
            ) from None
        if first is not None and self._source.text not in first:
            raise UserError(
                f"The data set {name!r} has no column {self._source.text!r}; its columns are: {', '.join(first)}. Name the one that "
                "holds the text with `text:`."
            )
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=HUB_BUFFER)
        yield from stream

    def _document(self, number: int, record: dict[str, Any]) -> Document:
        text = _string(record.get(self._source.text), self._source.text, f"record {number} of {self._source.path}") or ""
        return Document(number, text, self._source.path or "hub", text, prompt_of(text))


def jsonl(files: list[Path], root: Path, column: str) -> Indexed:
    """One JSON object per line with the text under `column`."""
    return Indexed(files, root, _line_index, lambda raw, path, line: _jsonl_text(raw, path, line, column))


def plain(files: list[Path], root: Path) -> Indexed:
    """Plain text, in pieces of whole paragraphs."""
    return Indexed(files, root, _piece_index, _plain_text)
