"""Which features merged between two checkpoints: pairs that write in nearly one direction and of which one fires where the other one fires strongest, and
that did not do both before, by a clear margin (one of the two has doubled).

A definition of ours (PatternRule). Decoder rows can come near each other without the features firing together, and features can fire together and write
different things; both at once says that one meaning now has two features.

Why not "both fire strongest at the same places": a sparse dictionary does not keep two latents for one meaning. When two features of the model come together,
one latent begins to fire at the other's places as well, and soon does so alone; the other fades or turns to something else. So what counts is whether
one fires (at all) at the places where the other did so strongest at the EARLIER checkpoint, when it was still itself. On planted merges that happens at
decoder cosines of .4 to .7, and the two seldom come nearer.

All pairs are compared in blocks of decoder rows, in fp32; of each feature at most PER_ROW candidates are kept (the nearest; a block in which some were left
out is counted as cut), and of those that merged only the strongest partner. Memory is that of the two decoders, a few blocks and the candidates.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.track.spec import PatternRule

if TYPE_CHECKING:
    from stagediff.store import Artifact
    from stagediff.track.probe import Probe

__all__ = ["Shares", "find_merges", "strongest_places"]

BLOCK = 1024
"""Decoder rows of a block. Its matrices of 4 MiB are used again; larger ones would be asked of the system anew each time, which takes longer than the work."""
PER_ROW = 16
PAIRS_AT_ONCE = 4096
CLEARLY = 2.0
"""Factor by which cosine or share must have grown: pairs that hover about a threshold do not merge again and again."""
ROUNDING = 1e-5
"""Of a cosine from an fp32 product; candidates are computed again in fp64."""
FIELDS = ("feature", "partner", "cos_before", "cos_after", "shared_before", "shared")

Shares = Callable[[bool, np.ndarray, np.ndarray], np.ndarray]
"""(at the later checkpoint?, x [n], y [n]) -> [n]: the share of y's strongest places at the earlier checkpoint at which x fires."""


def find_merges(
    before: Tensor, after: Tensor, shares: Shares, rule: PatternRule, device: str = "cpu", block: int = BLOCK
) -> tuple[pd.DataFrame, int]:
    """Columns FIELDS, one row per row of `after` that has merged with some other, and how many blocks were cut.

    `before`, `after` [n, d] fp32: unit decoder rows (or zero) at the earlier and the later checkpoint. feature and partner count these rows, and so does
    what `shares` is asked. shared_before, shared: the larger of the two shares of a pair, at either checkpoint. The partner has the largest cos_after;
    of equal ones it is the first.
    """
    before, after = before.to(device), after.to(device)
    a, b, cut = _candidates(after, rule.merge_cosine, block)
    cos_after = _cosines(after, a, b)
    a, b, cos_after = (v[cos_after >= rule.merge_cosine] for v in (a, b, cos_after))
    shared = _larger(shares, True, a, b)
    a, b, cos_after, shared = (v[shared >= rule.merge_shared] for v in (a, b, cos_after, shared))
    cos_before, shared_before = _cosines(before, a, b), _larger(shares, False, a, b)
    were_apart = (cos_before < rule.merge_cosine) | (shared_before < rule.merge_shared)
    is_new = were_apart & ((CLEARLY * cos_before <= cos_after) | (CLEARLY * shared_before <= shared))
    pairs = np.column_stack([a, b, cos_before, cos_after, shared_before, shared])[is_new]
    both = np.concatenate([pairs, pairs[:, [1, 0, 2, 3, 4, 5]]])
    table = pd.DataFrame(dict(zip(FIELDS, _strongest(both).T, strict=True)))
    return table.astype({"feature": np.int32, "partner": np.int32}), cut


def strongest_places(statistics: "Artifact", examples: int, features: int, probe: "Probe") -> np.ndarray:
    """[features, examples] int64: flat places of each feature's strongest examples, -1 where there are fewer."""
    table = statistics.read_table("examples.parquet", columns=["feature", "rank", "row", "position"])
    table = table[table["rank"] < examples]
    out = np.full((features, examples), -1, np.int64)
    out[table.feature, table["rank"]] = probe.flat(table.row.to_numpy(), table.position.to_numpy())
    return out


def _candidates(after: Tensor, threshold: float, block: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pairs a < b of rows that may reach the threshold, and how many blocks were cut."""
    n, cut = len(after), 0
    found_a, found_b = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for i in range(0, n, block):
        near: list[tuple[Tensor, Tensor, Tensor]] = []
        for j in range(i, n, block):
            cosine = after[i : i + block] @ after[j : j + block].T
            if i == j:
                cosine = cosine.triu(1)
            together = cosine >= threshold - ROUNDING
            count = int(together.sum())
            if not count:
                continue
            if count > PER_ROW * len(cosine):
                value, nearest = torch.where(together, cosine, -1).topk(min(PER_ROW, cosine.shape[1]), dim=1)
                a, k = (value >= 0).nonzero(as_tuple=True)
                near.append((a, nearest[a, k] + j, value[a, k]))
                cut += 1
            else:
                a, b = together.nonzero(as_tuple=True)
                near.append((a, b + j, cosine[a, b]))
        if near:
            row, column, nearness = (torch.cat(part).cpu().numpy() for part in zip(*near, strict=True))
            order = np.lexsort((column, -nearness, row))
            row, column = row[order], column[order]
            is_near = np.arange(len(row)) - np.searchsorted(row, row) < PER_ROW
            cut += int(len(near) > 1 and not is_near.all())
            found_a.append(row[is_near] + i)
            found_b.append(column[is_near])
    return np.concatenate(found_a), np.concatenate(found_b), cut


def _larger(shares: Shares, is_later: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] the larger of the shares of the two directions."""
    if not len(a):
        return np.empty(0)
    return shares(is_later, np.concatenate([a, b]), np.concatenate([b, a])).reshape(2, -1).max(0)


def _cosines(rows: Tensor, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n] float64 cosines of unit rows."""
    out = np.empty(len(a))
    for start in range(0, len(a), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        x, y = (rows[torch.from_numpy(v[some]).to(rows.device)].double() for v in (a, b))
        out[some] = (x * y).sum(1).cpu().numpy().clip(-1, 1)
    return out


def _strongest(pairs: np.ndarray) -> np.ndarray:
    """One pair per feature, ordered by feature."""
    pairs = pairs[np.lexsort((pairs[:, 1], -pairs[:, 3], pairs[:, 0]))]
    return pairs[np.unique(pairs[:, 0], return_index=True)[1]]
