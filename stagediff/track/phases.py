"""The phases step: where training changes its character, from the shares of feature kinds and the drift of features at every checkpoint.

arXiv 2412.17626 reads three phases off its figures by eye. Here they are change points (`stagediff.track.changepoints`) of five series, with
intervals from the bootstrap over features, on three axes: a boundary that moves from axis to axis is made by the choice of checkpoints.

- token, concept, noise: shares of the features that are alive and have a kind; dead: share of all features (as in the kinds step).
- drift: median 1 - cos_previous over features alive here and at the checkpoint before. The first checkpoint has none: it takes no part in
  drift's share of the cost, and counts with its other four series.

`gain` needs company, since every series can be cut: `gain_shuffled` is what the same values give in random order, `gain_trend` what a straight line
gives. Phases show where the gain lies above both.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.errors import UserError
from stagediff.track.bootstrap import LEVEL, Median, interval, resamples
from stagediff.track.changepoints import AXES, SHORTEST, axis_weights, segment, shuffled_gain, trend_gain
from stagediff.track.spec import KINDS, PhasesSpec

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.steps import Job

__all__ = ["SERIES", "compute", "resampled_series"]

SERIES = (*KINDS, "drift")
DEAD = KINDS.index("dead")
UNCLEAR = -1

SERIES_COLUMNS = {
    "step": ("steps", "training step of the model"),
    "series": ("name", "token, concept, noise, dead, drift"),
    "value": (
        "share; drift: 1 - cosine",
        "kinds: of alive features with a kind; dead: of all; drift: median over features alive here and before",
    ),
    "low": ("share; drift: 1 - cosine", "90 % bootstrap interval over features"),
    "high": ("share; drift: 1 - cosine", "90 % bootstrap interval over features"),
    "reason": ("", "why the value is empty"),
}
PHASE_COLUMNS = {
    "axis": (
        "name",
        "what a checkpoint weighs: index: all the same; step, log_step: the stretch of training steps, of log(step + 1), around it",
    ),
    "boundary": ("index", "1 is the earliest"),
    "at_step": ("steps", "first checkpoint of the later phase"),
    "low": ("steps", "90 % bootstrap interval over features, widened to at_step where that lies outside"),
    "high": ("steps", "90 % bootstrap interval over features, widened to at_step where that lies outside"),
    "gain": ("share", "of the variation that one phase fewer leaves, what this number of phases explains"),
    "gain_shuffled": ("share", "95 % quantile of the gain of the same values in random order"),
    "gain_trend": ("share", "gain of a straight line along the axis: a steady change without phases"),
    "reason": ("", "why there is no boundary"),
}


def compute(spec: PhasesSpec, job: "Job") -> dict[str, Any]:
    """Writes series.parquet and phases.parquet. Raises UserError where kinds or drift come from other checkpoints or another chain."""
    began = time.monotonic()
    steps = np.array([p.step for p in spec.points], np.int64)
    kinds, drift = _kinds(job, spec.kinds, steps), _drift(job, spec.drift, steps)
    if len(kinds) != len(drift):
        raise UserError(
            f"The kinds {spec.kinds} have {len(kinds)} features, the drift {spec.drift} has {len(drift)}: they come from different chains. "
            "Compute both on the same points."
        )
    repeats = spec.rule.bootstrap
    everyone = np.ones((1, len(kinds)), np.int32)
    observed = next(resampled_series(kinds, drift, iter([everyone])))[0]
    samples = []
    with job.progress.task("resamples", repeats, "series") as task:
        for part in resampled_series(kinds, drift, resamples(len(kinds), repeats, spec.seed)):
            samples.append(part)
            task.advance(len(part))
    resampled = np.concatenate(samples)
    table = _phases(spec, steps, observed, resampled)
    job.writer.write_table("series.parquet", _series(steps, observed, resampled), columns=SERIES_COLUMNS)
    job.writer.write_table("phases.parquet", table, columns=PHASE_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(table, steps, len(kinds))


def resampled_series(kinds: np.ndarray, drift: np.ndarray, resampled: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The series of every resample, [b, T, 5] in the order of SERIES for each [b, F] counts; NaN where no feature counts.

    kinds: [F, T] codes into KINDS, UNCLEAR for none. drift: [F, T] 1 - cos_previous, NaN where it does not count.
    """
    T = kinds.shape[1]
    medians = [Median(drift[:, t]) for t in range(T)]
    for counts in resampled:
        out = np.empty((len(counts), T, len(SERIES)))
        drawn = counts.astype(np.float64)
        for t in range(T):
            of_kind = drawn @ (kinds[:, t, None] == np.arange(len(KINDS))).astype(np.float64)
            alive = of_kind[:, :DEAD].sum(1, keepdims=True)
            out[:, t, :DEAD] = np.divide(of_kind[:, :DEAD], alive, out=np.full((len(counts), DEAD), np.nan), where=alive > 0)
            out[:, t, DEAD] = of_kind[:, DEAD] / counts.shape[1]
            out[:, t, -1] = medians[t].of(counts)
        yield out


def _phases(spec: PhasesSpec, steps: np.ndarray, observed: np.ndarray, resampled: np.ndarray) -> pd.DataFrame:
    n = spec.rule.phases
    boundaries = list(range(1, n))
    if len(steps) < SHORTEST * n:
        reason = f"{len(steps)} checkpoints are too few for {n} phases: at least {SHORTEST * n} are needed"
        return _table([_nothing(axis, b, reason) for axis in AXES for b in boundaries])
    rows = []
    for axis in AXES:
        weights = axis_weights(steps, axis)
        best = segment(observed, weights, n)
        if np.isnan(best.gain):
            rows += [_nothing(axis, b, "no series changes over the checkpoints") for b in boundaries]
            continue
        starts = np.array([segment(series, weights, n).starts for series in resampled])
        low, high = np.quantile(steps[starts], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="inverted_cdf")
        shuffled = shuffled_gain(observed, weights, n, spec.rule.bootstrap, spec.seed)
        trend = trend_gain(steps, axis, n)
        for b, at, lo, hi in zip(boundaries, steps[list(best.starts)], low, high, strict=True):
            rows.append((axis, b, int(at), min(int(lo), int(at)), max(int(hi), int(at)), best.gain, shuffled, trend, None))
    return _table(rows)


def _nothing(axis: str, boundary: int, reason: str) -> tuple[Any, ...]:
    return (axis, boundary, None, None, None, np.nan, np.nan, np.nan, reason)


def _table(rows: list[tuple[Any, ...]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(PHASE_COLUMNS)).astype(dict.fromkeys(("at_step", "low", "high"), "Int64"))


def _series(steps: np.ndarray, observed: np.ndarray, resampled: np.ndarray) -> pd.DataFrame:
    low, high = interval(resampled)
    reason = np.full(observed.shape, None, object)
    missing = np.isnan(observed)
    reason[missing] = "no feature is alive with a kind"
    reason[missing[:, -1], -1] = "no feature is alive here and at the checkpoint before"
    reason[0, -1] = "the first checkpoint has none before it"
    names = np.tile(np.array(SERIES, object), len(steps))
    columns = (np.repeat(steps, len(SERIES)), names, observed.ravel(), low.ravel(), high.ravel(), reason.ravel())
    return pd.DataFrame(dict(zip(SERIES_COLUMNS, columns, strict=True)))


def _figures(table: pd.DataFrame, steps: np.ndarray, features: int) -> dict[str, Any]:
    """Boundaries of each axis, and how far the axes are apart."""
    figures: dict[str, Any] = {"features": features, "checkpoints": len(steps)}
    known = table[table.at_step.notna()]
    if known.empty:
        return figures | {"reason": str(table.reason.iloc[0])}
    for r in known.itertuples(index=False):
        name = f"{r.axis}_{r.boundary}"
        figures |= {name: int(r.at_step), f"{name}_low": int(r.low), f"{name}_high": int(r.high)}
        figures |= {f"{r.axis}_{gain}": float(getattr(r, gain)) for gain in ("gain", "gain_shuffled", "gain_trend")}
    places = np.searchsorted(steps, known.at_step.to_numpy(np.int64)).reshape(-1, known.boundary.nunique())
    figures["checkpoints_between_axes"] = int((places.max(0) - places.min(0)).max())
    return figures


# Reading


def _kinds(job: "Job", ref: "Ref", steps: np.ndarray) -> np.ndarray:
    """[F, T] int8 codes into KINDS; UNCLEAR where no kind was given."""
    table = job.artifact(ref).read_table("kinds.parquet", columns=["feature", "step", "kind"])
    codes = pd.Categorical(table["kind"], categories=list(KINDS)).codes
    return _grid(table, steps, codes.astype(np.int8), np.int8(UNCLEAR), "kinds", ref)


def _drift(job: "Job", ref: "Ref", steps: np.ndarray) -> np.ndarray:
    """[F, T] 1 - cos_previous where alive here and at the checkpoint before; NaN elsewhere."""
    table = job.artifact(ref).read_table("features.parquet", columns=["feature", "step", "cos_previous", "alive"])
    alive = _grid(table, steps, table["alive"].to_numpy(bool), False, "drift", ref)
    drift = _grid(table, steps, 1 - table["cos_previous"].to_numpy(float), np.nan, "drift", ref)
    both = alive.copy()
    both[:, 1:] &= alive[:, :-1]
    return np.where(both, drift, np.nan)


def _grid(table: pd.DataFrame, steps: np.ndarray, values: np.ndarray, missing: Any, what: str, ref: "Ref") -> np.ndarray:
    """[F, T] of a column in long form."""
    feature, step = table["feature"].to_numpy(np.int64), table["step"].to_numpy(np.int64)
    found = np.unique(step)
    if not np.array_equal(found, steps):
        raise UserError(
            f"The {what} {ref} are of the checkpoints {found.tolist()}, the phases are asked for {steps.tolist()}. Compute {what} on the same points."
        )
    grid = np.full((feature.max() + 1, len(steps)), missing, dtype=values.dtype)
    grid[feature, np.searchsorted(steps, step)] = values
    return grid
