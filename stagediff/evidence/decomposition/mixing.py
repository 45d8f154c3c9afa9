"""The decomposition step: how far the four groups of the scatter mix when only one path is seen (P1, "Decomposition"; method.md, section 2).

The groups are the quadrants of the run's cut, frozen. A view is a pair of axes: both paths (x, y); the data path alone (x, cos(S, D)), which are the two
moves that lead from S over D to F; the model path alone (y, cos(S, M)). In each view the lower-left group is asked for:

- AUROC of the group against all others, and against each other group, when a feature's rank is the sum of the view's two cosines (low first), with
  percentile intervals from a bootstrap in which each group keeps its size;
- the share that stays separable: how many of the group's features lie below every quantile but the lowest 1 % of the others' sums (that many of the
  group are found at a false positive rate of 1 %).

The neighbour that the group mixes with is the upper left along the data path (y, which tells them apart, is not seen) and the lower right along the
model path. Against all others the group looks separable in every view, since nearly all of them turned on neither axis.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.cuts import QUADRANTS
from stagediff.diff.enrichment import carries_new_data
from stagediff.diff.ranking import auroc
from stagediff.evidence.decomposition.spec import DecompositionSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "VIEWS", "compute", "mixing", "separable"]

VIEWS = {"both": ("x", "y"), "data_path": ("x", "cos_s_d"), "model_path": ("cos_s_m", "y")}
"""View -> the columns of the diff's table that are its axes, horizontal one first."""
GROUP = "lower_left"
FALSE_POSITIVES = 0.01
LEVEL = 0.95

COLUMNS = {
    "view": ("name", "both: x and y; data_path: x and cos(S, D); model_path: y and cos(S, M)"),
    "group": ("name", "the quadrant of the run's cut that is to be told apart; carriers: alive features that carry the new data"),
    "against": ("name", "others: all other alive features; or one quadrant"),
    "features": ("features", "size of the group"),
    "others": ("features", "size of what it is told apart from"),
    "auroc": (
        "probability",
        "that a feature of the group has a lower sum of the view's two cosines (0.5: mixed; empty: a side has no features)",
    ),
    "low": ("probability", "lower end of the 95 % bootstrap interval of auroc"),
    "high": ("probability", "upper end"),
    "separable": ("share", "of the group, below the lowest 1 % of the others' sums"),
}


def compute(spec: DecompositionSpec, job: "Job") -> dict[str, Any]:
    """Writes mixing.parquet (COLUMNS). Figures: the lower-left group in each view, against all others and against the neighbour it mixes with there."""
    began = time.monotonic()
    features = job.artifact(spec.diff).read_table("features.parquet")
    table = mixing(features, spec.draws, spec.seed)
    job.writer.write_table("mixing.parquet", table, columns=COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    figures: dict[str, Any] = {}
    for row in table[table.group == GROUP].itertuples(index=False):
        figures["features"] = int(row.features)
        suffix = "" if row.against == "others" else f"_{row.against}"
        for name in ("auroc", "low", "high", "separable"):
            value = getattr(row, name)
            figures[f"{name}_{row.view}{suffix}"] = float(value) if np.isfinite(value) else None
    return figures


def mixing(features: pd.DataFrame, draws: int, seed: int) -> pd.DataFrame:
    """A row per view, group and what it is told apart from (COLUMNS); `features` is a diff's features.parquet."""
    rows: list[tuple[Any, ...]] = []
    quadrant = features.quadrant.to_numpy(object)
    alive = quadrant != ""
    for view, axes in VIEWS.items():
        value = sum(features[name].to_numpy(float) for name in axes)
        able = alive & np.isfinite(value)
        for group, against, mine, other in _comparisons(quadrant, carries_new_data(features)):
            a, b = value[able & mine], value[able & other]
            rng = np.random.default_rng((seed, len(rows)))
            low, high = _interval(a, b, draws, rng)
            rows.append((view, group, against, len(a), len(b), _auroc(a, b), low, high, separable(a, b)))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"auroc": float, "low": float, "high": float, "separable": float})


def separable(group: np.ndarray, others: np.ndarray) -> float:
    """Share of `group` [n] below the lowest 1 % of `others` [m]; NaN where either is empty."""
    if not len(group) or not len(others):
        return float("nan")
    return float((group < np.quantile(others, FALSE_POSITIVES)).mean())


def _comparisons(quadrant: np.ndarray, carriers: np.ndarray) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    for group in QUADRANTS:
        yield group, "others", quadrant == group, quadrant != group
    for other in QUADRANTS:
        if other != GROUP:
            yield GROUP, other, quadrant == GROUP, quadrant == other
    yield "carriers", "others", carriers, ~carriers


def _auroc(a: np.ndarray, b: np.ndarray) -> float:
    value = auroc(np.r_[np.ones(len(a), bool), np.zeros(len(b), bool)], -np.r_[a, b])
    return float("nan") if value is None else value


def _interval(a: np.ndarray, b: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[float, float]:
    """Percentile interval of the AUROC. Both groups are drawn again with replacement, as counts over their ranks: O(n) per draw, nothing draws x n."""
    if not len(a) or not len(b):
        return float("nan"), float("nan")
    both, place = np.unique(np.r_[a, b], return_inverse=True)
    of_a, of_b = (np.bincount(part, minlength=len(both)) for part in (place[: len(a)], place[len(a) :]))
    found = np.empty(draws)
    for i in range(draws):
        mine, other = rng.multinomial(len(a), of_a / len(a)), rng.multinomial(len(b), of_b / len(b))
        above = len(b) - np.cumsum(other)  # the others with a larger value than each one
        found[i] = (mine * (above + other / 2)).sum() / (len(a) * len(b))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
