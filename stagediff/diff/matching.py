"""Which latents of two dictionaries are the same, by decoder direction, and how new a latent is: one to one, in blocks, nothing F x F in memory.

Two dictionaries finetuned along different paths keep old features at one index, but newborns land where there was room, at different indices. Latents
are therefore matched by the cosine of their decoder rows, nearest pair first. Those are the pairs that are each other's nearest neighbour; once they are
taken the same holds among the rest, so the whole matching is a few rounds of nearest neighbours (a maximum-weight assignment would need all n x m
cosines at once).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stagediff.diff.decoders import BLOCK, unit_rows

__all__ = ["Held", "Masked", "Matching", "Rows", "candidates", "largest_cosine", "match"]

ROWS_AT_ONCE = 4096


class Rows(Protocol):
    """Decoder rows that are read block by block; a `Decoder` is such."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor: ...


class Held:
    """Rows in memory, [n, d]."""

    def __init__(self, rows: Tensor):
        self._rows = rows
        self.shape = (rows.shape[0], rows.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        return self._rows[start:stop]


class Masked:
    """Rows of another, those outside a mask [n] bool as zeros, which match nothing."""

    def __init__(self, rows: Rows, mask: np.ndarray):
        self._rows, self._mask = rows, torch.from_numpy(mask)
        self.shape = rows.shape

    def rows(self, start: int, stop: int) -> Tensor:
        rows = self._rows.rows(start, stop)
        return torch.where(self._mask[start:stop, None].to(rows.device), rows, 0.0)


@dataclass(frozen=True)
class Matching:
    """Partners of n latents among m others."""

    partner: np.ndarray
    """[n] index into the others; -1: none (fewer others than latents)."""
    cosine: np.ndarray
    """[n] of the two decoder rows; NaN without a partner."""
    mutual: np.ndarray
    """[n] bool: each other's nearest neighbour among all n and m, not only among what nearer pairs left."""


def candidates(bound: np.ndarray, alive: np.ndarray, most: int) -> np.ndarray:
    """Ascending indices [<= most] of the alive latents with the smallest `bound` [F], a cosine that a latent's novelty cannot fall below.

    Whatever is left out has a novelty of at least the largest bound among the candidates. Latents without a direction (NaN) are left out.
    """
    able = np.flatnonzero(alive & np.isfinite(bound))
    return np.sort(able[np.argsort(bound[able], kind="stable")[:most]])


def largest_cosine(rows: Tensor, decoders: Mapping[str, Rows], device: str = "cpu") -> dict[str, np.ndarray]:
    """For each row [n, d] its largest cosine with any row of each decoder: name -> [n] float64, computed in fp32. Rows of norm 0 match nothing."""
    mine = _unit(rows, device)
    best = {}
    for name, decoder in decoders.items():
        largest = torch.full((len(mine),), -1.0, device=device)
        for start in range(0, decoder.shape[0], BLOCK):
            other = _unit(decoder.rows(start, min(start + BLOCK, decoder.shape[0])), device)
            for i in range(0, len(mine), ROWS_AT_ONCE):
                found = (mine[i : i + ROWS_AT_ONCE] @ other.T).amax(1)
                largest[i : i + ROWS_AT_ONCE] = torch.maximum(largest[i : i + ROWS_AT_ONCE], found)
        best[name] = largest.clamp(-1, 1).double().cpu().numpy()
    return best


def match(a: Tensor, b: Tensor, device: str = "cpu") -> Matching:
    """Matches rows of `a` [n, d] with rows of `b` [m, d] one to one, nearest pair first; of equally near ones the smaller indices."""
    left, right = _unit(a, device), _unit(b, device)
    partner = np.full(len(left), -1)
    cosine = np.full(len(left), np.nan)
    mutual = np.zeros(len(left), bool)
    free_a, free_b = torch.arange(len(left), device=device), torch.arange(len(right), device=device)
    row_best, row_at = _nearest(left, right)
    col_best, col_at = _nearest(right, left)
    first = True
    while len(free_a) and len(free_b):
        of = row_at[free_a]
        pairs = col_at[of] == free_a
        if not bool(pairs.any()):  # rounding may order equally near pairs differently from the two sides
            pairs[int(row_best[free_a].argmax())] = True
        mine, its = free_a[pairs], of[pairs]
        here = mine.cpu().numpy()
        partner[here], cosine[here] = its.cpu().numpy(), row_best[mine].clamp(-1, 1).double().cpu().numpy()
        mutual[here] = first
        free_a, free_b = free_a[~pairs], _without(free_b, its)
        if not len(free_a) or not len(free_b):
            break
        for of_free, others, at, best, these, those in (
            (free_a, free_b, row_at, row_best, left, right),
            (free_b, free_a, col_at, col_best, right, left),
        ):
            stale = of_free[~torch.isin(at[of_free], others)]
            if len(stale):
                value, index = _nearest(these[stale], those[others])
                best[stale], at[stale] = value, others[index]
        first = False
    return Matching(partner, cosine, mutual)


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `a` the largest product with a row of `b`, and that row; of equal ones the smallest."""
    best = torch.full((len(a),), -torch.inf, device=a.device)
    at = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    for i in range(0, len(a), ROWS_AT_ONCE):
        for j in range(0, len(b), BLOCK):
            value, index = (a[i : i + ROWS_AT_ONCE] @ b[j : j + BLOCK].T).max(1)
            better = value > best[i : i + ROWS_AT_ONCE]
            best[i : i + ROWS_AT_ONCE] = torch.where(better, value, best[i : i + ROWS_AT_ONCE])
            at[i : i + ROWS_AT_ONCE] = torch.where(better, index + j, at[i : i + ROWS_AT_ONCE])
    return best, at


def _without(free: Tensor, taken: Tensor) -> Tensor:
    return free[~torch.isin(free, taken)]


def _unit(rows: Tensor, device: str) -> Tensor:
    """Unit rows in fp32; rows of norm 0 become 0."""
    return unit_rows(rows.double()).nan_to_num(0.0).float().to(device)
