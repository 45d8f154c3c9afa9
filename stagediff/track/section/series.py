"""The features' numbers packed for the page: a table of all, curves over the checkpoints, and what only one feature's own view shows.

Curves take two bytes a number in small runs and one in large ones, a step of which is about a pixel of a curve; cosines then as angles, since what
matters lies near 1.
"""

from typing import Any

import numpy as np

from stagediff.packing import pack, pack_linear, pack_log
from stagediff.track.section.choice import FULL_CELLS, Choice, drifts, occurred
from stagediff.track.section.run import NONE, TrackRun
from stagediff.track.spec import KINDS, MEASURES, PATTERNS, SETS

__all__ = ["NEVER", "pack_angles", "pack_bytes", "pack_decades", "pack_features"]

NEVER = 255
"""Checkpoint index of what never happened."""
_LAST = 254


def pack_bytes(values: np.ndarray, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """One byte a number in 254 even steps between `low` and `high` (default: the finite values' range); NaN decodes as NaN."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    low = float(low if low is not None else values[finite].min(initial=0.0))
    high = float(high if high is not None else values[finite].max(initial=low))
    span = high - low if high > low else 1.0
    codes = np.full(values.shape, NEVER, np.uint8)
    codes[finite] = np.rint(np.clip((values[finite] - low) / span, 0, 1) * _LAST).astype(np.uint8)
    return {**pack(codes), "low": low, "span": span}


def pack_angles(cosines: np.ndarray) -> dict[str, Any]:
    """One byte a cosine, as its angle in steps of 180/254 degrees: the error is at most 2e-5 at 1, 5e-4 at 0.998, 7e-3 at 0."""
    return {**pack_bytes(np.arccos(np.clip(cosines, -1, 1)), 0.0, np.pi), "turn": "cosine"}


def pack_decades(values: np.ndarray) -> dict[str, Any]:
    """One byte a positive number, in even steps of the logarithm; 0 stays 0."""
    values = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    positive = np.isfinite(logs)
    low, high = (float(logs[positive].min()), float(logs[positive].max())) if positive.any() else (0.0, 1.0)
    step = (high - low) / (_LAST - 1) if high > low else 1.0
    scaled = np.where(values == 0, 0.0, np.where(positive, 1 + np.rint((logs - low) / step), np.nan))
    return {**pack_bytes(scaled, 0.0, float(_LAST)), "turn": "decades", "from": low, "step": step}


def pack_features(run: TrackRun, choice: Choice) -> dict[str, Any]:
    """What the script's `T` reads."""
    return {
        "n": run.features,
        "steps": run.steps,
        "kinds": list(KINDS),
        "patterns": list(PATTERNS),
        "measures": list(MEASURES),
        "sets": list(SETS),
        "measure": run.measure,
        "table": _table(run),
        "curves": _curves(run, choice),
        "full": _full(run, choice),
        "merges": _merges(run),
        "outstanding": pack(choice.outstanding.astype(np.uint32)),
    }


def _table(run: TrackRun) -> dict[str, Any]:
    """A row per feature, about 30 bytes. Checkpoints are indices into the steps, NEVER for none."""
    data: dict[str, Any] = {}
    if run.kind is not None and run.token is not None:
        data["kind"] = pack(run.kind[:, -1])
        data["token"] = pack(run.token[:, -1])
    if (bits := occurred(run)) is not None:
        data["patterns"] = pack(bits)
    data["alive"] = pack(run.alive[:, -1].astype(np.uint8)) if run.features else None
    for name, column in (("formed", "formed_step"), ("formed_low", "low"), ("formed_high", "high")):
        if (at := run.formed("top", run.measure, column)) is not None:
            data[name] = pack(_checkpoints(run, at))
    if run.main_progress is not None:
        data["final_m"] = pack_linear(run.main_progress[:, -1])
    if run.density is not None:
        norm = run.grid("drift", "features", "norm")
        data["density"] = pack_log(run.density[:, -1])
        data["norm"] = pack_log(norm[:, -1]) if norm is not None else None
    if (turned := drifts(run)) is not None:
        data["drift"] = pack_linear(turned)
    for name, column in (("drift_before", "drift_before"), ("drift_after", "drift_after"), ("null", "null")):
        if (values := run.per_feature("drift", "before_after", column)) is not None:
            data[name] = pack_linear(values)
    return {name: packed for name, packed in data.items() if packed is not None}


def _curves(run: TrackRun, choice: Choice) -> dict[str, Any]:
    at, fine = choice.curves, _is_fine(run)
    data: dict[str, Any] = {"feature": None if len(at) == run.features else pack(at.astype(np.uint32))}
    if run.kind is not None or run.pattern is not None:
        nothing = np.full((run.features, len(run.steps)), NONE, np.uint8)
        kind = run.kind if run.kind is not None else nothing
        pattern = run.pattern if run.pattern is not None else nothing
        data["kind_pattern"] = pack((kind[at] | (pattern[at] << np.uint8(4))).ravel())
    if run.token is not None:
        small = len(run.words) < 2**16 - 1
        data["token"] = pack((run.token[at] + 1).ravel().astype(np.uint16 if small else np.uint32))
    if run.main_progress is not None:
        data["m"] = _numbers(run.main_progress[at].ravel(), fine)
    for name, values in (("cos_final", run.cos_final), ("cos_previous", run.cos_previous)):
        if values is not None:
            data[name] = pack_linear(values[at].ravel(), -1.0, 1.0) if fine else pack_angles(values[at].ravel())
    if run.density is not None:
        data["density"] = (pack_log if fine else pack_decades)(run.density[at].ravel())
    return data


def _full(run: TrackRun, choice: Choice) -> dict[str, Any]:
    at, fine = choice.full, _is_fine(run)
    data: dict[str, Any] = {"feature": None if len(at) == run.features else pack(at.astype(np.uint32))}
    for which in SETS:
        for measure in MEASURES:
            m, formed = run.progress(which, measure), run.formed(which, measure)
            if m is not None and formed is not None:
                data[f"m_{which}_{measure}"] = _numbers(m[at].ravel(), fine)
                data[f"formed_{which}_{measure}"] = pack(_checkpoints(run, formed[at]))
    norm = run.grid("drift", "features", "norm")
    if norm is not None:
        data["norm"] = _numbers(norm[at].ravel(), fine, low=0.0)
    pc1, pc2 = (run.grid("drift", "trajectories", name) for name in ("pc1", "pc2"))
    if pc1 is not None and pc2 is not None:
        data["pc1"], data["pc2"] = _numbers(pc1[at].ravel(), fine), _numbers(pc2[at].ravel(), fine)
        for name in ("explained", "length"):
            values = run.per_feature("drift", "trajectory", name)
            data[name] = pack_linear(values[at]) if values is not None else None
    return {name: packed for name, packed in data.items() if packed is not None or name == "feature"}


def _merges(run: TrackRun) -> list[list[Any]]:
    """[feature, partner, checkpoint, cosine before, after, shared], the most certain first; at most 20,000."""
    table = run.table("patterns", "merges")
    if table is None:
        return []
    table = table.sort_values(["cos_after", "feature", "partner"], ascending=[False, True, True]).head(20_000)
    at = np.searchsorted(run.steps, table["to_step"].to_numpy())
    cosines = [[round(float(v), 3) for v in row] for row in table[["cos_before", "cos_after", "shared"]].to_numpy()]
    ids = table[["feature", "partner"]].to_numpy(int).tolist()
    return [[*pair, int(k), *values] for pair, k, values in zip(ids, at, cosines, strict=True)]


def _is_fine(run: TrackRun) -> bool:
    return run.features * len(run.steps) <= FULL_CELLS


def _numbers(values: np.ndarray, fine: bool, low: float | None = None) -> dict[str, Any]:
    return pack_linear(values, low) if fine else pack_bytes(values, low)


def _checkpoints(run: TrackRun, at: np.ndarray) -> np.ndarray:
    """Indices as bytes; NEVER where the feature has none. Runs of more than 254 checkpoints need more bytes."""
    never = at >= len(run.steps)
    if len(run.steps) >= NEVER:
        return np.where(never, 2**16 - 1, at).astype(np.uint16)
    return np.where(never, NEVER, at).astype(np.uint8)
