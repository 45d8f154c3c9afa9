"""What the figures about the whole run show, as plain values per checkpoint: small, so that they go into the page as JSON.

Numbers are rounded to five digits. Every function returns None where the run lacks the step it is about.
"""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.track.bootstrap import Median, interval, resamples
from stagediff.track.section.run import NONE, TrackRun
from stagediff.track.spec import KINDS, MEASURES, PATTERNS, SETS, DriftSpec

__all__ = [
    "GAINS",
    "HOWS",
    "agreement",
    "cosines",
    "drift_histograms",
    "efficiency",
    "formation_times",
    "phases",
    "progress",
    "same_step",
    "summarise",
    "turns",
]

HOWS = ("chained", "scratch_full", "scratch_short")
GAINS = ("gain", "gain_shuffled", "gain_trend")
QUARTILES = (0.25, 0.5, 0.75)
BOOTSTRAP = 200


def summarise(run: TrackRun) -> dict[str, Any]:
    """All of them by name."""
    parts = {
        "efficiency": efficiency(run),
        "shares": shares(run),
        "phases": phases(run),
        "counts": counts(run),
        "progress": progress(run),
        "baseline": baseline(run),
        "formed": formation_times(run),
        "agreement": agreement(run),
        "histograms": drift_histograms(run),
        "cosines": cosines(run),
        "null": null_band(run),
        "turns": turns(run),
        "same_step": same_step(run),
    }
    return {name: part for name, part in parts.items() if part is not None}


def efficiency(run: TrackRun) -> dict[str, Any] | None:
    """`quality`: how -> column -> values at its checkpoints (`at`: their indices); `compared`: rows of the compared table."""
    table, compared = run.table("efficiency", "quality"), run.table("efficiency", "compared")
    if table is None or table.empty:
        return None
    quality = {}
    for how in HOWS:
        part = table[table["how"] == how].sort_values("step")
        if not part.empty:
            numbers = {n: short(part[n]) for n in ("tokens", "explained_variance", "l0", "dead", "loss_recovered", "revived") if n in part}
            quality[how] = {"at": _at(run, part["step"]), **numbers}
    rows = [] if compared is None else [{n: _plain(v) for n, v in r.items()} for r in compared.to_dict("records")]
    return {"quality": quality, "compared": rows}


def shares(run: TrackRun) -> dict[str, Any] | None:
    """Features of each kind per checkpoint, and of none ("unclear": too few examples)."""
    if run.kind is None:
        return None
    found = {name: (run.kind == code).sum(0).tolist() for code, name in enumerate(KINDS)}
    return {**found, "unclear": (run.kind == NONE).sum(0).tolist()}


def phases(run: TrackRun) -> dict[str, Any] | None:
    """`boundaries`: axis -> list of {at, low, high} (checkpoint indices); `gains`: axis -> {gain, gain_shuffled, gain_trend}; `series`: name -> {at, value,
    low, high}; `reason`: why there are no boundaries, or None.
    """
    table, series = run.table("phases", "phases"), run.table("phases", "series")
    if table is None or series is None:
        return None
    boundaries: dict[str, list[dict[str, Any]]] = {}
    for r in table.sort_values(["axis", "boundary"]).itertuples(index=False):
        row = {name: _index(run, getattr(r, column)) for name, column in (("at", "at_step"), ("low", "low"), ("high", "high"))}
        if row["at"] is not None:
            boundaries.setdefault(str(r.axis), []).append(row)
    curves = {}
    for name, part in series.groupby("series", sort=False, observed=True):
        part = part.sort_values("step")
        curves[str(name)] = {"at": _at(run, part["step"]), **{n: short(part[n]) for n in ("value", "low", "high")}}
    names = [n for n in GAINS if n in table]
    gains = {str(axis): {n: _plain(part[n].iloc[0]) for n in names} for axis, part in table.groupby("axis", sort=False, observed=True)}
    reasons = table["reason"].dropna().tolist() if "reason" in table else []
    return {"boundaries": boundaries, "gains": gains, "series": curves, "reason": str(reasons[0]) if reasons else None}


def counts(run: TrackRun) -> dict[str, Any] | None:
    """pattern -> features that went through it on the way to each checkpoint (0 at the first)."""
    table = run.table("patterns", "counts")
    if table is None:
        return None
    found = {name: [0] * len(run.steps) for name in PATTERNS}
    for r in table.itertuples(index=False):
        at = _index(run, r.to_step)
        if r.pattern in found and at is not None:
            found[r.pattern][at] = int(r.count)
    return found


def progress(run: TrackRun) -> dict[str, Any] | None:
    """set -> measure -> kind -> {m, low, high (per checkpoint), features}."""
    table = run.table("formation", "by_kind")
    if table is None or table.empty:
        return None
    found: dict[str, Any] = {}
    for (which, measure, kind), part in table.groupby(["set", "measure", "kind"], sort=False, observed=True):
        part = part.set_index("step").reindex(run.steps)
        numbers = {name: short(part[name]) for name in ("m", "low", "high")}
        found.setdefault(which, {}).setdefault(measure, {})[kind] = {**numbers, "features": _plain(part["features"].max())}
    return found


def baseline(run: TrackRun) -> dict[str, list[float | None]] | None:
    """measure -> mean similarity of the random positions per checkpoint."""
    table = run.table("formation", "baseline")
    if table is None:
        return None
    return {
        str(m): short(part.set_index("step")["similarity"].reindex(run.steps))
        for m, part in table.groupby("measure", sort=False, observed=True)
    }


def formation_times(run: TrackRun) -> dict[str, Any] | None:
    """kind at the end -> {formed: share of its features that have formed by each checkpoint, features, ever, median (checkpoint index)}."""
    at = run.formed("top", run.measure)
    if at is None:
        return None
    T = len(run.steps)
    last = run.kind[:, -1] if run.kind is not None else np.zeros(run.features, np.uint8)
    names = KINDS[:3] if run.kind is not None else ("all",)
    found = {}
    for code, name in enumerate(names):
        part = at[last == code]
        if len(part):
            hits = np.bincount(part, minlength=T + 1)[:T].cumsum()
            formed = np.sort(part[part < T])
            middle = int(formed[(len(formed) - 1) // 2]) if len(formed) else None
            found[name] = {"formed": short(hits / len(part)), "features": len(part), "ever": int(hits[-1]), "median": middle}
    return found


def agreement(run: TrackRun) -> dict[str, Any] | None:
    """set -> {m, time}: matrices over the measures, 1 on the diagonal, None where it could not be measured."""
    table = run.table("formation", "agreement")
    if table is None or table.empty:
        return None
    found = {}
    place = {m: i for i, m in enumerate(MEASURES)}
    for which in SETS:
        part = table[table["set"] == which]
        square = {name: [[1.0 if i == j else None for j in place.values()] for i in place.values()] for name in ("m", "time")}
        for r in part.itertuples(index=False):
            i, j = place[r.measure_a], place[r.measure_b]
            for name, value in (("m", r.m_correlation), ("time", r.time_correlation)):
                if i != j:
                    square[name][i][j] = square[name][j][i] = _plain(value)
        if not part.empty:
            found[which] = {**square, "features": int(part["features"].max())}
    return found


def drift_histograms(run: TrackRun) -> dict[str, Any] | None:
    """against (final | previous | null) -> {edges [bins + 1], counts: a list per checkpoint that has one, else None}.

    The null's counts are means over its repeats (its table counts every feature once for each).
    """
    table = run.table("drift", "histogram")
    if table is None or table.empty:
        return None
    found = {}
    for against, part in table.groupby("against", sort=False, observed=True):
        part = part.sort_values(["step", "low"])
        per_step = {int(s): p for s, p in part.groupby("step")}
        one = next(iter(per_step.values()))
        edges = short([*one["low"], one["high"].iloc[-1]])
        share = 1 / _repeats(run) if against == "null" else 1
        lists = [short(per_step[s]["count"].to_numpy() * share) if s in per_step else None for s in run.steps]
        found[str(against)] = {"edges": edges, "counts": lists}
    return found


def cosines(run: TrackRun) -> dict[str, Any] | None:
    """kind at the end (and "all") -> {low, median, high: quartiles of cos_final per checkpoint over features alive there and at the end, features}."""
    if run.cos_final is None:
        return None
    groups = {"all": np.ones(run.features, bool)}
    if run.kind is not None:
        groups |= {name: run.kind[:, -1] == code for code, name in enumerate(KINDS[:3])}
    found = {}
    for name, members in groups.items():
        mine = members & run.alive[:, -1]
        if not mine.any():
            continue
        values = np.where(run.alive[mine], run.cos_final[mine], np.nan)
        columns = [v[np.isfinite(v)] for v in values.T]
        low, middle, high = np.array([np.quantile(v, QUARTILES) if len(v) else [np.nan] * 3 for v in columns]).T
        found[name] = {"low": short(low), "median": short(middle), "high": short(high), "features": int(mine.sum())}
    return found


def null_band(run: TrackRun) -> dict[str, Any] | None:
    """How far the same training moves dictionaries when the model stands still: 5 %, 50 % and 95 % quantiles over alive features of cos_previous and, for
    each number of repeats, of the cosine with the start. None where the run has no null.
    """
    table = run.table("drift", "null")
    spec = run.artifacts["drift"].spec() if "drift" in run.artifacts else None
    if table is None or table.empty or not isinstance(spec, DriftSpec):
        return None
    frozen = _index(run, spec.null_step) if spec.null_step is not None else len(run.steps) - 1
    table = table[run.alive[table["feature"].to_numpy(), frozen if frozen is not None else -1]]

    def band(values: pd.Series) -> list[float | None]:
        known = values.dropna().to_numpy(float)
        return short(np.quantile(known, (0.05, 0.5, 0.95))) if len(known) else [None] * 3

    start = [band(part["cos_start"]) for _, part in table.groupby("repeat")]
    return {"at": frozen, "previous": band(table["cos_previous"]), "start": start}


def same_step(run: TrackRun) -> dict[str, Any] | None:
    """Features that have formed against those that form later, at the same checkpoint: {at, formed, unformed (how many), drift_formed, drift_unformed
    (medians of 1 - cos_previous), difference, low, high}, and `mean`: [difference, low, high] over the checkpoints with enough of both.
    """
    table = run.table("drift", "same_step")
    if table is None or table.empty:
        return None
    figures = run.artifacts["drift"].manifest.figures
    mean = [_plain(figures.get(f"same_step_difference{end}")) for end in ("", "_low", "_high")]
    numbers = {n: short(table[n]) for n in ("formed", "unformed", "drift_formed", "drift_unformed", "difference", "low", "high")}
    return {"at": _at(run, table["step"]), **numbers, "mean": mean}


def turns(run: TrackRun) -> dict[str, Any] | None:
    """kind at the end (and "all") -> {before, after, null}: medians with 90 % bootstrap intervals [median, low, high] of the mean 1 - cos_previous over
    features that have a value before and after their formation, and how many these are.
    """
    before, after, null = (run.per_feature("drift", "before_after", c) for c in ("drift_before", "drift_after", "null"))
    if before is None or after is None or null is None:
        return None
    both = np.isfinite(before) & np.isfinite(after)
    groups = {"all": both}
    if run.kind is not None:
        groups |= {name: both & (run.kind[:, -1] == code) for code, name in enumerate(KINDS[:3])}
    found = {}
    for name, members in groups.items():
        at = np.flatnonzero(members)
        if len(at) >= 2:
            figures = {key: _median(v[at], run.context.seed) for key, v in (("before", before), ("after", after), ("null", null))}
            found[name] = {**figures, "features": len(at)}
    return found or None


def _repeats(run: TrackRun) -> int:
    """Of the null."""
    table = run.table("drift", "null", ["repeat"])
    return max(1, int(table["repeat"].max())) if table is not None and len(table) else 1


def short(values: Any) -> list[Any]:
    """Numbers with five digits, None for NaN."""
    array = np.asarray(values, np.float64)
    return [None if not np.isfinite(v) else float(f"{v:.5g}") for v in array]


def _median(values: np.ndarray, seed: int) -> list[float | None]:
    """[median, low, high]; all None where no value is known."""
    middle = Median(values)
    samples = np.concatenate([middle.of(drawn) for drawn in resamples(len(values), BOOTSTRAP, seed)])
    low, high = interval(samples)
    known = values[np.isfinite(values)]
    return short([np.median(known) if len(known) else np.nan, low, high])


def _at(run: TrackRun, steps: pd.Series) -> list[int]:
    return np.searchsorted(run.steps, steps.to_numpy()).tolist()


def _index(run: TrackRun, step: Any) -> int | None:
    """The checkpoint of a training step (of the next one, where none has exactly this step); None for null."""
    if step is None or pd.isna(step):
        return None
    return int(np.clip(np.searchsorted(run.steps, step), 0, len(run.steps) - 1))


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return None
    if isinstance(value, (np.integer, int)):
        return int(value)
    return float(f"{value:.5g}") if isinstance(value, (float, np.floating)) else str(value)
