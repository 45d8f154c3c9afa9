"""Which features are selected: the cut in the plane of x and y, its quadrants, and the random sample that a selection is compared with.

Only alive features take part: dead ones do not move, and their cosines of 1 would shift every quantile (method.md, section 6).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stagediff.diff.calibration import reach
from stagediff.diff.spec import Cut
from stagediff.errors import UserError

__all__ = ["QUADRANTS", "Selection", "check_reach", "lowest", "random_sample", "select"]

QUADRANTS = ("lower_left", "lower_right", "upper_left", "upper_right")
"""x is the horizontal axis, "low" is below the cut: lower_left moved on both paths, upper_left only by the model (x), lower_right only by the data (y)."""


@dataclass(frozen=True)
class Selection:
    """Outcome of a cut over F features."""

    selected: np.ndarray
    """[F] bool."""
    quadrant: np.ndarray
    """[F] str: one of QUADRANTS, "" for features that are not alive."""
    x: float | None
    """Low in x means: at or below this (quantile), below this (absolute). None: no feature is alive, or p_x decides (fdr)."""
    y: float | None
    score: float | None
    """Largest x + y that is selected, for the quantile cut; None for the others."""


def select(x: np.ndarray, y: np.ndarray, alive: np.ndarray, cut: Cut, null: pd.DataFrame | None = None) -> Selection:
    """Applies `cut` to `x`, `y` [F] among the features that are `alive` [F] and have a defined x and y.

    absolute: selected are x < value and y < value, which is the lower left quadrant. quantile: selected is the lowest share `value` of the alive
    features by x + y, at least one; the quadrants take the lowest share `value` along each axis by itself, so that the lower left one is not the
    selection. fdr: selected are q <= value, with p_x, p_y, p and q in `null` (the retrain null's, a row per feature); low along an axis is a p there of
    at most the largest selected p, so that the lower left is the selection.
    """
    alive = alive & np.isfinite(x) & np.isfinite(y)
    if not alive.any():
        return Selection(np.zeros(len(x), bool), np.full(len(x), "", object), None, None, None)
    if cut.kind == "absolute":
        x_low, y_low = alive & (x < cut.value), alive & (y < cut.value)
        return Selection(x_low & y_low, _quadrants(x_low, y_low, alive), cut.value, cut.value, None)
    if cut.kind == "fdr":
        assert null is not None
        p, q = null.p.to_numpy(float), null.q.to_numpy(float)
        selected = alive & (np.nan_to_num(q, nan=1.0) <= cut.value)
        largest = p[selected].max() if selected.any() else -1.0
        x_low, y_low = (alive & (null[name].to_numpy(float) <= largest) for name in ("p_x", "p_y"))
        return Selection(selected, _quadrants(x_low, y_low, alive), None, None, None)
    count = max(1, int(cut.value * alive.sum() + 1e-9))
    selected, x_low, y_low = (lowest(v, alive, count) for v in (x + y, x, y))
    bounds = (float(v[chosen].max()) for v, chosen in ((x, x_low), (y, y_low), (x + y, selected)))
    return Selection(selected, _quadrants(x_low, y_low, alive), *bounds)


def check_reach(null_values: int, features: int, level: float) -> None:
    """Raises UserError where a false discovery rate of `level` over so many features cannot be reached with so many null values per axis."""
    can = reach(null_values, features, level)
    if not can.is_enough:
        raise UserError(
            f"The cut fdr of {level:g} cannot be reached: with {null_values:,} null values the smallest p is {can.smallest_p:.2g}, so of {features:,} alive "
            f"features at least {can.together:,} would have to lie beyond every null value at once, more than the lowest 1 % (at least 10) that may be "
            "meant. Raise evidence.null_seeds or diff.cut.value, or cut by quantile."
        )


def lowest(value: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """[F] bool: the `count` features of `among` with the smallest `value`; of equal ones the smaller index."""
    candidates = np.flatnonzero(among)
    chosen = candidates[np.argsort(value[candidates], kind="stable")[:count]]
    mask = np.zeros(len(value), bool)
    mask[chosen] = True
    return mask


def random_sample(alive: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[F] bool: `count` alive features drawn without replacement (all of them where there are fewer)."""
    candidates = np.flatnonzero(alive)
    mask = np.zeros(len(alive), bool)
    mask[np.random.default_rng(seed).permutation(candidates)[:count]] = True
    return mask


def _quadrants(x_low: np.ndarray, y_low: np.ndarray, alive: np.ndarray) -> np.ndarray:
    names = np.where(y_low, np.where(x_low, "lower_left", "lower_right"), np.where(x_low, "upper_left", "upper_right"))
    return np.where(alive, names, "").astype(object)
