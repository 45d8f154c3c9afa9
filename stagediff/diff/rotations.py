"""The stage-wise diff: how far every feature's decoder direction turned on each step of both paths (P1; method.md, section 2).

Index i is the same feature in all stages, because each dictionary is a finetuned copy of the one before. x = cos(D, F via D) is what adding the model
did after the data, y = cos(M, F via M) what adding the data did after the model; low x + y marks what only both together explain.

Alive: a feature is `alive_<stage>` with at least `alive_firings` firings on that stage's own held-out rows, and `alive` when it is so in both
dictionaries of each axis: D and F_D for x, M and F_M for y. `born`: dead in S, alive in F_D or F_M. A newborn's index is chance, so births are also
matched between the two F dictionaries by decoder cosine (`births.parquet`).
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.cuts import Selection, check_reach, random_sample, select
from stagediff.diff.decoders import Decoder, aligned_blocks, cosines, nearest
from stagediff.diff.enrichment import COLUMNS as ENRICHMENT_COLUMNS
from stagediff.diff.enrichment import enrichment, headline
from stagediff.diff.procrustes import Turned, common_rotation
from stagediff.diff.spec import PATHS, STAGES, DiffSpec
from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COSINES", "births", "compute", "mean_where_defined", "new_share_of_examples", "new_share_of_mass", "rotations"]

COSINES = {
    "x": ("D", "F_D"),
    "y": ("M", "F_M"),
    "cos_s_d": ("S", "D"),
    "cos_s_m": ("S", "M"),
    "cos_d_m": ("D", "M"),
    "cos_f_f": ("F_D", "F_M"),
    "cos_s_f_direct": ("S", "F_direct"),
}
"""Column -> the two stages whose decoder rows it compares."""
P1_CUT = 0.7
ALIVE_IN = ("D", "F_D", "M", "F_M")


def compute(spec: DiffSpec, job: "Job") -> dict[str, Any]:
    """The diff step: features.parquet, births.parquet, enrichment.parquet and cut.json. Raises UserError for stages that are missing or do not fit."""
    for given in (spec.dictionaries, spec.statistics):
        if missing := [s for s in STAGES if s not in given]:
            raise UserError(f"A diff needs the stages {', '.join(STAGES)}; missing: {', '.join(missing)}.")
    began = time.monotonic()
    decoders = {s: Decoder(job.artifact(spec.dictionaries[s])) for s in STAGES}
    turned: dict[str, Any] = {}
    if spec.take_out_rotation:
        rotation = common_rotation(decoders, _alive_in_both(spec, job))
        decoders |= {s: Turned(decoders[s], rotation) for s in ("S", "D")}
        turned = rotation.figures()
    table = rotations(decoders)
    for stage in STAGES:
        statistics = job.artifact(spec.statistics[stage]).read_table("features.parquet", columns=["firings", "density", "decoder_norm"])
        if len(statistics) != len(table):
            raise UserError(
                f"The statistics of stage {stage} ({spec.statistics[stage]}) have {len(statistics)} features, its dictionary has {len(table)}: "
                "they belong to another dictionary."
            )
        table[f"norm_{stage}"] = statistics.decoder_norm.to_numpy()
        table[f"density_{stage}"] = statistics.density.to_numpy()
        table[f"alive_{stage}"] = statistics.firings.to_numpy() >= spec.alive_firings
    table["alive"] = table[[f"alive_{s}" for s in ALIVE_IN]].all(axis=1)
    table["born"] = ~table.alive_S & (table.alive_F_D | table.alive_F_M)
    measured = [job.artifact(spec.statistics[stage]) for stage in PATHS]
    table["new_mass"] = mean_where_defined(
        [new_share_of_mass(a.read_table("features.parquet", columns=["mass_base", "mass_new"])) for a in measured]
    )
    examples = (a.read_table("examples.parquet", columns=["feature", "is_new"]) for a in measured)
    table["new_top"] = mean_where_defined([new_share_of_examples(e, len(table)) for e in examples])
    alive = table.alive.to_numpy()
    cut = select(table.x.to_numpy(), table.y.to_numpy(), alive, spec.cut, _null_table(spec, job))
    table["quadrant"], table["selected"] = cut.quadrant, cut.selected
    table["random"] = random_sample(alive, spec.random_sample, spec.seed)
    table = table[list(COLUMNS)]

    newborns = births(decoders, table)
    enriched = enrichment(table, spec.random_sample, spec.seed)
    job.writer.write_table("features.parquet", table, columns=COLUMNS)
    job.writer.write_table("births.parquet", newborns, columns=BIRTH_COLUMNS)
    job.writer.write_table("enrichment.parquet", enriched, columns=ENRICHMENT_COLUMNS)
    job.writer.write_json("cut.json", {**spec.cut.model_dump(), "x": cut.x, "y": cut.y, "score": cut.score})
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return {**_figures(table, cut), **_birth_figures(newborns), **headline(table, enriched), **turned}


def _alive_in_both(spec: DiffSpec, job: "Job") -> np.ndarray:
    """[F] alive in S and in M, which tell what the model turned alone."""
    firings = [job.artifact(spec.statistics[s]).read_table("features.parquet", columns=["firings"]).firings.to_numpy() for s in ("S", "M")]
    return np.minimum(*firings) >= spec.alive_firings


def _null_table(spec: DiffSpec, job: "Job") -> pd.DataFrame | None:
    """The retrain null's p and q, for the cut that needs them. Raises UserError where there is none or it cannot reach the cut's level."""
    if spec.cut.kind != "fdr":
        return None
    if spec.null is None:
        raise UserError("The cut fdr needs the retrain null, which this diff was not given. Set evidence.null_seeds to at least 1.")
    null = job.artifact(spec.null)
    f = null.manifest.figures
    check_reach(min(f["null_values_x"], f["null_values_y"]), f["alive"], spec.cut.value)
    return null.read_table("features.parquet", columns=["p_x", "p_y", "p", "q"])


def rotations(decoders: dict[str, Decoder]) -> pd.DataFrame:
    """Columns feature, x, y, score, and the other cosines of COSINES; float64 from blocks of decoder rows.

    A cosine is NaN where a decoder row is zero. Raises UserError where the dictionaries differ in shape.
    """
    features = next(iter(decoders.values())).shape[0]
    columns = {name: np.empty(features) for name in COSINES}
    for start, stop, rows in aligned_blocks(decoders):
        for name, (a, b) in COSINES.items():
            columns[name][start:stop] = cosines(rows[a], rows[b]).numpy()
    return pd.DataFrame({"feature": np.arange(features, dtype=np.int32), **columns, "score": columns["x"] + columns["y"]})


def new_share_of_mass(statistics: pd.DataFrame) -> np.ndarray:
    """[F] share of each feature's activation mass that lies on new rows; NaN where it never fires."""
    new, total = statistics.mass_new.to_numpy(float), (statistics.mass_new + statistics.mass_base).to_numpy(float)
    with np.errstate(invalid="ignore"):
        return new / total


def new_share_of_examples(examples: pd.DataFrame, features: int) -> np.ndarray:
    """[F] share of each feature's kept top examples (at most one per row) that are new rows; NaN where it has none."""
    feature = examples.feature.to_numpy()
    count = np.bincount(feature, minlength=features)
    with np.errstate(invalid="ignore"):
        return np.bincount(feature, weights=examples.is_new.to_numpy(float), minlength=features) / count


def births(decoders: dict[str, Decoder], table: pd.DataFrame) -> pd.DataFrame:
    """Newborns of F via D, each with its nearest newborn of F via M by decoder cosine (BIRTH_COLUMNS).

    A newborn of a stage is dead in S and alive there. The same latent may be born at different indices on the two paths.
    """
    of = {stage: np.flatnonzero(~table.alive_S & table[f"alive_{stage}"]) for stage in PATHS}
    mine, other = (decoders[stage].take(of[stage]) for stage in PATHS)
    if not len(mine) or not len(other):
        nothing = np.zeros(len(mine), bool)
        columns = (of["F_D"].astype(np.int32), np.full(len(mine), -1, np.int32), np.full(len(mine), np.nan), nothing, nothing)
        return pd.DataFrame(dict(zip(BIRTH_COLUMNS, columns, strict=True)))
    cosine, partner = (t.numpy() for t in nearest(mine, other))
    back = nearest(other, mine)[1].numpy()
    columns = (
        of["F_D"].astype(np.int32),
        of["F_M"][partner].astype(np.int32),
        cosine,
        of["F_M"][partner] == of["F_D"],
        back[partner] == np.arange(len(mine)),
    )
    return pd.DataFrame(dict(zip(BIRTH_COLUMNS, columns, strict=True)))


def mean_where_defined(values: list[np.ndarray]) -> np.ndarray:
    """Mean of arrays [F] over those that are not NaN there; NaN where all are."""
    both = np.stack(values)
    defined = np.isfinite(both).sum(0)
    return np.where(defined > 0, np.nansum(both, 0) / np.maximum(defined, 1), np.nan)


def _figures(table: pd.DataFrame, cut: Selection) -> dict[str, Any]:
    alive = table[table.alive]
    in_f = table.alive_F_D | table.alive_F_M
    figures: dict[str, Any] = {
        "features": len(table),
        "alive": len(alive),
        "born": int(table.born.sum()),
        "died": int((table.alive_S & ~in_f).sum()),
        "dead": int((~table.alive_S & ~in_f).sum()),
        "selected": int(table.selected.sum()),
        "cut_x": cut.x,
        "cut_y": cut.y,
        "cut_score": cut.score,
        "p1_cut_both_below_0.7": int(((alive.x < P1_CUT) & (alive.y < P1_CUT)).sum()),
    }
    figures |= {f"alive_{stage}": int(table[f"alive_{stage}"].sum()) for stage in STAGES}
    for name in COSINES:
        values = alive[name].dropna()
        for label, q in (("median", 0.5), ("q10", 0.1), ("q01", 0.01)):
            figures[f"{name}_{label}"] = float(values.quantile(q)) if len(values) else None
    return figures


def _birth_figures(newborns: pd.DataFrame) -> dict[str, Any]:
    matched = newborns[newborns.partner >= 0]
    share = {name: float(matched[name].mean()) if len(matched) else None for name in ("same_index", "mutual")}
    return {
        "births_F_D": len(newborns),
        "births_same_index_rate": share["same_index"],
        "births_mutual_rate": share["mutual"],
        "births_cosine_median": float(matched.cosine.median()) if len(matched) else None,
    }


def _columns() -> dict[str, tuple[str, str]]:
    columns = {
        "feature": ("index", "the same in all stages"),
        "x": ("cosine", "D and F via D: what adding the finetuned model did after the data"),
        "y": ("cosine", "M and F via M: what adding the new data did after the model"),
        "score": ("sum of cosines", "x + y; low is suspicious"),
        "cos_s_d": ("cosine", "S and D"),
        "cos_s_m": ("cosine", "S and M"),
        "cos_d_m": ("cosine", "D and M"),
        "cos_f_f": ("cosine", "F via D and F via M: agreement of the two paths"),
        "cos_s_f_direct": ("cosine", "S and the direct finetune S -> F"),
    }
    for stage in STAGES:
        columns[f"norm_{stage}"] = ("norm", f"decoder row of {stage}")
    for stage in STAGES:
        columns[f"density_{stage}"] = ("share", f"firings per token of {stage}'s own held-out rows")
    for stage in STAGES:
        columns[f"alive_{stage}"] = ("flag", f"enough firings on {stage}'s own held-out rows")
    return columns | {
        "alive": ("flag", "alive in D, F_D, M and F_M: both dictionaries of each axis"),
        "born": ("flag", "dead in S, alive in F_D or F_M; the index is chance"),
        "new_mass": ("share", "activation mass on new rows, held-out mix, mean over F_D and F_M (empty: never fires)"),
        "new_top": ("share", "new rows among the top examples, held-out mix, mean over F_D and F_M (empty: never fires)"),
        "quadrant": ("name", "by the run's cut: lower_left, lower_right, upper_left, upper_right; empty where not alive"),
        "selected": ("flag", "by the run's cut"),
        "random": ("flag", "drawn into the random sample of alive features"),
    }


COLUMNS = _columns()
BIRTH_COLUMNS = {
    "feature": ("index", "newborn of F_D"),
    "partner": ("index", "the newborn of F_M with the nearest decoder direction; -1: F_M has no newborns"),
    "cosine": ("cosine", "of the two decoder directions"),
    "same_index": ("flag", "whether the partner has the same index"),
    "mutual": ("flag", "whether the partner's nearest newborn of F_D is this one"),
}
