"""Change points of a multivariate series: piecewise-constant least squares with a given number of segments, solved exactly by dynamic
programming (Bellman 1961; Bai and Perron 2003).

A checkpoint's weight says how much of training it stands for, so one series can be cut on several axes: checkpoints are dense early and sparse late,
and cuts that hold on the index axis alone are made by that choice. Every series is standardised with the axis' weights, so that each has the
same say; a value that is missing (NaN) has no weight and takes no part in any cost.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["AXES", "SHORTEST", "Segmentation", "axis_weights", "coordinates", "segment", "shuffled_gain", "trend_gain"]

AXES = ("index", "step", "log_step")
SHORTEST = 2
"""Checkpoints that a segment has at least: a single outlier is no phase."""
NOTHING_LEFT = 1e-9
"""Share of the whole variation below which none counts as left to explain."""


@dataclass(frozen=True)
class Segmentation:
    """The best cut of T points into n segments."""

    starts: tuple[int, ...]
    """Index of the first point of the second, third, … segment."""
    gain: float
    """Share of the variation that n - 1 segments leave which n segments explain; NaN where the series do not vary."""


def coordinates(steps: np.ndarray, axis: str) -> np.ndarray:
    """[T] place of each checkpoint on an axis of AXES; steps [T] ascending, from 0."""
    steps = np.asarray(steps, np.float64)
    return {"index": np.arange(len(steps), dtype=np.float64), "step": steps, "log_step": np.log(steps + 1)}[axis]


def axis_weights(steps: np.ndarray, axis: str) -> np.ndarray:
    """[T] weight of each checkpoint, mean 1. index: all the same. step, log_step: the stretch of the axis that is nearer to it than to any
    other checkpoint.
    """
    x = coordinates(steps, axis)
    if axis == "index":
        return np.ones(len(x))
    edges = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])
    return np.diff(edges) * len(x) / (x[-1] - x[0])


def segment(series: np.ndarray, weights: np.ndarray, segments: int) -> Segmentation:
    """The cut of least weighted squared error; series [T, S] (NaN: missing), weights [T] > 0, segments >= 2.

    Of equally good cuts the one with the earlier starts. Raises ValueError where T < SHORTEST * segments.
    """
    points = len(series)
    if segments < 2 or points < SHORTEST * segments:
        raise ValueError(f"{points} points cannot be cut into {segments} segments of at least {SHORTEST}")
    cost = _costs(*_standardised(series, weights))
    whole = cost[0, points]
    if not whole > 0:
        return Segmentation(tuple(SHORTEST * n for n in range(1, segments)), float("nan"))
    best, choices = cost[0].copy(), []
    left = whole
    for _ in range(segments - 1):
        left = best[points]
        total = best[:, None] + cost  # [start of the last segment, end]
        choices.append(total.argmin(0))
        best = total.min(0)
    starts, end = [], points
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    gain = (left - best[points]) / left if left > NOTHING_LEFT * whole else 0.0
    return Segmentation(tuple(reversed(starts)), float(gain))


def trend_gain(steps: np.ndarray, axis: str, segments: int) -> float:
    """The gain of a straight line along the axis: what a steady change without phases gives."""
    return segment(coordinates(steps, axis)[:, None], axis_weights(steps, axis), segments).gain


def shuffled_gain(series: np.ndarray, weights: np.ndarray, segments: int, repeats: int, seed: int, quantile: float = 0.95) -> float:
    """Upper quantile of the gain when the checkpoints' values [T, S] stand in random order: what mere scatter gives. NaN where nothing varies."""
    rng = np.random.default_rng(seed)
    gains = [segment(series[rng.permutation(len(series))], weights, segments).gain for _ in range(repeats)]
    return float(np.quantile(gains, quantile)) if np.isfinite(gains).all() else float("nan")


def _standardised(series: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of weighted mean 0 and weighted variance 1, and their weights, both [T, S]; series that do not vary are 0 throughout."""
    known = np.isfinite(series)
    w = weights[:, None] * known
    x = np.where(known, series, 0.0)
    total = np.maximum(w.sum(0), np.finfo(float).tiny)
    x = x - (w * x).sum(0) / total
    spread = np.sqrt((w * x**2).sum(0) / total)
    size = np.max(np.abs(np.where(known, series, 0.0)), axis=0, initial=0.0)
    varies = spread > 1e-12 * size  # a constant series keeps rounding errors of this size
    return np.where(known & varies, x / np.where(varies, spread, 1.0), 0.0), w


def _costs(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """[T + 1, T + 1]: weighted squared error around its own mean of the segment from point i up to, not including, j; infinite below SHORTEST."""
    first, second, weight = (np.vstack([np.zeros(x.shape[1]), np.cumsum(v, axis=0)]) for v in (w * x, w * x**2, w))
    n = len(x) + 1
    cost = np.zeros((n, n))
    for s in range(x.shape[1]):
        total = weight[None, :, s] - weight[:, None, s]
        mean_part = np.divide((first[None, :, s] - first[:, None, s]) ** 2, total, out=np.zeros((n, n)), where=total > 0)
        cost += np.maximum(second[None, :, s] - second[:, None, s] - mean_part, 0.0)
    i, j = np.indices((n, n))
    cost[j - i < SHORTEST] = np.inf
    return cost
