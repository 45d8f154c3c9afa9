"""When a feature formed: the first checkpoint from which its progress M stays at or above a share of its final value, with a bootstrap interval over
its datapoints.

A resample draws as many datapoints as there are, with replacement: datapoint a comes w_a times. Its similarity is the mean over pairs of different
datapoints,

    M* = sum_{a != b} w_a w_b S_ab / sum_{a != b} w_a w_b - baseline;

pairs of a datapoint with its own copy, which would have similarity 1, are left out. A resample of one datapoint alone has no pair and is drawn again.
So a resample is a weighting of pairs, and all of them are one matrix product. The random positions and their baseline stay as they are.

Checkpoints are walked from the last to the first. Then "M stays up from here on" is known as soon as a checkpoint is seen, and two numbers per set,
measure and resample are all the state there is: the final M, and the earliest checkpoint so far.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagediff.track.bootstrap import LEVEL
from stagediff.track.spec import MEASURES, FormationRule

__all__ = ["Found", "Walk", "pair_weights"]


def pair_weights(n: int, repeats: int, seed: int) -> np.ndarray:
    """Weights [n (n - 1) / 2, 1 + repeats] of the unordered pairs of n >= 2 datapoints. Columns sum to 1; column 0 is no resample: all pairs alike."""
    rng = np.random.default_rng([seed, n])
    drawn = rng.integers(n, size=(repeats, n))
    while (alone := (drawn == drawn[:, :1]).all(1)).any():
        drawn[alone] = rng.integers(n, size=(int(alone.sum()), n))
    times = np.stack([np.bincount(d, minlength=n) for d in np.vstack([np.arange(n), drawn])]).astype(float)  # [1 + repeats, n]
    a, b = np.triu_indices(n, 1)
    weights = times[:, a] * times[:, b]
    return (weights / weights.sum(1, keepdims=True)).T


class Found:
    """When sets formed. Arrays [measures, sets]; a checkpoint index of T means: never."""

    def __init__(self, at: np.ndarray, low: np.ndarray, high: np.ndarray, unformed: np.ndarray):
        self.at, self.low, self.high = at, low, high
        self.unformed = unformed
        """Share of resamples in which the set did not form."""


class Walk:
    """Progress of every set at every checkpoint, and for every set and resample the first checkpoint from which it stays up.

    Sets are numbered as in `datapoints`. Attributes: `m` [measures, sets, T] float32, `baseline` [T, measures] float64; NaN where nothing was measured.
    """

    def __init__(self, sets: int, checkpoints: int, rule: FormationRule):
        self.rule, self.checkpoints = rule, checkpoints
        each = (len(MEASURES), sets, 1 + rule.bootstrap)
        self.m = np.full((len(MEASURES), sets, checkpoints), np.nan, np.float32)
        self.baseline = np.full((checkpoints, len(MEASURES)), np.nan)
        self._final = np.full(each, np.nan, np.float32)
        self._first = np.full(each, checkpoints, np.int16)

    def update(self, t: int, sets: np.ndarray, m: np.ndarray) -> None:
        """Progress of these sets at checkpoint t, [measures, len(sets), 1 + repeats] float32, as `pair_weights` orders it. Checkpoints come from the last
        to the first.
        """
        self.m[:, sets, t] = m[..., 0]
        if t == self.checkpoints - 1:
            self._final[:, sets] = m
            self._first[:, sets] = t
            return
        first = self._first[:, sets]
        stays = (first == t + 1) & (m >= self.rule.share * self._final[:, sets].astype(np.float64))
        self._first[:, sets] = np.where(stays, t, first)

    def found(self) -> Found:
        """With the interval that holds LEVEL of the resamples: its ends are checkpoints at which one formed (rounded outwards)."""
        # A final M of 0 or less is no progress, whatever the rule allows.
        formed = (self._final >= self.rule.smallest_m) & (self._final > 0)
        first = np.where(formed, self._first, self.checkpoints).astype(np.int16)
        last, edge = self.rule.bootstrap - 1, (1 - LEVEL) / 2
        low, high = int(np.floor(edge * last)), int(np.ceil((1 - edge) * last))
        resampled = np.partition(first[..., 1:], (low, high), axis=-1)
        unformed = (first[..., 1:] == self.checkpoints).mean(-1)
        return Found(first[..., 0], resampled[..., low], resampled[..., high], unformed)

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._arrays().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, array in self._arrays().items():
            array[...] = state[name].numpy()

    def _arrays(self) -> dict[str, Any]:
        return {"m": self.m, "baseline": self.baseline, "final": self._final, "first": self._first}
