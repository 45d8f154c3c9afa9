"""Which features a labeller is asked about, and in which order: neither tells it to which group a feature belongs."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stagediff.diff.cuts import random_sample
from stagediff.evidence.labels.spec import LabelsSpec

__all__ = ["GROUPS", "Choice", "choose"]

GROUPS = ("selected", "born", "random")


@dataclass(frozen=True)
class Choice:
    """Features in the order in which they are asked about; all arrays [n]."""

    feature: np.ndarray
    selected: np.ndarray
    born: np.ndarray
    random: np.ndarray
    """A feature may be in several groups: random ones are drawn from all alive ones."""

    def groups(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in GROUPS}

    def first_group(self) -> np.ndarray:
        """[n] str: the first of GROUPS that each is in."""
        return np.select([self.selected, self.born, self.random], list(GROUPS), default="")


def choose(features: pd.DataFrame, spec: LabelsSpec) -> Choice:
    """From a diff's table (columns feature, score, alive, alive_F_D, born, selected).

    Selected: those with the lowest score, `spec.most` of them. Born: those that are alive in F via D, whose examples are shown; `spec.most` of them, drawn
    at random. Random: the diff's own draw of alive features, `spec.random` of them, where the seed is the diff's.
    """
    n = len(features)
    chosen = np.zeros((len(GROUPS), n), bool)
    order = features[features.selected.to_numpy(bool)].sort_values(["score", "feature"]).feature.to_numpy()
    chosen[0, order[: spec.most]] = True
    chosen[1] = random_sample(features.born.to_numpy(bool) & features.alive_F_D.to_numpy(bool), spec.most, spec.seed)
    chosen[2] = random_sample(features.alive.to_numpy(bool), spec.random, spec.seed)
    feature = np.random.default_rng([spec.seed, 1]).permutation(np.flatnonzero(chosen.any(0)))
    return Choice(feature, *(mask[feature] for mask in chosen))
