"""Which features carry examples in the report, and how many each: the selected, the extreme and a random sample.

A page cannot hold examples of every feature, nor twenty of each of 26,000 selected ones (a 10 % cut at F = 262,144), so the number is bounded: the first
`FULL` selected features, the extreme and the random ones have all their examples; what is left of the bound is shared out among the other selected
features, at least one each, in the order of their score.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["Choice", "choose"]

FULL = 2000
"""Selected features, lowest score first, that show all their examples."""
MOST_EXAMPLES = 90_000
"""In the whole page: 132 bytes each, 16 MB as base64."""


@dataclass(frozen=True)
class Choice:
    """Features with examples, ascending, all arrays [n]."""

    feature: np.ndarray
    count: np.ndarray
    """How many of its examples are shown at most."""
    extreme: np.ndarray
    random: np.ndarray

    @property
    def full(self) -> np.ndarray:
        """The features that show everything, histograms included."""
        return self.feature[self.count == self.count.max(initial=0)]


def choose(features: pd.DataFrame, examples: int, seed: int, top: int = 20, most: int = MOST_EXAMPLES) -> Choice:
    """Chooses from the diff's table (columns feature, x, y, score, alive, selected).

    Extreme: of the alive features half of `examples` with the lowest score, a quarter each with the lowest x and the lowest y (what moved along one
    path only). Random: `examples` alive features, seeded, drawn from all alive ones.
    """
    alive = features[features["alive"].to_numpy(bool) & features["score"].notna().to_numpy()]
    selected = features.loc[features["selected"].to_numpy(bool)].sort_values(["score", "feature"])["feature"].to_numpy()
    quarter = examples // 4
    extreme = np.concatenate([_lowest(alive, "score", examples - 2 * quarter), _lowest(alive, "x", quarter), _lowest(alive, "y", quarter)])
    ids = np.sort(alive["feature"].to_numpy())
    random = np.random.default_rng(seed).choice(ids, size=min(examples, len(ids)), replace=False) if len(ids) else ids
    full = np.unique(np.concatenate([selected[:FULL], extreme, random])).astype(np.int64)
    full = full[: most // top]
    rest = np.setdiff1d(selected[FULL:], full, assume_unique=True)
    left = most - top * len(full)
    each = int(np.clip(left // max(len(rest), 1), 1, top))
    in_order = selected[FULL:][np.isin(selected[FULL:], rest)][: left // each]
    chosen = np.concatenate([full, in_order])
    counts = np.concatenate([np.full(len(full), top), np.full(len(in_order), each)])
    order = np.argsort(chosen)
    chosen, counts = chosen[order], counts[order]
    return Choice(chosen, counts, np.isin(chosen, extreme), np.isin(chosen, random))


def _lowest(table: pd.DataFrame, column: str, n: int) -> np.ndarray:
    return table.sort_values([column, "feature"])["feature"].to_numpy()[:n]
