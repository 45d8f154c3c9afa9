"""The retrain null: dictionaries move by continued training alone, so a move counts only against what training on the same rows moves without anything new.

x-null: D is trained on as D' on what it was trained on (base model, the mix): no new model. y-null: M as M' (finetuned model, base data): no new
data. Both with the budget and schedule of the real path. The first repeat reads the rows in the real path's order, further ones in other orders:
nothing else is random in a finetune. p_x tells how unusual angle(D, F via D) is for this feature among the angles (D, D'): against its own repeats
where there are two or more, else among features of like density and norm; p_y the same of M (`stagediff.diff.calibration`). p = max(p_x, p_y), since
only what moved on both axes is new; q by Benjamini and Hochberg over the alive features.

The novelty of the latents of D' and M' (largest cosine with any latent of D or M) is kept too: it is the null of paired novelty (`stagediff.diff.aligned`).
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.calibration import benjamini_hochberg, own_p_values, p_values, reach
from stagediff.diff.decoders import Decoder, aligned_blocks, cosines
from stagediff.diff.matching import candidates, largest_cosine
from stagediff.diff.procrustes import Turned, common_rotation
from stagediff.diff.spec import NullSpec
from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "LEVEL", "NULL_COLUMNS", "angles", "by_repeat", "compute"]

STAGES = ("S", "D", "M", "F_D", "F_M")
AXES = {"x": ("D", "F_D"), "y": ("M", "F_M")}
"""Axis -> the stage that the null goes on from, and the stage that the real path makes of it."""
LEVEL = 0.1
"""False discovery rate at which figures are given."""


def compute(spec: NullSpec, job: "Job") -> dict[str, Any]:
    """The null step: features.parquet (COLUMNS) and null.parquet (NULL_COLUMNS). Raises UserError for stages or repeats that are missing."""
    repeats = _check(spec)
    began = time.monotonic()
    decoders = {s: Decoder(job.artifact(spec.dictionaries[s])) for s in STAGES}
    measured = {s: _statistics(spec.statistics[s], job, spec.alive_firings) for s in STAGES}
    turn = common_rotation(decoders, (measured["S"].alive & measured["M"].alive).to_numpy()) if spec.take_out_rotation else None
    if turn:
        decoders |= {s: Turned(decoders[s], turn) for s in ("S", "D")}

    parts = []
    with job.progress.task("retrain null", 2 * repeats, "dictionaries") as task:
        for axis, (start, _) in AXES.items():
            for repeat in range(repeats):
                after = Decoder(job.artifact(spec.nulls[start][repeat]))
                after = Turned(after, turn) if turn and start == "D" else after
                own = _statistics(spec.null_statistics[start][repeat], job, spec.alive_firings)
                parts.append(_null(axis, repeat, start, after, own, measured[start], decoders, spec.candidates, job.device))
                task.advance(1)
    null = pd.concat(parts, ignore_index=True)

    table = _features(decoders, measured)
    for axis, (start, _) in AXES.items():
        table[f"p_{axis}"] = _index_p(table[axis].to_numpy(), table.alive.to_numpy(), measured[start], null[null.axis == axis])
    table["p"] = table[["p_x", "p_y"]].max(axis=1, skipna=False)
    table["q"] = benjamini_hochberg(table.p.to_numpy())
    job.writer.write_table("features.parquet", table[list(COLUMNS)], columns=COLUMNS)
    job.writer.write_table("null.parquet", null[list(NULL_COLUMNS)], columns=NULL_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(table, null, measured, repeats)


def angles(cosine: np.ndarray) -> np.ndarray:
    """Radians."""
    return np.arccos(np.clip(cosine, -1, 1))


def _check(spec: NullSpec) -> int:
    """How many repeats there are."""
    for given, wanted in (
        (spec.dictionaries, STAGES),
        (spec.statistics, STAGES),
        (spec.nulls, ("D", "M")),
        (spec.null_statistics, ("D", "M")),
    ):
        if missing := [s for s in wanted if s not in given]:
            raise UserError(f"A retrain null needs the stages {', '.join(wanted)}; missing: {', '.join(missing)}.")
    counts = {len(of) for group in (spec.nulls, spec.null_statistics) for of in group.values()}
    if len(counts) > 1 or not min(counts):
        raise UserError(
            f"A retrain null needs as many repeats of D as of M, at least one, each with its statistics; given: {sorted(counts)}."
        )
    return counts.pop()


def _statistics(ref: Any, job: "Job", alive_firings: int) -> pd.DataFrame:
    table = job.artifact(ref).read_table("features.parquet", columns=["firings", "density", "decoder_norm"])
    return table.assign(alive=table.firings >= alive_firings)


def _null(
    axis: str,
    repeat: int,
    start: str,
    after: Decoder,
    own: pd.DataFrame,
    before: pd.DataFrame,
    decoders: dict[str, Decoder],
    most: int,
    device: str,
) -> pd.DataFrame:
    """NULL_COLUMNS of one repeat."""
    features = after.shape[0]
    same, bound = np.empty(features), np.empty(features)
    other = "M" if start == "D" else "D"
    for low, high, rows in aligned_blocks({"after": after, "before": decoders[start], "other": decoders[other]}):
        same[low:high] = cosines(rows["after"], rows["before"]).numpy()
        bound[low:high] = np.fmax(same[low:high], cosines(rows["after"], rows["other"]).numpy())
    chosen = candidates(bound, own.alive.to_numpy(), most)
    novelty = np.where(own.alive, bound, np.nan)
    novelty[chosen] = np.maximum(*largest_cosine(after.take(chosen), {s: decoders[s] for s in ("D", "M")}, device).values())
    return pd.DataFrame(
        {
            "axis": axis,
            "repeat": repeat,
            "feature": np.arange(features, dtype=np.int32),
            "cosine": np.where(before.alive & own.alive, same, np.nan),
            "novelty": novelty,
            "density_before": before.density,
            "norm_before": before.decoder_norm,
            "density": own.density,
            "norm": own.decoder_norm,
        }
    )


def _features(decoders: dict[str, Decoder], measured: dict[str, pd.DataFrame]) -> pd.DataFrame:
    columns = {axis: np.empty(decoders["D"].shape[0]) for axis in AXES}
    for low, high, rows in aligned_blocks(decoders):
        for axis, (start, end) in AXES.items():
            columns[axis][low:high] = cosines(rows[start], rows[end]).numpy()
    alive = np.logical_and.reduce([measured[s].alive.to_numpy() for s in ("D", "F_D", "M", "F_M")])
    return pd.DataFrame({"feature": np.arange(len(alive), dtype=np.int32), **columns, "alive": alive})


def by_repeat(null: pd.DataFrame, column: str) -> np.ndarray:
    """[F, repeats] of one axis of NULL_COLUMNS."""
    return null.pivot(index="feature", columns="repeat", values=column).to_numpy(float)


def _index_p(cosine: np.ndarray, alive: np.ndarray, before: pd.DataFrame, null: pd.DataFrame) -> np.ndarray:
    """[F] p of the angle at one index; NaN for features that are not alive."""
    if null.repeat.nunique() > 1:
        return own_p_values(np.where(alive, angles(cosine), np.nan), angles(by_repeat(null, "cosine")))
    like = [before.density.to_numpy(float), before.decoder_norm.to_numpy(float)]
    null_like = [null.density_before.to_numpy(float), null.norm_before.to_numpy(float)]
    return p_values(np.where(alive, angles(cosine), np.nan), like, angles(null.cosine.to_numpy(float)), null_like)


def _figures(table: pd.DataFrame, null: pd.DataFrame, measured: dict[str, pd.DataFrame], repeats: int) -> dict[str, Any]:
    alive = table[table.alive]
    counts = {axis: int(null[null.axis == axis].cosine.notna().sum()) for axis in AXES}
    can = reach(min(counts.values()), len(alive), LEVEL)
    return {
        "repeats": repeats,
        "alive": len(alive),
        **{f"null_values_{axis}": n for axis, n in counts.items()},
        "smallest_p": can.smallest_p,
        "together_for_q_0.1": can.together,
        "reaches_q_0.1": can.is_enough,
        "q_below_0.1": int((alive.q <= LEVEL).sum()),
        "q_below_0.05": int((alive.q <= LEVEL / 2).sum()),
        "no_change_q_below_0.1": _no_change(null, measured) if repeats > 1 else None,
        **{f"{axis}_median": _median(alive[axis]) for axis in AXES},
        **{f"null_{axis}_median": _median(null[null.axis == axis].cosine) for axis in AXES},
    }


def _no_change(null: pd.DataFrame, measured: dict[str, pd.DataFrame]) -> float | None:
    """Share of features that are called at LEVEL when the first repeat, in which nothing changed, stands in for the real path."""
    p = []
    for axis, (start, _) in AXES.items():
        of = null[null.axis == axis]
        cosine = of[of.repeat == 0].cosine.to_numpy(float)
        p.append(_index_p(cosine, np.isfinite(cosine), measured[start], of[of.repeat > 0]))
    both = np.maximum(*p)
    return float((benjamini_hochberg(both)[np.isfinite(both)] <= LEVEL).mean()) if np.isfinite(both).any() else None


def _median(values: pd.Series) -> float | None:
    return float(values.median()) if values.notna().any() else None


COLUMNS = {
    "feature": ("index", "the same in all stages"),
    "alive": ("flag", "alive in D, F_D, M and F_M"),
    "x": ("cosine", "D and F via D"),
    "y": ("cosine", "M and F via M"),
    "p_x": ("probability", "of as large an angle (D, F via D), for this feature, by retraining alone (empty: not alive)"),
    "p_y": ("probability", "the same of (M, F via M)"),
    "p": ("probability", "the larger of p_x and p_y: moved on both axes"),
    "q": ("false discovery rate", "at which the feature would be called, Benjamini and Hochberg over the alive features"),
}
NULL_COLUMNS = {
    "axis": ("name", "x: D retrained as D'; y: M retrained as M'"),
    "repeat": ("index", "of the retraining; 0 reads the rows in the real path's order"),
    "feature": ("index", "the same in all stages"),
    "cosine": ("cosine", "of the latent before and after (empty: not alive in both)"),
    "novelty": (
        "cosine",
        "largest of the latent after with any latent of D or M; of its own index alone where it is no candidate (empty: not alive after)",
    ),
    "density_before": ("share", "firings per token before, on that stage's own held-out rows"),
    "norm_before": ("norm", "decoder row before"),
    "density": ("share", "firings per token after"),
    "norm": ("norm", "decoder row after"),
}
