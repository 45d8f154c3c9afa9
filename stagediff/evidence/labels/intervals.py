"""Exact intervals of a share: Clopper and Pearson, from the binomial distribution itself."""

import math

import numpy as np

__all__ = ["clopper_pearson"]


def clopper_pearson(hits: int, size: int, level: float = 0.95) -> tuple[float, float]:
    """The shares that `hits` of `size` do not exclude: each end leaves (1 - level) / 2 for as many hits or more, or as few or fewer.

    (0, 1) for a size of 0. C. J. Clopper and E. S. Pearson, Biometrika 26 (1934).
    """
    if not 0 <= hits <= size:
        raise ValueError(f"{hits} hits of {size} are no share")
    outside = (1 - level) / 2
    low = 0.0 if hits == 0 else _where(lambda p: _at_least(hits, size, p) - outside)
    high = 1.0 if hits == size else _where(lambda p: outside - (1 - _at_least(hits + 1, size, p)))
    return low, high


def _at_least(hits: int, size: int, p: float) -> float:
    """P(X >= hits) for X ~ Binomial(size, p), 0 < p < 1."""
    k = np.arange(hits, size + 1)
    return float(np.exp(_log_ways(size)[hits:] + k * math.log(p) + (size - k) * math.log1p(-p)).sum())


def _log_ways(size: int) -> np.ndarray:
    """log of "size choose k" for k = 0..size."""
    k = np.arange(1, size + 1)
    return np.concatenate([[0.0], np.cumsum(np.log(size + 1 - k) - np.log(k))])


def _where(rising) -> float:
    """The zero between 0 and 1 of a function that rises, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
