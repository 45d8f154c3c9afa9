"""The top examples of chosen features as text: the tokens around each maximum, and the feature's activation on each of them.

Statistics keep only where a feature's strongest tokens are; what stands there is read again, for the few features that somebody looks at.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stagediff.errors import UserError
from stagediff.lm.spec import HarvestSpec, TokensSpec
from stagediff.sae.spec import StatisticsSpec
from stagediff.spec import Ref

if TYPE_CHECKING:
    from stagediff.lm.activations import ActivationReader
    from stagediff.sae.dictionary import SAE
    from stagediff.store import Artifact, Store

__all__ = ["feature_examples"]

COLUMNS = ["feature", "rank", "activation", "row", "position", "is_new", "start", "tokens", "activations", "text"]
ENCODE_ELEMENTS = 1 << 25


def feature_examples(store: "Store", statistics: Ref, features: Iterable[int], window: int = 40, ranks: int | None = None) -> pd.DataFrame:
    """The top examples of `features`, at most `ranks` of each (None: all that were kept), as one row per example.

    Columns: feature, rank, activation, row, position, is_new, start (position of the window's first token), tokens (list of the window's
    decoded tokens), activations (list, one per token; 0 where the harvest skipped the position), text (the window decoded as a whole).
    The window has `window` tokens (fewer only where the row is shorter) with the maximum in its middle, or nearer to the row's end.

    Raises UserError for a feature that the dictionary does not have, and the store's error where the activations were evicted.
    """
    from stagediff.lm.activations import ActivationReader
    from stagediff.sae.dictionary import SAE

    artifact = store.artifact(statistics).require()
    spec = artifact.spec()
    if not isinstance(spec, StatisticsSpec):
        raise UserError(f"{statistics} was made by step {spec.step!r}; the examples of features come from a statistics artifact.")
    wanted = np.unique(np.fromiter(features, np.int64))
    sae = SAE.load(store.artifact(spec.dictionary).require())
    if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < sae.features:
        raise UserError(
            f"Features {wanted[0]} to {wanted[-1]} were asked for, but the dictionary {spec.dictionary} has features 0 to {sae.features - 1}."
        )
    table = _kept(artifact, wanted, ranks)
    reader = ActivationReader(store, spec.data)
    return _with_windows(table, reader, _narrowed(sae, wanted), wanted, _pieces(store, spec.data.base), window)


def _kept(artifact: "Artifact", wanted: np.ndarray, ranks: int | None) -> pd.DataFrame:
    """The rows of examples.parquet for these features; read batch by batch, since the table has F x top rows."""
    parts = []
    with pq.ParquetFile(artifact.local("examples.parquet"), page_checksum_verification=True) as file:
        names = [f.name for f in file.schema_arrow]
        for batch in file.iter_batches(batch_size=1 << 18):
            feature, rank = batch["feature"].to_numpy(), batch["rank"].to_numpy()
            here = np.isin(feature, wanted) & (rank < (np.inf if ranks is None else ranks))
            parts.append(batch.filter(pa.array(here)))
        table = pa.Table.from_batches(parts, schema=file.schema_arrow) if parts else file.read()
    return table.select(names).to_pandas().sort_values(["feature", "rank"]).reset_index(drop=True)


def _narrowed(sae: "SAE", wanted: np.ndarray) -> "SAE":
    """The dictionary cut down to these features, where they can be computed without the others (not topk: which k fire depends on all)."""
    if sae.architecture == "topk":
        return sae
    at = torch.from_numpy(wanted)
    threshold = None if sae.threshold is None else sae.threshold[at]
    return replace(sae, W_enc=sae.W_enc[:, at].contiguous(), b_enc=sae.b_enc[at], W_dec=sae.W_dec[at], threshold=threshold)


def _with_windows(
    table: pd.DataFrame, reader: "ActivationReader", sae: "SAE", wanted: np.ndarray, pieces: "Pieces", window: int
) -> pd.DataFrame:
    window = min(window, reader.context)
    start = np.clip(table.position.to_numpy() - window // 2, 0, reader.context - window)
    feature = table.feature.to_numpy(np.int64)
    column = feature if sae.architecture == "topk" else np.searchsorted(wanted, feature)
    activations = _window_activations(table.row.to_numpy(), column, start, window, reader, sae)
    rows, where = np.unique(table.row.to_numpy(), return_inverse=True)
    ids = reader.token_ids(rows)[where] if len(rows) else np.empty((0, reader.context), np.int32)
    ids = np.stack([line[s : s + window] for line, s in zip(ids, start, strict=True)]) if len(table) else ids
    table = table.assign(start=start)
    table["tokens"] = [pieces.each(line) for line in ids]
    table["activations"] = [line.tolist() for line in activations]
    table["text"] = [pieces.whole(line) for line in ids]
    return table[COLUMNS]


def _window_activations(
    row_of: np.ndarray, column_of: np.ndarray, start: np.ndarray, window: int, reader: "ActivationReader", sae: "SAE"
) -> np.ndarray:
    """[examples, window] activations of each example's own feature (`column_of` the dictionary) over its window; shard by shard."""
    found = np.zeros((len(row_of), window), np.float32)
    width = reader.tokens_per_row
    at_once = max(1, ENCODE_ELEMENTS // max(1, sae.features))
    for i in range(reader.n_shards):
        row, position, _ = (np.asarray(a) for a in reader.locate(i))
        line_of = {int(r): line for line, r in enumerate(row[::width])}
        here = np.array([e for e, r in enumerate(row_of) if int(r) in line_of], np.int64)
        if not len(here):
            continue
        line = np.array([line_of[int(r)] for r in row_of[here]])
        offset = position.reshape(-1, width)[line] - start[here, None]  # [here, width] place of the row's tokens in the window
        example, place = np.nonzero((offset >= 0) & (offset < window))
        token, needed = line[example] * width + place, offset[example, place]
        tokens, back = np.unique(token, return_inverse=True)
        x = reader.read_shard(i)
        for begin in range(0, len(tokens), at_once):
            f = sae.encode(x[torch.from_numpy(tokens[begin : begin + at_once])].float()).float().cpu().numpy()
            uses = np.flatnonzero((back >= begin) & (back < begin + at_once))
            found[here[example[uses]], needed[uses]] = f[back[uses] - begin, column_of[here[example[uses]]]]
    return found


class Pieces:
    """Token ids as readable text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def each(self, ids: np.ndarray) -> list[str]:
        """Every token decoded by itself (a part of a character shows as U+FFFD)."""
        return [self._one(int(i)) for i in ids]

    def whole(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode([int(i) for i in ids]))

    def _one(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self.tokenizer.decode([token])
        return self._known[token]


def _pieces(store: "Store", activations: Ref) -> Pieces:
    """The tokenizer of the token rows that the activations were harvested from."""
    from stagediff.lm.models import load_tokenizer

    harvest = store.artifact(activations).require().spec()
    assert isinstance(harvest, HarvestSpec)
    tokens = store.artifact(harvest.tokens).require().spec()
    assert isinstance(tokens, TokensSpec)
    return Pieces(load_tokenizer(tokens.tokenizer, store))
