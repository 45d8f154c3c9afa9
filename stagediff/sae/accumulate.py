"""Accumulators of the statistics pass: per-feature counts, top examples, and the quality of the reconstruction.

Each takes one block of tokens at a time and holds O(features), never O(features x tokens). What comes in is sparse: the (token, feature,
activation) triples of the features that fired. Every accumulator gives the same result for any cut of the stream into blocks' triples in the same
order, and hands out its `state()` as tensors, so that a killed pass continues with the same bytes.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureCounts", "Reconstruction", "TopExamples", "histogram_edges"]

HISTOGRAM_RANGE = (1e-3, 1e3)
"""Activations are in the dictionary's own units (inputs scaled to E||x|| = sqrt(d)), where a feature of decoder norm 1 fires at 0.1 to 100."""


def histogram_edges(bins: int) -> np.ndarray:
    """Logarithmic bin edges, [bins + 1] float64; the first bin also takes all below, the last all above."""
    low, high = HISTOGRAM_RANGE
    return np.geomspace(low, high, bins + 1)


class FeatureCounts:
    """Firings, activation mass, largest activation and histogram of every feature, base and new tokens apart.

    Attributes (axis 0: base, new): `histogram` [2, F, bins] int, `mass` [2, F] float64, `largest` [2, F] float32.
    """

    def __init__(self, features: int, edges: np.ndarray):
        self.features, self.edges, self.bins = features, edges, len(edges) - 1
        self.histogram = np.zeros((2, features, self.bins), np.int32)
        self.mass = np.zeros((2, features), np.float64)
        self.largest = np.zeros((2, features), np.float32)

    def add(self, feature: np.ndarray, value: np.ndarray, is_new: np.ndarray) -> None:
        """`feature` [n] int64, `value` [n] float32 > 0, `is_new` [n] bool: one entry per firing."""
        column = is_new * np.int64(self.features) + feature
        bin_ = np.searchsorted(self.edges[1:-1], value, side="right")  # edges[b] <= value < edges[b + 1]
        np.add.at(self.histogram.reshape(-1), column * self.bins + bin_, np.int32(1))
        np.add.at(self.mass.reshape(-1), column, value.astype(np.float64))
        np.maximum.at(self.largest.reshape(-1), column, value)

    @property
    def firings(self) -> np.ndarray:
        """[2, F] int64: tokens on which the feature fired, base and new."""
        return self.histogram.sum(2, dtype=np.int64)

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(getattr(self, name)) for name in ("histogram", "mass", "largest")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name in ("histogram", "mass", "largest"):
            setattr(self, name, state[name].numpy().copy())


class TopExamples:
    """The `top` rows in which each feature is strongest, at most one example per row (the row's maximum).

    Ties go to the smaller row, and within a row to the smaller position, so that the outcome does not depend on block sizes.
    Candidates are collected and merged now and then: one sort per some millions of them. They wait in memory set aside for them: kept as the
    small arrays in which they come, they would lie between the buffers of blocks that are computed and freed, and the heap would grow.
    """

    FIELDS = ("feature", "value", "row", "position", "is_new")
    TYPES = (np.int32, np.float32, np.int64, np.int32, np.bool_)

    def __init__(self, features: int, top: int, merge_at: int | None = None):
        self.features, self.top = features, top
        self.merge_at = merge_at or max(1 << 20, features * top // 2)
        self._kept = [np.empty(0, t) for t in self.TYPES]
        self._waiting = [np.empty(self.merge_at, t) for t in self.TYPES]
        self._n_waiting = 0
        self._bar = np.zeros(features, np.float32)
        """The activation of the last kept example of each feature: a candidate below it cannot enter."""

    def add(self, feature: np.ndarray, value: np.ndarray, row: np.ndarray, position: np.ndarray, is_new: np.ndarray) -> None:
        """Row maxima, one entry per (row, feature); the same (row, feature) must not be given twice."""
        good = np.flatnonzero(value >= self._bar[feature])
        while len(good):
            taken, good = np.split(good, [self.merge_at - self._n_waiting])
            end = self._n_waiting + len(taken)
            for waiting, column in zip(self._waiting, (feature, value, row, position, is_new), strict=True):
                waiting[self._n_waiting : end] = column[taken]
            self._n_waiting = end
            if end == self.merge_at:
                self._merge()

    def _merge(self) -> None:
        columns = [np.concatenate([kept, w[: self._n_waiting]]) for kept, w in zip(self._kept, self._waiting, strict=True)]
        feature, value, row = columns[:3]
        order = np.lexsort((row, -value, feature))
        feature = feature[order]
        starts = np.flatnonzero(np.r_[True, feature[1:] != feature[:-1]]) if len(feature) else np.empty(0, np.int64)
        rank = np.arange(len(feature)) - np.repeat(starts, np.diff(np.r_[starts, len(feature)]))
        order = order[rank < self.top]
        self._kept = [c[order] for c in columns]
        self._rank = rank[rank < self.top].astype(np.int32)
        last = self._rank == self.top - 1
        self._bar[self._kept[0][last]] = self._kept[1][last]
        self._n_waiting = 0

    def table(self) -> dict[str, np.ndarray]:
        """Columns feature, rank, activation, row, position, is_new; ordered by feature and rank."""
        self._merge()
        feature, value, row, position, is_new = self._kept
        return {"feature": feature, "rank": self._rank, "activation": value, "row": row, "position": position, "is_new": is_new}

    def state(self) -> dict[str, Tensor]:
        self._merge()
        return {f"top_{name}": torch.from_numpy(c) for name, c in zip(self.FIELDS, self._kept, strict=True)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._kept = [state[f"top_{name}"].numpy().copy() for name in self.FIELDS]
        self._n_waiting = 0
        self._merge()


class Reconstruction:
    """Squared error and variance of the input, streamed in float64.

    The variance is merged from blocks' own means (Chan et al. 1983): sums of squares would cancel where a few coordinates are huge,
    as residual streams have them.
    """

    def __init__(self, d: int):
        self.count, self.firings = 0, 0
        self.error, self.spread = 0.0, 0.0
        self.mean = torch.zeros(d, dtype=torch.float64)

    def add(self, x: Tensor, x_hat: Tensor, firings: int) -> None:
        """`x`, `x_hat` [n, d] raw units; `firings`: features active over these tokens together."""
        if not len(x):
            return
        x = x.double()
        n, total = len(x), self.count + len(x)
        mean = x.mean(0)
        delta = mean.cpu() - self.mean
        self.spread += float((x - mean).square().sum()) + float(delta.square().sum()) * n * self.count / total
        self.mean += delta * (n / total)
        self.error += float((x - x_hat.double()).square().sum())
        self.count, self.firings = total, self.firings + firings

    @property
    def explained_variance(self) -> float | None:
        """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2; None where the input does not vary."""
        return 1 - self.error / self.spread if self.spread > 0 else None

    @property
    def l0(self) -> float | None:
        """Active features per token."""
        return self.firings / self.count if self.count else None

    def state(self) -> dict[str, Tensor]:
        scalars = torch.tensor([self.count, self.firings, self.error, self.spread], dtype=torch.float64)
        return {"reconstruction_mean": self.mean, "reconstruction": scalars}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.mean = state["reconstruction_mean"].clone()
        count, firings, self.error, self.spread = state["reconstruction"].tolist()
        self.count, self.firings = int(count), int(firings)
