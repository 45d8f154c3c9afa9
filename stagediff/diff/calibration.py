"""p- and q-values of how far features moved, against values of a null; and how small they can get.

Features differ: a few move with every retraining (those that are still giving birth, above all), most hardly at all. Pooled as they are, the few are the null's
tail and nothing gets beyond it. So an angle is first measured in units of what is usual for its feature:

own_p_values   two repeats or more: against the feature's own repeats, t = log(angle / root mean square of its null angles), both moderated by the pooled median
               a0 (squares plus a0 squared), so that no tremor of a feature that stands still becomes a move (as s0 in Tusher, Tibshirani and Chu, 2001).
               The null of t are the repeats themselves, each against the others. Beside the pooled null: docs/decisions/009-own-null.md
p_values       one repeat: against its like, once by density and then by decoder norm: less the median of the null's neighbours in that covariate, divided
               by their spread (1.4826 x the median absolute deviation)

Null values are then pooled over features: p = (1 + null values at least as large) / (1 + null values) (Phipson and Smyth, 2010: never 0), and q by
Benjamini and Hochberg (1995).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["NEIGHBOURS", "Reach", "benjamini_hochberg", "own_p_values", "p_values", "reach", "standardised"]

NEIGHBOURS = 201
"""Null values that tell what is usual for a feature."""
LEAST_SPREAD = 0.005
"""Radians: spread is never taken to be smaller, so that a null that stands still does not make every tremor infinite."""
REGION_SHARE, REGION_LEAST = 0.01, 10


def p_values(angle: np.ndarray, like: Sequence[np.ndarray], null_angle: np.ndarray, null_like: Sequence[np.ndarray]) -> np.ndarray:
    """[n] p of each angle, large = unusual; NaN where the angle or a covariate is undefined.

    Parameters: angle [n], null_angle [N] in radians; like, null_like: the covariates of each, [n] and [N] arrays, positive (they are compared by rank);
    none: all null values are pooled as they are.
    """
    defined = np.isfinite(np.stack([null_angle, *null_like])).all(0)
    null_angle, null_like = null_angle[defined], [c[defined] for c in null_like]
    p = np.full(len(angle), np.nan)
    able = np.isfinite(np.stack([angle, *like])).all(0)
    if not len(null_angle):
        p[able] = 1.0
        return p
    z, null_z = standardised(angle[able], [c[able] for c in like], null_angle, null_like)
    null_z.sort()
    at_least = len(null_z) - np.searchsorted(null_z, z, side="left")
    p[able] = (1 + at_least) / (1 + len(null_z))
    return p


def own_p_values(angle: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[n] p of each angle against the feature's own null angles [n, repeats], large = unusual; NaN where the angle is.

    1 where fewer than two of the feature's repeats are defined: retraining alone has killed it, so nothing can be said. Expects two repeats or more.
    """
    angle, null = np.asarray(angle, float), np.asarray(null, float)
    able, there = np.isfinite(angle), np.isfinite(null)
    p = np.where(able, 1.0, np.nan)
    known = there.sum(1) >= 2
    if not known.any():
        return p
    floor = max(float(np.median(null[there])), LEAST_SPREAD) ** 2
    squares = np.where(there, null**2, 0.0) + floor  # the floor of an undefined repeat is taken out again
    total, count = (squares * there).sum(1, keepdims=True), there.sum(1, keepdims=True)
    # [n, repeats] mean square of the other repeats
    others = np.where(there & (count >= 2), (total - squares) / np.maximum(count - 1, 1), np.nan)
    null_t = np.sort(np.log(squares / others)[np.isfinite(others)])
    told = known & able
    # against each baseline of as many repeats as a null value's, not against one of all
    t = np.nanmedian(np.log((angle[told, None] ** 2 + floor) / others[told]), axis=1)
    p[told] = (1 + len(null_t) - np.searchsorted(null_t, t, side="left")) / (1 + len(null_t))
    return p


def standardised(
    value: np.ndarray, like: Sequence[np.ndarray], null: np.ndarray, null_like: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Values and null values in units of what is usual for their covariates, one covariate after the other."""
    least = LEAST_SPREAD
    for mine, its in zip(like, null_like, strict=True):
        order = np.argsort(its, kind="stable")
        middle, spread = _running(null[order])
        spread = np.maximum(spread, least)
        sorted_its = its[order]

        def scaled(v: np.ndarray, at: np.ndarray, middle: np.ndarray = middle, spread: np.ndarray = spread) -> np.ndarray:
            return (v - middle[at]) / spread[at]

        place = np.searchsorted(sorted_its, mine).clip(0, len(its) - 1)
        own = np.empty(len(its), np.int64)
        own[order] = np.arange(len(its))
        value, null = scaled(value, place), scaled(null, own)
        least = 1e-6
    return value, null


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """[n] q-values: the smallest false discovery rate at which each would be called; NaN stays NaN and does not count as a test."""
    q = np.full(len(p), np.nan)
    able = np.flatnonzero(np.isfinite(p))
    order = able[np.argsort(p[able], kind="stable")]
    m = len(order)
    raw = p[order] * m / np.arange(1, m + 1)
    q[order] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1.0)
    return q


@dataclass(frozen=True)
class Reach:
    """What a number of null values allows."""

    smallest_p: float
    together: int
    """How many features would have to lie beyond every null value at once for any of them to be called."""
    is_enough: bool
    """Whether that is no more than the lowest 1 % of the features (at least 10)."""


def reach(null_values: int, features: int, level: float) -> Reach:
    """Whether a false discovery rate of `level` over so many features can be reached with so many null values."""
    smallest = 1 / (1 + null_values)
    together = max(1, math.ceil(smallest * features / level - 1e-9))
    return Reach(smallest, together, together <= max(REGION_LEAST, int(REGION_SHARE * features)))


def _running(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and spread of the NEIGHBOURS values around each place (the first or last ones at the ends)."""
    n = min(NEIGHBOURS, len(value))
    windows = np.lib.stride_tricks.sliding_window_view(value, n)  # [N - n + 1, n]
    start = (np.arange(len(value)) - n // 2).clip(0, len(value) - n)
    step = max(1, len(windows) // 512)
    at = np.arange(0, len(windows), step)  # neighbours of neighbours hardly differ: a few hundred places say it all
    middle = np.median(windows[at], axis=1)
    spread = 1.4826 * np.median(np.abs(windows[at] - middle[:, None]), axis=1)
    nearest = (start // step).clip(0, len(at) - 1)
    return middle[nearest], spread[nearest]
