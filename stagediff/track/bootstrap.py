"""The bootstrap over features: how often every feature is drawn, and medians of what was drawn, without copying a value.

A resample of n features is its counts (how often each was drawn, n draws in all). A median of the resample then needs one sort of the values and a
running sum of counts in that order, whatever the number of resamples. Efron and Tibshirani 1993, percentile intervals.
"""

from collections.abc import Iterator

import numpy as np

__all__ = ["LEVEL", "Median", "interval", "resamples"]

LEVEL = 0.9
"""Of all intervals."""
COUNTS_AT_ONCE = 1 << 21


def resamples(n: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """`repeats` resamples of n things as counts, some at a time: arrays [b, n] int32 whose rows sum to n. The same for the same seed."""
    rng = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // max(n, 1))
    for start in range(0, repeats, at_once):
        rows = min(at_once, repeats - start)
        yield np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(rows)]).astype(np.int32)


class Median:
    """The median of values [n] where each counts as often as it was drawn; NaN values take no part."""

    def __init__(self, values: np.ndarray):
        order = np.argsort(values, kind="stable")
        self._order = order[: np.isfinite(values).sum()]
        self._sorted = values[self._order]

    def of(self, counts: np.ndarray) -> np.ndarray:
        """counts [b, n] -> [b]: what np.median says of the drawn values; NaN where none was drawn."""
        running = np.cumsum(counts[:, self._order], axis=1, dtype=np.int64)
        out = np.full(len(counts), np.nan)
        for i, sums in enumerate(running):
            if len(sums) and (drawn := int(sums[-1])):
                middle = np.searchsorted(sums, [(drawn - 1) // 2, drawn // 2], side="right")
                out[i] = self._sorted[middle].mean()
        return out


def interval(samples: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval along the first axis, NaN samples left out; NaN where all are."""
    edges = [(1 - level) / 2, (1 + level) / 2]
    some = np.isfinite(samples).any(0)
    low, high = np.nanquantile(np.where(some, samples, 0.0), edges, axis=0)
    return np.where(some, low, np.nan), np.where(some, high, np.nan)
