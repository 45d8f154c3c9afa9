"""Several tracked runs side by side, and how far each two agree, as numbers.

Runs differ in their checkpoints, so curves are compared over relative training progress p = log(1 + step) / log(1 + last step), from 0 at the start to 1 at
the run's last checkpoint, by linear interpolation between checkpoints, where both have some.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagediff.track.section.run import TrackRun
from stagediff.track.spec import KINDS, PATTERNS

__all__ = ["Compared", "agreement", "progress_of", "runs_data"]

GRID = 201
ALIVE_KINDS = KINDS[:3]


@dataclass(frozen=True)
class Compared:
    """A run with its name in the comparison and what its figures show."""

    name: str
    run: TrackRun
    parts: dict[str, Any]

    @property
    def steps(self) -> np.ndarray:
        return np.array(self.run.steps, float)


def progress_of(steps: np.ndarray) -> np.ndarray:
    """[T] relative training progress on the log scale; 1 at the last step."""
    return np.log1p(steps) / max(float(np.log1p(steps[-1])), 1e-12)


def runs_data(runs: list[Compared]) -> list[dict[str, Any]]:
    """What the page's script reads of each run."""
    wanted = ("shares", "phases", "formed", "cosines", "turns", "efficiency")
    return [
        {
            "name": r.name,
            "features": r.run.features,
            "steps": r.run.steps,
            "progress": [round(float(p), 6) for p in progress_of(r.steps)],
            **({"progress_by": r.parts["progress"]} if "progress" in r.parts else {}),
            **{name: r.parts[name] for name in wanted if name in r.parts},
        }
        for r in runs
    ]


def agreement(runs: list[Compared]) -> list[dict[str, Any]]:
    """A row for each two runs; None where one of them lacks the step.

    Columns: a, b; share_difference (mean absolute difference of the kinds' shares of alive features with a kind), share_correlation (Pearson over kinds
    and progress); pattern_difference (the same difference of the patterns' shares of the features with a pattern); boundary_correlation (Pearson of
    log(1 + step) over all axes and boundaries), boundaries (how many), boundary_difference (mean absolute difference in progress), boundary_overlap
    (share whose intervals overlap in progress); formation_<kind> (Kolmogorov-Smirnov distance of the distributions of formation over progress),
    median_<kind> (difference of their medians in progress, b - a); cosine_difference (mean absolute difference of the median cosine with the final
    direction); ev_difference (mean of b - a over progress), ev_last (b - a at the last checkpoints).
    """
    return [
        {
            "a": a.name,
            "b": b.name,
            **_shares(a, b),
            **_patterns(a, b),
            **_boundaries(a, b),
            **_formation(a, b),
            **_drift(a, b),
            **_quality(a, b),
        }
        for a, b in itertools.combinations(runs, 2)
    ]


def _shares(a: Compared, b: Compared) -> dict[str, Any]:
    found: list[np.ndarray] = []
    grid = _common(a.steps, b.steps)
    for r in (a, b):
        if "shares" not in r.parts:
            return {"share_difference": None, "share_correlation": None}
        counts = np.array([r.parts["shares"][k] for k in ALIVE_KINDS], float)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = counts / counts.sum(0)
        found.append(np.stack([_at(r.steps, row, grid) for row in shares]))
    known = np.isfinite(found[0]) & np.isfinite(found[1])
    difference = np.abs(found[0] - found[1])[known]
    return {
        "share_difference": float(difference.mean()) if difference.size else None,
        "share_correlation": _correlation(found[0][known], found[1][known]),
    }


def _patterns(a: Compared, b: Compared) -> dict[str, Any]:
    """Patterns are of intervals; a run's curve begins at its second checkpoint, where the first interval ends."""
    found: list[np.ndarray] = []
    grid = np.linspace(max(progress_of(r.steps)[1] for r in (a, b)), 1.0, GRID)
    for r in (a, b):
        if "counts" not in r.parts:
            return {"pattern_difference": None}
        counts = np.array([r.parts["counts"][name][1:] for name in PATTERNS], float)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = counts / counts.sum(0)
        found.append(np.stack([np.interp(grid, progress_of(r.steps)[1:], row) for row in shares]))
    difference = np.abs(found[0] - found[1])
    return {"pattern_difference": float(np.nanmean(difference)) if np.isfinite(difference).any() else None}


def _drift(a: Compared, b: Compared) -> dict[str, Any]:
    found = []
    grid = _common(a.steps, b.steps)
    for r in (a, b):
        values = (r.parts.get("cosines") or {}).get("all")
        if values is None:
            return {"cosine_difference": None}
        found.append(_at(r.steps, np.array([np.nan if v is None else v for v in values["median"]], float), grid))
    difference = np.abs(found[0] - found[1])
    return {"cosine_difference": float(np.nanmean(difference)) if np.isfinite(difference).any() else None}


def _boundaries(a: Compared, b: Compared) -> dict[str, Any]:
    nothing = {"boundary_correlation": None, "boundaries": 0, "boundary_difference": None, "boundary_overlap": None}
    mine, other = ((r.parts.get("phases") or {}).get("boundaries") for r in (a, b))
    if not mine or not other:
        return nothing
    pairs = [(p, q) for axis in mine if axis in other for p, q in zip(mine[axis], other[axis], strict=False)]
    if not pairs:
        return nothing
    places = [(progress_of(a.steps), progress_of(b.steps))] * len(pairs)
    gaps = [abs(x[p["at"]] - y[q["at"]]) for (p, q), (x, y) in zip(pairs, places, strict=True)]
    overlaps = [
        x[p["low"]] <= y[q["high"]] and y[q["low"]] <= x[p["high"]]
        for (p, q), (x, y) in zip(pairs, places, strict=True)
        if None not in (p["low"], p["high"], q["low"], q["high"])
    ]
    logs = np.array([[np.log1p(a.steps[p["at"]]), np.log1p(b.steps[q["at"]])] for p, q in pairs])
    return {
        "boundary_correlation": _correlation(*logs.T) if len(pairs) >= 3 else None,
        "boundaries": len(pairs),
        "boundary_difference": float(np.mean(gaps)),
        "boundary_overlap": float(np.mean(overlaps)) if overlaps else None,
    }


def _formation(a: Compared, b: Compared) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("token", "concept"):
        curves, medians = [], []
        for r in (a, b):
            part = (r.parts.get("formed") or {}).get(kind)
            if part is None or not part["ever"]:
                break
            hits = np.array(part["formed"]) * part["features"] / part["ever"]
            curves.append((progress_of(r.steps), hits))
            medians.append(float(progress_of(r.steps)[part["median"]]))
        both = len(curves) == 2
        found[f"formation_{kind}"] = _distance(*curves[0], *curves[1]) if both else None
        found[f"median_{kind}"] = medians[1] - medians[0] if both else None
    return found


def _quality(a: Compared, b: Compared) -> dict[str, Any]:
    curves = []
    for r in (a, b):
        chained = ((r.parts.get("efficiency") or {}).get("quality") or {}).get("chained")
        if chained is None:
            return {"ev_difference": None, "ev_last": None}
        values = np.array([np.nan if v is None else v for v in chained["explained_variance"]], float)
        curves.append((r.steps[chained["at"]], values))
    grid = _common(a.steps, b.steps)
    gap = np.interp(grid, progress_of_in(curves[1][0], b.steps), curves[1][1]) - np.interp(
        grid, progress_of_in(curves[0][0], a.steps), curves[0][1]
    )
    last = curves[1][1][-1] - curves[0][1][-1]
    return {"ev_difference": _finite(float(np.nanmean(gap))), "ev_last": _finite(float(last))}


def progress_of_in(some: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Progress of some of a run's checkpoints."""
    return np.log1p(some) / max(float(np.log1p(steps[-1])), 1e-12)


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Progress from where both runs have a checkpoint to 1."""
    return np.linspace(max(progress_of(a)[0], progress_of(b)[0]), 1.0, GRID)


def _at(steps: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.interp(grid, progress_of(steps), values)


def _distance(x: np.ndarray, F: np.ndarray, y: np.ndarray, G: np.ndarray) -> float:
    """Largest gap between two distribution functions, known as F at x and as G at y, straight in between: what forms between two checkpoints forms
    evenly, so that a run with fewer checkpoints does not look later.
    """
    places = np.union1d(x, y)
    return float(np.abs(np.interp(places, x, F) - np.interp(places, y, G)).max())


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
