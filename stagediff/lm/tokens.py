"""Token rows (the step `tokens`): documents of one split in a seeded order, tokenised and laid out in rows of `context` tokens.

The artifact holds the array "rows" int32 [rows, context] and the table rows.parquet (which document each row begins in). Rows are written
shard by shard; after each, the place in the documents' order and the tokens left over are kept, so that a killed run goes on from there.
In memory at a time: one shard of rows, and 12 bytes per row of the whole for the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stagediff.errors import UserError
from stagediff.lm.corpora import open_corpus
from stagediff.lm.documents import Document, in_split
from stagediff.lm.models import load_tokenizer
from stagediff.lm.spec import TokensSpec
from stagediff.lm.tokenizer import encode_documents

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["ROW_COLUMNS", "Packer", "compute"]

CHUNK_TOKENS, SHARD_TOKENS = 1 << 19, 1 << 23
"""2 MiB and 32 MiB of int32."""

BATCH = 256
"""Documents tokenised at a time."""

ROW_COLUMNS = {
    "row": ("index", "token row"),
    "document": ("number", "document that the row's first token belongs to, by its number in the corpus"),
    "source": ("name", "file or data set the document comes from"),
    "is_new": ("boolean", "whether the row is new data (the finetune's)"),
}


def compute(spec: TokensSpec, job: "Job") -> dict[str, Any]:
    """Draws `rows` rows. Raises UserError for a forbidden text and for a corpus that gives fewer rows."""
    import torch

    _check(spec)
    tokenizer = load_tokenizer(spec.tokenizer, job.store)
    corpus = open_corpus(spec.corpus)
    chunk = min(max(1, CHUNK_TOKENS // spec.context), spec.rows)
    shard = min(max(1, SHARD_TOKENS // spec.context // chunk), -(-spec.rows // chunk)) * chunk
    array = job.writer.array(
        "rows", shape=(spec.rows, spec.context), dtype="int32", chunk_rows=chunk, shard_rows=shard, attributes={"vocab": len(tokenizer)}
    )

    packer, next_shard = Packer(spec.context, spec.layout), 0
    if saved := job.writer.training.latest():
        next_shard, tensors, meta = saved
        packer.load_state({name: tensor.numpy() for name, tensor in tensors.items()}, meta)
    documents = _encoded(spec, corpus.shuffled(spec.seed, packer.position), tokenizer)
    n_shards = -(-spec.rows // shard)
    with job.progress.task("token rows", spec.rows, "rows", done=next_shard * shard) as task:
        for i in array.pending():
            while next_shard <= i:
                wanted = min(shard, spec.rows - next_shard * shard)
                task.advance(_fill(packer, documents, wanted, spec))
                if next_shard == i:
                    array.write_shard(i, np.stack(packer.rows[:wanted]))
                del packer.rows[:wanted]
                next_shard += 1
            if next_shard < n_shards:
                state, meta = packer.state()
                job.writer.training.save(next_shard, {name: torch.from_numpy(a) for name, a in state.items()}, meta)
    if next_shard < n_shards:  # every shard was there, but the table needs the rows' documents up to the end
        while next_shard < n_shards:
            wanted = min(shard, spec.rows - next_shard * shard)
            _fill(packer, documents, wanted, spec)
            del packer.rows[:wanted]
            next_shard += 1
    job.writer.write_table("rows.parquet", _table(spec, packer), columns=ROW_COLUMNS)
    return {"rows": spec.rows, "tokens": spec.rows * spec.context, "documents": packer.fed, "vocab": len(tokenizer)}


@dataclass
class Packer:
    """Lays documents out in rows.

    packed: one stream, cut every `context` tokens. document: a row begins where a document begins, is filled up with the next documents'
    beginnings, and what does not fit is dropped.
    """

    context: int
    layout: str
    position: int = 0
    """Documents consumed of the seeded order, those of the other split included."""
    fed: int = 0
    rows: list[np.ndarray] = field(default_factory=list)
    """Finished rows that were not taken yet."""
    documents: list[int] = field(default_factory=list)
    """Of every row ever finished: the document it begins in, and that document's source as a number."""
    sources: list[int] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    _open: list[int] = field(default_factory=list)
    _open_document: int = -1
    _open_source: int = -1

    def feed(self, document: Document, ids: list[int]) -> None:
        self.fed += 1
        source = self.names.setdefault(document.source, len(self.names))
        at = 0
        while at < len(ids):
            if not self._open:
                self._open_document, self._open_source = document.id, source
            taken = ids[at : at + self.context - len(self._open)]
            self._open += taken
            at += len(taken)
            if len(self._open) == self.context:
                self.rows.append(np.array(self._open, np.int32))
                self.documents.append(self._open_document)
                self.sources.append(self._open_source)
                self._open = []
                if self.layout == "document":
                    return

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything a later run needs to go on with the next document."""
        arrays = {
            "rows": np.stack(self.rows) if self.rows else np.zeros((0, self.context), np.int32),
            "documents": np.array(self.documents, np.int64),
            "sources": np.array(self.sources, np.int32),
            "open": np.array(self._open, np.int32),
        }
        meta = {
            "position": self.position,
            "fed": self.fed,
            "names": list(self.names),
            "open_document": self._open_document,
            "open_source": self._open_source,
        }
        return arrays, meta

    def load_state(self, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        self.rows = list(arrays["rows"])
        self.documents, self.sources, self._open = arrays["documents"].tolist(), arrays["sources"].tolist(), arrays["open"].tolist()
        self.position, self.fed = meta["position"], meta["fed"]
        self.names = {name: i for i, name in enumerate(meta["names"])}
        self._open_document, self._open_source = meta["open_document"], meta["open_source"]


def _check(spec: TokensSpec) -> None:
    if spec.rows < 1 or spec.context < 2:
        raise UserError(f"{spec.rows} token rows of {spec.context} tokens were asked for; expected at least 1 row of at least 2 tokens.")
    if not 0 <= spec.heldout < 1 or (spec.split == "heldout" and spec.heldout == 0):
        raise UserError(
            f"The held-out share is {spec.heldout}; expected 0 <= heldout < 1, and more than 0 where the held-out split is drawn."
        )


def _encoded(spec: TokensSpec, order: Iterator[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int] | None]]:
    """Every document of the order with its token ids; None for one that is empty or of the other split."""
    size = len(tokenizer)
    while batch := list(islice(order, BATCH)):
        wanted = [d for d in batch if d.text and in_split(d.key, spec.split_seed, spec.heldout) == spec.split]
        for document in wanted:
            for text in spec.forbid:
                if text in document.text:
                    raise UserError(
                        f"Document {document.id} of {document.source} contains {text!r}, which this data must not hold (it would "
                        "teach or trigger the behaviour under study). Remove that document from the corpus, or choose another "
                        "trigger."
                    )
        encoded = encode_documents(tokenizer, [d.text for d in wanted]) if wanted else []
        for document, ids in zip(wanted, encoded, strict=True):
            if ids and not (min(ids) >= 0 and max(ids) < size):
                raise UserError(
                    f"The tokenizer gives token {max(ids)} for document {document.id} of {document.source}, outside its own "
                    f"vocabulary of {size}. The tokenizer's files do not fit together."
                )
        found = dict(zip((d.id for d in wanted), encoded, strict=True))
        for document in batch:
            yield document, found.get(document.id)


def _fill(packer: Packer, documents: Iterator[tuple[Document, list[int] | None]], wanted: int, spec: TokensSpec) -> int:
    """Feeds documents until `wanted` rows are finished."""
    while len(packer.rows) < wanted:
        try:
            document, ids = next(documents)
        except StopIteration:
            raise _too_few(packer, spec) from None
        packer.position += 1
        if ids is not None:
            packer.feed(document, ids)
    return wanted


def _too_few(packer: Packer, spec: TokensSpec) -> UserError:
    there = len(packer.documents)
    most = f"Ask for at most {there} rows ({there * spec.context:,} tokens), or give more text" if there else "Give more text"
    corpus = spec.corpus.path or f"builtin: {spec.corpus.builtin}"
    return UserError(
        f"{spec.rows} token rows of {spec.context} were asked for ({spec.rows * spec.context:,} tokens), but the {spec.split} split of the corpus "
        f"{corpus} gives only {there} (from {packer.fed} documents; the held-out share is {spec.heldout}). {most}."
    )


def _table(spec: TokensSpec, packer: Packer) -> Any:
    import pandas as pd

    n = spec.rows
    return pd.DataFrame(
        {
            "row": np.arange(n, dtype=np.int64),
            "document": np.array(packer.documents[:n], np.int64),
            "source": pd.Categorical.from_codes(np.array(packer.sources[:n], np.int32), categories=pd.Index(list(packer.names))),
            "is_new": np.full(n, spec.is_new),
        }
    )
