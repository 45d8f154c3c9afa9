"""Does a feature's decoder move less once the feature has formed? (arXiv 2412.17626, section on feature drift.)

Drift into a checkpoint is 1 - cos_previous there, counted only where the feature is alive at both ends: dead features do not move, and an index
that was resampled in between holds another feature. Two comparisons, since late in training everything moves less:

- within a feature, before against after: mean drift into the checkpoints before its formation step, and into those from it on. The move into the
  formation step itself counts as "after", which speaks against the claim, not for it;
- at the same step: features that have formed by then against those that form later.

Beside both stands the null: how far the following recipe moves the same feature while the model stands still. Medians over features, with
percentile intervals of the bootstrap over features.
"""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.track.bootstrap import Median, interval, resamples

__all__ = ["BEFORE_AFTER_COLUMNS", "SAME_STEP_COLUMNS", "before_after", "headline", "same_step"]

BOOTSTRAP = 200
FEWEST = 5
"""Features that each group must have for a step to count in the comparison at the same step."""

BEFORE_AFTER_COLUMNS = {
    "feature": ("index", "feature of the chain"),
    "drift_before": ("1 - cosine", "mean 1 - cos_previous over the checkpoints before formation, where alive there and at the one before"),
    "drift_after": ("1 - cosine", "the same from the formation step on (the move into that step included)"),
    "null": ("1 - cosine", "mean 1 - cos_previous over the null's repeats, where alive at the frozen checkpoint"),
    "reason": ("", "why drift_before or drift_after is empty"),
}
SAME_STEP_COLUMNS = {
    "step": ("steps", "checkpoint into which features moved"),
    "formed": ("features", "that have formed by this step, alive here and at the checkpoint before"),
    "unformed": ("features", "that form at a later step, alive here and at the checkpoint before"),
    "drift_formed": ("1 - cosine", "their median 1 - cos_previous"),
    "drift_unformed": ("1 - cosine", "their median 1 - cos_previous"),
    "difference": ("1 - cosine", "drift_formed - drift_unformed: below 0, formed features move less"),
    "low": ("1 - cosine", "of the difference, 90 % bootstrap interval over features"),
    "high": ("1 - cosine", "of the difference, 90 % bootstrap interval over features"),
}


def before_after(drift: np.ndarray, steps: np.ndarray, formed_step: np.ndarray, null: np.ndarray) -> pd.DataFrame:
    """One row per feature (BEFORE_AFTER_COLUMNS).

    drift: [F, T] 1 - cos_previous, NaN where it does not count (the first checkpoint, dead at either end). steps: [T] ascending.
    formed_step: [F], NaN where never. null: [F], NaN where there is none.
    """
    after = steps >= formed_step[:, None]
    before = steps < formed_step[:, None]
    early, late = _mean_over(drift, before), _mean_over(drift, after)
    never = np.isnan(formed_step)
    no_move_before = ~never & ~before[:, 1:].any(1)
    reason = np.full(len(drift), None, object)
    reason[np.isnan(late) & ~never] = "dead after formation"
    reason[np.isnan(early) & ~never] = "dead before formation"
    reason[no_move_before] = "formed by the second checkpoint: no move before"
    reason[never] = "never formed"
    columns = (np.arange(len(drift), dtype=np.int32), early, late, null, reason)
    return pd.DataFrame(dict(zip(BEFORE_AFTER_COLUMNS, columns, strict=True)))


def headline(table: pd.DataFrame, seed: int) -> dict[str, float | int | None]:
    """Medians over features, each with `_low` and `_high`.

    drift_before, drift_after, drift_change (after - before, feature by feature): over the `features_compared` that have both.
    drift_smaller_after: the share of these with drift_after < drift_before. drift_null: over all features with a null.
    drift_after_above_null: drift_after - null, feature by feature, over those compared that have a null.
    """
    before, after, null = (table[name].to_numpy(float) for name in ("drift_before", "drift_after", "null"))
    both = np.isfinite(before) & np.isfinite(after)
    figures: dict[str, float | int | None] = {"features_compared": int(both.sum())}
    compared = {
        "drift_before": before[both],
        "drift_after": after[both],
        "drift_change": after[both] - before[both],
        "drift_after_above_null": after[both] - null[both],
    }
    figures |= _medians(compared, seed) | _medians({"drift_null": null}, seed)
    figures["drift_smaller_after"] = float((after[both] < before[both]).mean()) if both.any() else None
    return figures


def same_step(drift: np.ndarray, steps: np.ndarray, formed_step: np.ndarray, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Formed against not yet formed at each step (arguments as in `before_after`): the table (SAME_STEP_COLUMNS), and key figures.

    same_step_difference: mean over the steps where both groups have FEWEST features of the difference in medians, with its interval.
    Features that never form are in neither group.
    """
    formed, unformed = steps >= formed_step[:, None], steps < formed_step[:, None]
    groups = [(np.where(formed[:, t], drift[:, t], np.nan), np.where(unformed[:, t], drift[:, t], np.nan)) for t in range(1, len(steps))]
    sizes = np.array([[np.isfinite(g).sum() for g in pair] for pair in groups])
    medians = [(Median(a), Median(b)) for a, b in groups]
    observed = np.array([[m.of(np.ones((1, len(drift)), np.int32))[0] for m in pair] for pair in medians])
    enough = (sizes >= FEWEST).all(1)
    samples = np.full((BOOTSTRAP, len(medians)), np.nan)
    done = 0
    for counts in resamples(len(drift), BOOTSTRAP, seed) if enough.any() else ():
        for i in np.flatnonzero(enough):
            samples[done : done + len(counts), i] = medians[i][0].of(counts) - medians[i][1].of(counts)
        done += len(counts)
    low, high = interval(samples)
    difference = np.where(enough, observed[:, 0] - observed[:, 1], np.nan)
    columns = (steps[1:], sizes[:, 0], sizes[:, 1], observed[:, 0], observed[:, 1], difference, low, high)
    table = pd.DataFrame(dict(zip(SAME_STEP_COLUMNS, columns, strict=True)))
    figures: dict[str, Any] = {"same_step_steps": int(enough.sum())}
    names = ("same_step_difference", "same_step_difference_low", "same_step_difference_high")
    if not enough.any():
        return table, figures | dict.fromkeys(names)
    mean_low, mean_high = interval(samples[:, enough].mean(1))
    return table, figures | dict(zip(names, map(float, (difference[enough].mean(), mean_low, mean_high)), strict=True))


def _mean_over(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[F] means of values [F, T] over what is marked and not NaN; NaN where nothing is."""
    counted = where & np.isfinite(values)
    n = counted.sum(1)
    return np.where(n > 0, np.where(counted, values, 0.0).sum(1) / np.maximum(n, 1), np.nan)


def _medians(columns: dict[str, np.ndarray], seed: int) -> dict[str, float | int | None]:
    """name, name_low, name_high of the median of every column; all columns are resampled together. None where a column has no values."""
    size = len(next(iter(columns.values())))
    medians = {name: Median(values) for name, values in columns.items()}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for counts in resamples(size, BOOTSTRAP, seed) if size else ():
        for name, median in medians.items():
            samples[name].append(median.of(counts))
    figures: dict[str, float | int | None] = {}
    for name, values in columns.items():
        if np.isfinite(values).any():
            low, high = interval(np.concatenate(samples[name]))
            figures |= {name: float(np.nanmedian(values)), f"{name}_low": float(low), f"{name}_high": float(high)}
        else:
            figures |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    return figures
