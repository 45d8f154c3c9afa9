"""The drift step: how far every feature's decoder moved along the chain, beside what the recipe alone does (arXiv 2412.17626, section on
feature drift; the null is this project's).

One pass over all decoders, a block of features at a time: every weights file is read once, in slices. What is kept is F x T numbers per
column, never F x T x d. A cosine of equal rows is exactly 1, so that "did not move" is no rounding matter.

Tables: `features.parquet`, `histogram.parquet`, `null.parquet`, `trajectories.parquet`, `trajectory.parquet`, `before_after.parquet`,
`same_step.parquet` (see DriftSpec).
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from stagediff.errors import UserError
from stagediff.track.before_after import before_after, headline, same_step
from stagediff.track.decoders import ChainDecoders
from stagediff.track.drift_tables import COLUMNS, Measured, Moves, feature_table, histogram_table, null_table, path_table, trajectory_table
from stagediff.track.spec import DriftSpec
from stagediff.track.trajectories import cosines, path_length, project

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["compute"]


def compute(spec: DriftSpec, job: "Job") -> dict[str, Any]:
    """Raises UserError where dictionaries differ in shape, statistics belong to another dictionary, or the null is not the chain's."""
    began = time.monotonic()
    frozen = _frozen(spec)
    chain = ChainDecoders(job, [p.dictionary for p in spec.points])
    null = ChainDecoders(job, spec.null) if spec.null else None
    steps = np.array([p.step for p in spec.points], np.int64)
    measured = _statistics(spec, job, chain.features)
    formed_step = _formed_steps(spec, job, chain.features)
    moves = _moves(chain, null, job)

    alive = measured.alive
    both = alive.copy()
    both[:, 1:] &= alive[:, :-1]
    drift = np.where(both, 1 - moves.cos_previous, np.nan)
    null_drift = np.full(chain.features, np.nan)
    if frozen is not None and moves.null_previous.shape[1]:
        null_drift = np.where(alive[:, frozen], 1 - moves.null_previous.mean(1), np.nan)
    turns = before_after(drift, steps, formed_step, null_drift)
    if spec.formation is None:
        turns["reason"] = "formation was not computed"
    at_step, same = same_step(drift, steps, formed_step, spec.seed)

    tables = {
        "features.parquet": feature_table(moves, measured, steps, formed_step),
        "histogram.parquet": histogram_table(moves, alive, both, steps, frozen, spec.bins),
        "null.parquet": null_table(moves),
        "trajectories.parquet": trajectory_table(moves, steps, formed_step),
        "trajectory.parquet": path_table(moves),
        "before_after.parquet": turns,
        "same_step.parquet": at_step,
    }
    for name, table in tables.items():
        job.writer.write_table(name, table, columns=COLUMNS[name])
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return {**_figures(moves, alive, formed_step), **headline(turns, spec.seed), **same}


def _moves(chain: ChainDecoders, null: ChainDecoders | None, job: "Job") -> Moves:
    F, T, R = chain.features, len(chain), len(null) - 1 if null else 0
    if null and (null.features, null.d) != (chain.features, chain.d):
        raise UserError(
            f"The null's dictionaries are {null.features} x {null.d} (features x width), the chain's are {chain.features} x {chain.d}. "
            "The null has to be finetuned from the chain's own dictionary."
        )
    found = Moves(
        cos_final=np.empty((F, T)),
        cos_previous=np.empty((F, T)),
        null_start=np.empty((F, R)),
        null_previous=np.empty((F, R)),
        pc=np.empty((F, T, 2), np.float32),
        explained=np.empty(F),
        length=np.empty(F),
    )
    with job.progress.task("decoders", F * (2 if null else 1), "features") as task:
        for start, stop, rows in chain.blocks():
            to_final, to_previous = cosines(rows, -1)
            found.cos_final[start:stop], found.cos_previous[start:stop] = to_final.numpy(), to_previous.numpy()
            found.length[start:stop] = path_length(to_previous).numpy()
            pc, explained = project(rows)
            found.pc[start:stop], found.explained[start:stop] = pc.numpy(), explained.numpy()
            task.advance(stop - start)
        for start, stop, rows in null.blocks() if null else ():
            to_start, to_previous = cosines(rows, 0)
            found.null_start[start:stop], found.null_previous[start:stop] = to_start[:, 1:].numpy(), to_previous[:, 1:].numpy()
            task.advance(stop - start)
    return found


def _frozen(spec: DriftSpec) -> int | None:
    """Index of the point at which the null was made; None without a null."""
    if not spec.null:
        return None
    steps = [p.step for p in spec.points]
    if spec.null_step not in steps:
        raise UserError(
            f"The null was made at step {spec.null_step}, which is no checkpoint of the chain ({steps}). Name one of these as null_step."
        )
    frozen = steps.index(spec.null_step)
    if spec.null[0] != spec.points[frozen].dictionary:
        raise UserError(
            f"The null starts from dictionary {spec.null[0]}, but the chain's dictionary at step {spec.null_step} is {spec.points[frozen].dictionary}. "
            "List the chain's own dictionary first, then every repeat."
        )
    return frozen


def _statistics(spec: DriftSpec, job: "Job", features: int) -> Measured:
    T = len(spec.points)
    found = Measured(np.empty((features, T)), np.empty((features, T)), np.empty((features, T), bool))
    for t, point in enumerate(spec.points):
        table = job.artifact(point.statistics).read_table("features.parquet", columns=["firings", "density", "decoder_norm"])
        if len(table) != features:
            raise UserError(
                f"The statistics of step {point.step} ({point.statistics}) have {len(table)} features, its dictionary has {features}: "
                "they belong to another dictionary."
            )
        found.norm[:, t], found.density[:, t] = table.decoder_norm.to_numpy(), table.density.to_numpy()
        found.alive[:, t] = table.firings.to_numpy() >= spec.alive_firings
    return found


def _formed_steps(spec: DriftSpec, job: "Job", features: int) -> np.ndarray:
    """[F] float: formation step by the spec's measure on the top set; NaN where never, or where formation was not computed."""
    found = np.full(features, np.nan)
    if spec.formation is None:
        return found
    table = job.artifact(spec.formation).read_table("formed.parquet", columns=["feature", "set", "measure", "formed_step"])
    table = table[(table["set"] == "top") & (table["measure"] == spec.measure)]
    if table.empty or table["feature"].max() >= features:
        raise UserError(
            f"The formation artifact {spec.formation} has {len(table)} features under set top, measure {spec.measure}; the chain has {features}. "
            "It belongs to another chain: compute formation on these points."
        )
    found[table["feature"].to_numpy()] = table["formed_step"].to_numpy(float)
    return found


def _figures(moves: Moves, alive: np.ndarray, formed_step: np.ndarray) -> dict[str, Any]:
    """Medians of cos_final over features alive at that checkpoint and at the final one."""

    def median(values: np.ndarray) -> float | None:
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    at_end = alive[:, -1]
    return {
        "features": len(alive),
        "checkpoints": alive.shape[1],
        "alive_first": int(alive[:, 0].sum()),
        "alive_final": int(at_end.sum()),
        "formed": int(np.isfinite(formed_step).sum()),
        "cos_final_first": median(moves.cos_final[at_end & alive[:, 0], 0]),
        "cos_final_last_but_one": median(moves.cos_final[at_end & alive[:, -2], -2]),
        "explained_median": median(moves.explained[at_end]),
        "length_median": median(moves.length[at_end]),
    }
