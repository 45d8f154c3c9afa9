"""Texts for the page: top examples, datapoints by activation level, and what stands at the UMAP's points.

Where a run's probe rows cannot be read as text (evicted, no tokenizer), places and activations are shown without it.
"""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData, HarvestSpec, TokensSpec
from stagediff.packing import pack, pack_linear
from stagediff.track.section.run import BATCH, TrackRun, Words

__all__ = ["RANKS", "Windows", "datapoints", "open_windows", "pack_examples", "pack_levels", "pack_umap"]

WINDOW = 32
RANKS = 10
"""Examples of a feature, and tokens of each."""
AROUND = 6
"""Tokens on either side of a datapoint."""


class Windows:
    """Tokens around positions of the probe rows, as places in the page's words."""

    def __init__(self, ids: Any, decode: Any, context: int, words: Words):
        """`ids`: rows -> token ids [rows, context]; `decode`: one id -> its text."""
        self._ids, self._decode, self.context, self.words = ids, decode, context, words
        self._known: dict[int, int] = {}

    def around(self, row: np.ndarray, position: np.ndarray, around: int = AROUND) -> np.ndarray:
        """int32 [n, 2 * around + 1] places in the words; -1 before the row's beginning and after its end."""
        rows, back = np.unique(row, return_inverse=True)
        if not len(rows):
            return np.zeros((0, 2 * around + 1), np.int32)
        at = position[:, None] + np.arange(-around, around + 1)
        inside = (at >= 0) & (at < self.context)
        ids = self._ids(rows)[back[:, None], np.clip(at, 0, self.context - 1)]
        distinct, which = np.unique(ids, return_inverse=True)
        places = np.array([self._place(int(i)) for i in distinct], np.int32)[which].reshape(ids.shape)
        return np.where(inside, places, -1)

    def _place(self, token: int) -> int:
        if token not in self._known:
            self._known[token] = self.words(self._decode(token))
        return self._known[token]


def open_windows(run: TrackRun) -> Windows | None:
    """None where the final checkpoint's probe rows are no text that can be read."""
    if not run.points:
        return None
    store = run.context.store
    harvest = store.artifact(run.points[-1].probe).require().spec()
    tokens = store.artifact(harvest.tokens).require().spec() if isinstance(harvest, HarvestSpec) else None
    if not isinstance(harvest, HarvestSpec) or not isinstance(tokens, TokensSpec):
        return None
    if tokens.tokenizer.artifact is None and tokens.tokenizer.name is None:
        return None
    from stagediff.lm.activations import ActivationReader
    from stagediff.lm.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(tokens.tokenizer, store)
        reader = ActivationReader(store, ActivationData(base=run.points[-1].probe, rows=harvest.rows))
    except UserError:
        return None
    return Windows(reader.token_ids, lambda token: tokenizer.decode([token]), tokens.context, run.words)


def pack_examples(run: TrackRun, features: np.ndarray, windows: Windows | None) -> dict[str, Any]:
    """Top examples at the final checkpoint of `features` (ascending): per feature their number; per example row, position, activation, window length,
    place of the strongest token; per token its text's place and its shade (one byte, of the feature's strongest activation, rounded up).
    """
    frame = _examples(run, features, windows is not None)
    place = np.searchsorted(features, frame["feature"].to_numpy())
    length = frame["tokens"].map(len).to_numpy(np.int64)
    tokens = np.fromiter((run.words(t) for line in frame["tokens"] for t in line), np.uint32, count=int(length.sum()))
    strongest = np.zeros(len(features))
    np.maximum.at(strongest, place, frame["activation"].to_numpy(float))
    activations = np.concatenate([np.asarray(a, float) for a in frame["activations"]]) if len(frame) else np.zeros(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(np.repeat(strongest[place], length) > 0, activations / np.repeat(strongest[place], length), 0.0)
    peak = (frame["position"] - frame["start"]).to_numpy(np.uint16)
    return {
        "feature": pack(features.astype(np.uint32)),
        "count": pack(np.bincount(place, minlength=len(features)).astype(np.uint8)),
        "row": pack(frame["row"].to_numpy(np.uint32)),
        "position": pack(frame["position"].to_numpy(np.uint16)),
        "activation": pack(frame["activation"].to_numpy(np.float32)),
        "length": pack(length.astype(np.uint16)),
        "peak": pack(peak),
        "tokens": pack(tokens),
        "shades": pack(np.ceil(np.clip(share, 0, 1) * 255).astype(np.uint8)),
    }


def pack_levels(run: TrackRun, features: np.ndarray, windows: Windows | None) -> dict[str, Any] | None:
    """Datapoints of `features` (ascending) across the activation levels of their regions: per feature their number; per datapoint level, row, position,
    activation, and the tokens around it. None where the run has no formation step.
    """
    if "formation" not in run.artifacts:
        return None
    frame = datapoints(run, features)
    count = np.bincount(np.searchsorted(features, frame["feature"].to_numpy()), minlength=len(features))
    data: dict[str, Any] = {
        "feature": pack(features.astype(np.uint32)),
        "count": pack(count.astype(np.uint8)),
        "level": pack(frame["level"].to_numpy(np.uint8)),
        "row": pack(frame["row"].to_numpy(np.uint32)),
        "position": pack(frame["position"].to_numpy(np.uint16)),
        "activation": pack(frame["activation"].to_numpy(np.float32)),
        "around": AROUND,
    }
    if windows is not None:
        texts = windows.around(frame["row"].to_numpy(), frame["position"].to_numpy())
        data["tokens"] = pack((texts + 1).ravel().astype(np.uint32))
    return data


def pack_umap(run: TrackRun, windows: Windows | None) -> dict[str, Any] | None:
    """The points of both fits with the tokens around them; None where the run has no UMAP."""
    table, chosen = run.table("umap", "umap"), run.table("umap", "features")
    if table is None or chosen is None or table.empty:
        return None
    fits = list(dict.fromkeys(table["fit"]))
    data: dict[str, Any] = {
        "fits": fits,
        "features": [[int(r.feature), None if pd.isna(r.kind) else str(r.kind), str(r.why)] for r in chosen.itertuples()],
        "fit": pack(np.array([fits.index(f) for f in table["fit"]], np.uint8)),
        "at": pack(np.searchsorted(run.steps, table["step"].to_numpy()).astype(np.uint16)),
        "feature": pack(table["feature"].to_numpy(np.int32)),
        "row": pack(table["row"].to_numpy(np.uint32)),
        "position": pack(table["position"].to_numpy(np.uint16)),
        "u": pack_linear(table["u"].to_numpy()),
        "v": pack_linear(table["v"].to_numpy()),
        "around": AROUND,
    }
    if windows is not None:
        texts = windows.around(table["row"].to_numpy(), table["position"].to_numpy())
        data["tokens"] = pack((texts + 1).ravel().astype(np.uint32))
    return data


def _examples(run: TrackRun, features: np.ndarray, readable: bool) -> pd.DataFrame:
    """Columns feature, rank, activation, row, position, start, tokens, activations; the last two empty where there is no text."""
    if not run.points or not len(features):
        empty = {n: pd.Series(dtype="float64") for n in ("feature", "rank", "activation", "row", "position", "start")}
        return pd.DataFrame({**empty, "tokens": pd.Series(dtype=object), "activations": pd.Series(dtype=object)})
    statistics = run.points[-1].statistics
    if readable:
        from stagediff.sae.examples import feature_examples

        try:
            found = feature_examples(run.context.store, statistics, [int(f) for f in features], window=WINDOW, ranks=RANKS)
            return found.sort_values(["feature", "rank"]).reset_index(drop=True)
        except UserError:  # activations were evicted
            pass
    path = run.context.store.artifact(statistics).require().local("examples.parquet")
    names = ["feature", "rank", "activation", "row", "position"]
    found = _filtered(path, names, features, lambda batch: pc.less(batch["rank"], RANKS))
    found = found.sort_values(["feature", "rank"]).reset_index(drop=True).assign(start=lambda f: f["position"])
    return found.assign(tokens=[[]] * len(found), activations=[[]] * len(found))


def datapoints(run: TrackRun, features: np.ndarray) -> pd.DataFrame:
    """Columns feature, set, rank, level, row, position, activation of these features' datapoints across the levels of their regions, strongest first;
    the strongest positions where the run sampled no levels.
    """
    path = run.artifacts["formation"].local("regions.parquet")
    names = ["feature", "set", "rank", "level", "row", "position", "activation"]
    found = _filtered(path, names, features, lambda batch: pc.equal(batch["set"].cast(pa.string()), "levels"))
    if found.empty:
        found = _filtered(path, names, features, lambda batch: pc.equal(batch["set"].cast(pa.string()), "top"))
    order = ["feature", "level", "activation", "rank"]
    return found.sort_values(order, ascending=[True, False, False, True]).reset_index(drop=True)


def _filtered(path: Any, columns: list[str], features: np.ndarray, condition: Any) -> pd.DataFrame:
    """The rows of a table of millions that belong to these features, read batch by batch."""
    parts = []
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            wanted = pa.array(features).cast(batch["feature"].type)
            parts.append(batch.filter(pc.and_(pc.is_in(batch["feature"], value_set=wanted), condition(batch))).to_pandas())
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
