"""Top examples and histograms packed for the page.

Tokens are indices into a list of the distinct token texts, activations one byte each (relative to the feature's strongest, rounded up, so that no firing
disappears). Features are asked for in blocks: memory holds one block's windows at a time.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stagediff.diff.section.choice import Choice
from stagediff.packing import pack
from stagediff.store import Artifact

__all__ = ["Lookup", "histogram_counts", "pack_examples", "pack_histograms", "snippets", "top_features"]

Lookup = Callable[[list[int], int], pd.DataFrame]
"""(features, ranks) -> at most so many examples of each (feature, rank, row, position, is_new, tokens, activations, activation)."""
BLOCK = 1024


def pack_examples(choice: Choice, lookup: Lookup, block: int = BLOCK) -> dict[str, Any]:
    """What the script's `Examples` reads: per feature its number of examples; per example row, position, is_new, activation, window length, index of
    the strongest token; per token its text's index and its shade.
    """
    words: dict[str, int] = {}
    count = np.zeros(len(choice.feature), dtype=np.uint8)
    parts: list[pd.DataFrame] = []
    tokens: list[np.ndarray] = []
    shades: list[np.ndarray] = []
    for start in range(0, len(choice.feature), block):
        ids, most = choice.feature[start : start + block], choice.count[start : start + block]
        frame = lookup([int(f) for f in ids], int(most.max()))
        place = np.searchsorted(ids, frame["feature"].to_numpy())
        frame = frame.assign(place=place)[frame["rank"].to_numpy() < most[place]].sort_values(["place", "rank"])
        if frame.empty:
            continue
        place = frame["place"].to_numpy()
        count[start : start + block] = np.bincount(place, minlength=len(ids))
        length = frame["tokens"].map(len).to_numpy()
        texts = chain.from_iterable(frame["tokens"])
        tokens.append(np.fromiter((words.setdefault(t, len(words)) for t in texts), dtype=np.uint32, count=int(length.sum())))
        strongest = np.zeros(len(ids))
        np.maximum.at(strongest, place, frame["activation"].to_numpy(float))
        shades.append(
            _shades(np.concatenate([np.asarray(a, dtype=np.float64) for a in frame["activations"]]), np.repeat(strongest[place], length))
        )
        peak = [int(np.argmax(a)) for a in frame["activations"]]
        parts.append(frame[["row", "position", "is_new", "activation"]].assign(length=length, peak=peak))
    rows = pd.concat(parts) if parts else pd.DataFrame(columns=["row", "position", "is_new", "activation", "length", "peak"])
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.uint32)
    kinds = {"row": np.uint32, "position": np.uint16, "is_new": np.uint8, "activation": np.float32, "length": np.uint16, "peak": np.uint16}
    return {
        "words": list(words),
        "feature": pack(choice.feature.astype(np.uint32)),
        "count": pack(count),
        **{name: pack(rows[name].to_numpy().astype(kind)) for name, kind in kinds.items()},
        "tokens": pack(flat.astype(np.uint16 if len(words) < 2**16 else np.uint32)),
        "shades": pack(np.concatenate(shades) if shades else np.zeros(0, np.uint8)),
    }


def pack_histograms(statistics: Artifact, features: np.ndarray) -> dict[str, Any]:
    """`histogram_counts` as the script reads them."""
    edges, counts = histogram_counts(statistics, features)
    return {
        "edges": edges,
        "bins": len(edges) - 1,
        "feature": pack(features.astype(np.uint32)),
        "base": pack(counts[0].ravel()),
        "new": pack(counts[1].ravel()),
    }


def histogram_counts(statistics: Artifact, features: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Firings by activation: edges [bins + 1], and counts [2, n, bins] uint32 on base and on new rows, of `features` (ascending) only.

    The table is read through a filter, one row group at a time: at F = 262,144 it has millions of rows.
    """
    edges = statistics.read_json("histogram.json")["edges"]
    counts = np.zeros((2, len(features), len(edges) - 1), dtype=np.uint32)
    with pq.ParquetFile(statistics.local("histogram.parquet"), page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=1 << 18, columns=["feature", "bin", "base", "new"]):
            kept = batch.filter(pc.is_in(batch["feature"], value_set=pa.array(features, type=batch["feature"].type)))
            at = np.searchsorted(features, kept["feature"].to_numpy())
            for i, name in enumerate(("base", "new")):
                counts[i, at, kept["bin"].to_numpy()] = kept[name].to_numpy()
    return edges, counts


def top_features(features: pd.DataFrame, lookup: Lookup, count: int = 10, around: int = 8) -> list[dict[str, Any]]:
    """The selected features with the lowest score and the middle of their strongest example, as plain JSON values (for the terminal's summary)."""
    foremost = features[features["selected"].to_numpy(bool)].sort_values(["score", "feature"]).head(count)
    ids = [int(f) for f in foremost["feature"]]
    best = {int(e.feature): e for e in lookup(ids, 1).itertuples(index=False)} if ids else {}
    found = []
    for row in foremost.itertuples(index=False):
        example = best.get(int(row.feature))
        tokens, weights = [], []
        if example is not None:
            peak = int(np.argmax(example.activations))
            part = slice(max(0, peak - around), peak + around)
            tokens = list(example.tokens[part])
            weights = [round(float(a) / float(example.activation), 3) if example.activation else 0.0 for a in example.activations[part]]
        new_top = None if pd.isna(row.new_top) else float(row.new_top)
        found.append(
            {
                "feature": int(row.feature),
                "x": float(row.x),
                "y": float(row.y),
                "score": float(row.score),
                "new_top": new_top,
                "tokens": tokens,
                "weights": weights,
            }
        )
    return found


def snippets(lookup: Lookup, features: list[int], around: int = 8) -> dict[int, str]:
    """Feature -> the middle of its strongest example as plain text (not escaped); features that never fire are left out."""
    found = lookup(features, 1) if features else pd.DataFrame()
    texts = {}
    for e in found.itertuples(index=False):
        peak = int(np.argmax(e.activations))
        texts[int(e.feature)] = " ".join("".join(e.tokens[max(0, peak - around) : peak + around]).split())
    return texts


def _shades(activations: np.ndarray, strongest: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(strongest > 0, activations / strongest, 0.0)
    return np.ceil(np.clip(share, 0, 1) * 255).astype(np.uint8)
