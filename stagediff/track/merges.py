"""Which features merged between two checkpoints: pairs whose decoder rows were apart and come together, and that now fire strongest at the same places.

A definition of ours (PatternRule). Decoder rows can come near each other without the features firing together, and features can fire together and write
different things; both at once says that one meaning now has two features.

All pairs are compared in blocks of decoder rows, in fp32; only candidates are looked at closer, and of each feature only its strongest partner is kept, so
that memory is that of the two decoders and a few blocks. Where a block has more than PER_ROW candidates a row (a dictionary that collapsed), only the
strongest of each row are looked at, and the block is counted as cut.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.track.spec import PatternRule

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["find_merges", "shared_positions", "top_positions"]

BLOCK = 4096
PER_ROW = 64
PAIRS_AT_ONCE = 4096
ROUNDING = 1e-5
"""Of a cosine from an fp32 product; candidates are computed again in fp64."""
FIELDS = ("feature", "partner", "cos_before", "cos_after", "shared")


def find_merges(
    before: Tensor, after: Tensor, positions: np.ndarray, rule: PatternRule, device: str = "cpu", block: int = BLOCK
) -> tuple[pd.DataFrame, int]:
    """Columns feature, partner, cos_before, cos_after, shared, one row per row of `after` that has merged with some other, and how many blocks were cut.

    Parameters: `before`, `after` [n, d] fp32: unit decoder rows (or zero) at the earlier and the later checkpoint. `positions` [n, k] int64: of each
    feature the places of its top examples at the later checkpoint, -1 where it has fewer. feature and partner count these rows.
    The partner has the largest cos_after; of equal ones the first.
    """
    before, after = before.to(device), after.to(device)
    best = _no_pairs()
    n, cut = len(after), 0
    for i in range(0, n, block):
        for j in range(i, n, block):
            cosine = after[i : i + block] @ after[j : j + block].T
            if i == j:
                cosine = cosine.triu(1)
            a, b, is_cut = _candidates(cosine, before[i : i + block], before[j : j + block], rule.merge_cosine)
            cut += is_cut
            if len(a):
                found = _checked(a + i, b + j, before, after, positions, rule)
                best = _strongest(np.concatenate([best, found, found[:, [1, 0, 2, 3, 4]]]))
    table = pd.DataFrame(dict(zip(FIELDS, best.T, strict=True)))
    return table.astype({"feature": np.int32, "partner": np.int32}), cut


def top_positions(statistics: "Artifact", examples: int, features: int) -> np.ndarray:
    """[features, examples] int64: row and position of each feature's strongest examples as one number, -1 where there are fewer."""
    table = statistics.read_table("examples.parquet", columns=["feature", "rank", "row", "position"])
    table = table[table["rank"] < examples]
    out = np.full((features, examples), -1, np.int64)
    out[table.feature, table["rank"]] = (table.row.to_numpy(np.int64) << 32) | table.position.to_numpy(np.int64)
    return out


def shared_positions(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jaccard of the places in each row of `a` and `b`, both [n, k] (-1: none; no place twice in a row) -> [n]; 0 where both have none."""
    both = np.empty(len(a))
    for start in range(0, len(a), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        both[some] = ((a[some, :, None] == b[some, None, :]) & (a[some, :, None] >= 0)).sum((1, 2))
    either = (a >= 0).sum(1) + (b >= 0).sum(1) - both
    return np.divide(both, either, out=np.zeros(len(a)), where=either > 0)


def _candidates(cosine: Tensor, before_a: Tensor, before_b: Tensor, threshold: float) -> tuple[Tensor, Tensor, bool]:
    """Places in the block that are together now, at most PER_ROW a row on average; whether some were left out."""
    together = cosine >= threshold - ROUNDING
    if int(together.sum()) <= PER_ROW * len(cosine):
        a, b = together.nonzero(as_tuple=True)
        return a, b, False
    together &= before_a @ before_b.T < threshold + ROUNDING
    is_cut = int(together.sum()) > PER_ROW * len(cosine)
    if is_cut:
        value, b = torch.where(together, cosine, -1).topk(min(PER_ROW, cosine.shape[1]), dim=1)
        a, k = (value >= 0).nonzero(as_tuple=True)
        return a, b[a, k], True
    a, b = together.nonzero(as_tuple=True)
    return a, b, False


def _checked(a: Tensor, b: Tensor, before: Tensor, after: Tensor, positions: np.ndarray, rule: PatternRule) -> np.ndarray:
    """Of the pairs (a, b) those that merged: [pairs, FIELDS] float64."""
    cosines = []
    for rows in (before, after):
        pieces = zip(a.split(PAIRS_AT_ONCE), b.split(PAIRS_AT_ONCE), strict=True)
        cosines.append(torch.cat([(rows[x].double() * rows[y].double()).sum(1) for x, y in pieces]).cpu().numpy().clip(-1, 1))
    keep = (cosines[0] < rule.merge_cosine) & (cosines[1] >= rule.merge_cosine)
    first, second = a.cpu().numpy()[keep], b.cpu().numpy()[keep]
    shared = shared_positions(positions[first], positions[second])
    pairs = np.column_stack([first, second, cosines[0][keep], cosines[1][keep], shared])
    return pairs[shared >= rule.merge_shared]


def _strongest(pairs: np.ndarray) -> np.ndarray:
    """One pair per feature, ordered by feature."""
    pairs = pairs[np.lexsort((pairs[:, 1], -pairs[:, 3], pairs[:, 0]))]
    return pairs[np.unique(pairs[:, 0], return_index=True)[1]]


def _no_pairs() -> np.ndarray:
    return np.empty((0, len(FIELDS)))
