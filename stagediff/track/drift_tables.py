"""The tables of the drift step, from what the decoders, the statistics and the formation times say (see DriftSpec)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stagediff.track.before_after import BEFORE_AFTER_COLUMNS, SAME_STEP_COLUMNS

__all__ = ["COLUMNS", "Measured", "Moves", "feature_table", "histogram_table", "null_table", "path_table", "trajectory_table"]

ZERO_ROW = "zero decoder row"
STILL = "did not move"


@dataclass
class Moves:
    """What the decoders say. F features, T points, R repeats of the null (0 where there is none)."""

    cos_final: np.ndarray
    """[F, T] float64, as all cosines; NaN where a row is zero."""
    cos_previous: np.ndarray
    """[F, T]; NaN at the first point."""
    null_start: np.ndarray
    """[F, R]"""
    null_previous: np.ndarray
    """[F, R]"""
    pc: np.ndarray
    """[F, T, 2] float32"""
    explained: np.ndarray
    """[F]"""
    length: np.ndarray
    """[F] degrees"""


@dataclass
class Measured:
    """[F, T] each, from the statistics."""

    norm: np.ndarray
    density: np.ndarray
    alive: np.ndarray


def _long(steps: np.ndarray, F: int) -> dict[str, np.ndarray]:
    return {"feature": np.repeat(np.arange(F, dtype=np.int32), len(steps)), "step": np.tile(steps, F)}


def _formed_flag(steps: np.ndarray, formed_step: np.ndarray) -> pd.api.extensions.ExtensionArray:
    """[F x T] nullable flag: whether the step is the formation step or later; null where the feature never formed."""
    never = np.isnan(formed_step)
    return pd.arrays.BooleanArray((steps >= formed_step[:, None]).ravel(), np.repeat(never, len(steps)))


def feature_table(moves: Moves, measured: Measured, steps: np.ndarray, formed_step: np.ndarray) -> pd.DataFrame:
    """A row per feature and step; formed_step [F], NaN where never."""
    missing = np.isnan(moves.cos_final)
    missing[:, 1:] |= np.isnan(moves.cos_previous[:, 1:])
    numbers = {"cos_final": moves.cos_final, "cos_previous": moves.cos_previous, "norm": measured.norm, "density": measured.density}
    return pd.DataFrame(
        {
            **_long(steps, len(missing)),
            **{name: values.astype(np.float32).ravel() for name, values in numbers.items()},
            "alive": measured.alive.ravel(),
            "formed": _formed_flag(steps, formed_step),
            "reason": pd.Categorical.from_codes(np.where(missing, 0, -1).ravel(), categories=[ZERO_ROW]),
        }
    )


def trajectory_table(moves: Moves, steps: np.ndarray, formed_step: np.ndarray) -> pd.DataFrame:
    """The projected path: a row per feature and step."""
    columns = {"pc1": moves.pc[..., 0].ravel(), "pc2": moves.pc[..., 1].ravel(), "formed": _formed_flag(steps, formed_step)}
    return pd.DataFrame({**_long(steps, len(moves.pc)), **columns})


def path_table(moves: Moves) -> pd.DataFrame:
    """What the whole path is like: a row per feature."""
    reason = np.full(len(moves.length), None, object)
    reason[np.isnan(moves.explained)] = STILL
    reason[np.isnan(moves.length)] = ZERO_ROW
    columns = (np.arange(len(reason), dtype=np.int32), moves.explained, moves.length, reason)
    return pd.DataFrame(dict(zip(_PATH, columns, strict=True)))


def null_table(moves: Moves) -> pd.DataFrame:
    """A row per feature and repeat."""
    F, R = moves.null_start.shape
    return pd.DataFrame(
        {
            "feature": np.repeat(np.arange(F, dtype=np.int32), R),
            "repeat": np.tile(np.arange(1, R + 1, dtype=np.int32), F),
            "cos_start": moves.null_start.ravel().astype(np.float32),
            "cos_previous": moves.null_previous.ravel().astype(np.float32),
        }
    )


def histogram_table(moves: Moves, alive: np.ndarray, both: np.ndarray, steps: np.ndarray, frozen: int | None, bins: int) -> pd.DataFrame:
    """Every bin of every step, empty ones too. alive: [F, T]; both: [F, T] alive here and at the checkpoint before; frozen: the null's point."""
    parts = []

    def add(step: int, against: str, values: np.ndarray) -> None:
        count, edges = np.histogram(values[np.isfinite(values)], bins=bins, range=(-1, 1))
        parts.append(pd.DataFrame({"step": step, "against": against, "low": edges[:-1], "high": edges[1:], "count": count}))

    for t, step in enumerate(steps):
        add(step, "final", moves.cos_final[alive[:, t] & alive[:, -1], t])
    for t, step in enumerate(steps[1:], start=1):
        add(step, "previous", moves.cos_previous[both[:, t], t])
    if frozen is not None and moves.null_previous.shape[1]:
        add(steps[frozen], "null", moves.null_previous[alive[:, frozen]])
    return pd.concat(parts, ignore_index=True)


_FEATURE = {"feature": ("index", "feature of the chain")}
_STEP = {"step": ("steps", "training step of the model")}
_FORMED = {"formed": ("flag", "the step is the formation step or later (empty: never formed)")}
_FEATURES = {
    **_FEATURE,
    **_STEP,
    "cos_final": ("cosine", "of the decoder rows here and at the final checkpoint"),
    "cos_previous": ("cosine", "of the decoder rows here and at the checkpoint before (empty at the first)"),
    "norm": ("norm", "Euclidean norm of the decoder row, scaled units"),
    "density": ("share", "firings per token of the probe rows"),
    "alive": ("flag", "enough firings on the probe rows"),
    **_FORMED,
    "reason": ("", "why a cosine is empty, other than at the first checkpoint"),
}
_HISTOGRAM = {
    **_STEP,
    "against": ("name", "final, previous: that checkpoint's decoders; null: every repeat against the one before, at the frozen checkpoint"),
    "low": ("cosine", "lower edge, part of the bin"),
    "high": ("cosine", "upper edge, part of the last bin only"),
    "count": ("features", "alive at both checkpoints (null: at the frozen one; features x repeats)"),
}
_NULL = {
    **_FEATURE,
    "repeat": ("index", "1, 2, …: repeats of the following recipe over the frozen checkpoint"),
    "cos_start": ("cosine", "of the decoder rows after this repeat and before the first"),
    "cos_previous": ("cosine", "of the decoder rows after this repeat and before it"),
}
_TRAJECTORIES = {
    **_FEATURE,
    **_STEP,
    "pc1": ("1", "first principal coordinate of the unit decoder row; grows from the first checkpoint to the last"),
    "pc2": ("1", "second principal coordinate; the same"),
    **_FORMED,
}
_PATH = {
    **_FEATURE,
    "explained": ("share", "of the path's variance that the two coordinates hold"),
    "length": ("degrees", "sum of the angles between successive checkpoints"),
    "reason": ("", "why explained or length is empty"),
}
COLUMNS = {
    "features.parquet": _FEATURES,
    "histogram.parquet": _HISTOGRAM,
    "null.parquet": _NULL,
    "trajectories.parquet": _TRAJECTORIES,
    "trajectory.parquet": _PATH,
    "before_after.parquet": BEFORE_AFTER_COLUMNS,
    "same_step.parquet": SAME_STEP_COLUMNS,
}
