"""The datapoints of all features as sets of positions, and how to take them a block at a time.

A set is one feature's datapoints of one of SETS, named by a number: index in SETS x features + feature.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from stagediff.track.probe import Probe
from stagediff.track.spec import SETS

__all__ = ["Datapoints"]


class Datapoints:
    """`size` [sets]: how many datapoints a set has; maybe none."""

    def __init__(self, table: pd.DataFrame, probe: Probe, features: int):
        """`table`: columns feature, set, rank, row, position, in any order."""
        self.features, self.sets = features, len(SETS) * features
        which = pd.Categorical(table["set"], categories=SETS).codes.astype(np.int64)
        of = which * features + table["feature"].to_numpy(np.int64)
        order = np.lexsort((table["rank"].to_numpy(), of))
        self._at = probe.flat(table["row"].to_numpy(), table["position"].to_numpy())[order]
        self.size = np.bincount(of, minlength=self.sets)
        self._start = np.cumsum(self.size) - self.size

    def at(self, sets: np.ndarray) -> np.ndarray:
        """[len(sets), n] flat places of sets that have n datapoints each."""
        return self._at[self._start[sets][:, None] + np.arange(self.size[sets[0]])]

    def blocks(self, positions: int, at_once: int) -> Iterator[list[np.ndarray]]:
        """All sets that have a pair of datapoints, in blocks of at most `positions` datapoints (one set at least).

        A block is a list of groups: sets of one size, with at most `at_once` datapoints together (one set at least). The sets of a feature lie together,
        for they share positions.
        """
        block: list[np.ndarray] = []
        room = positions
        for n in np.unique(self.size[self.size > 1]).tolist():
            sets = np.flatnonzero(self.size == n)
            sets = sets[np.argsort(sets % self.features, kind="stable")]
            each = max(1, min(at_once, positions) // n)
            for begin in range(0, len(sets), each):
                group = sets[begin : begin + each]
                if block and len(group) * n > room:
                    yield block
                    block, room = [], positions
                block.append(group)
                room -= len(group) * n
        if block:
            yield block
