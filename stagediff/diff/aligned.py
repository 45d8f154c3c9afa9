"""Aligned scores: what is new in F, found without trusting the index (P1's scatter compares index by index; planted truth shows where that fails).

A feature that only the finetuned model and the new data together call for is born in F, and the two paths give it whatever latent was free: x_i and y_i
then belong to two different features. Here the alive latents of F via D and F via M are matched by decoder cosine (`stagediff.diff.matching`), and

paired novelty    of a latent its largest decoder cosine with any latent of D or of M; of a pair the sum over its two latents. Low = found. Needs no labels
contrast          from the latent's mean activations in the four cells (model x data): (c[finetuned, new] - max(c[finetuned, base], c[base, new])) / sum of
                  all four. Needs to know which rows are new
aligned           (1 - novelty) x contrast where that is positive, summed over the pair. High = found
excess            of a latent the angle of its novelty less the root mean square of what retraining alone leaves at its index (`stagediff.diff.null`); of a
                  pair the sum over its two latents. High = found. Needs no labels, but the retrain null: latents that every training moves take the
                  foremost places of the other scores (docs/decisions/009-own-null.md)
agreement         of a latent its largest decoder cosine with any alive latent of the other path's F or of the direct finetune. What the data call for is
                  found again by another training; a direction taken by chance is not, and a wide dictionary may be full of those
agreed            of a latent its excess, where positive, times the square of its agreement: the share of its direction that another training has too; of a
                  pair the sum over its two latents. High = found. Needs no labels (docs/decisions/015-agreement.md)
agreed x contrast a pair's agreed excess times the sum of both latents' contrasts, each where positive. High = found. Needs row labels and the retrain null

Newborn is a latent whose novelty is under `newborn_below`. The two paths are two catches from one population of needed latents: of the newborns of F via M
that carry the new data, the share that F via D has too estimates how much of that population F via D has (Lincoln and Petersen's capture and
recapture), and the other way round. Births have not saturated while that share, the coverage, is small. Newborns that do not carry the new data are left
out of it: long finetunes make more and more of them, which are nobody's feature. It is an optimistic estimate: what is hard to give birth to is missed
on both paths alike.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.calibration import benjamini_hochberg, own_p_values, p_values
from stagediff.diff.decoders import Decoder, aligned_blocks, cosines
from stagediff.diff.enrichment import COLUMNS as ENRICHMENT_COLUMNS
from stagediff.diff.enrichment import enrichment
from stagediff.diff.matching import Masked, Matching, candidates, largest_cosine, match
from stagediff.diff.null import LEVEL, angles, by_repeat
from stagediff.diff.procrustes import Turned, common_rotation
from stagediff.diff.rotations import mean_where_defined, new_share_of_examples
from stagediff.diff.spec import ALIGNED_STAGES, PATHS, AlignSpec
from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "PAIR_SCORES", "compute", "contrast", "pairs"]

F_STAGES = (*PATHS, "F_direct")
PAIR_SCORES = ("pair_novelty", "excess_low", "agreed_low", "agreed_contrast_low", "aligned_low", "contrast_low", "paired_x_y", "score")
"""What ranks pairs, low end first: paired novelty, -excess, -agreed, -(agreed x contrast), -aligned, -contrast (the control: row labels alone), x + y over
the pair, and the published x + y at the index of the pair's latent of F via D."""
NEEDS_CONTRAST = {"agreed_contrast_low", "aligned_low", "contrast_low"}
NEEDS_NULL = {"excess_low", "agreed_low", "agreed_contrast_low"}


def compute(spec: AlignSpec, job: "Job") -> dict[str, Any]:
    """The align step: features.parquet (COLUMNS, a row per latent of F via D) and enrichment.parquet (every score judged on the same pairs)."""
    _check(spec)
    began = time.monotonic()
    decoders = {s: Decoder(job.artifact(spec.dictionaries[s])) for s in ALIGNED_STAGES}
    published = job.artifact(spec.diff).read_table("features.parquet", columns=["feature", "x", "y", "score"])
    alive = {s: _firings(spec.statistics[s], job, len(published)) >= spec.alive_firings for s in F_STAGES}
    in_both = job.artifact(spec.diff).read_table("features.parquet", columns=["alive_S", "alive_M"]).all(axis=1).to_numpy()
    rotation = common_rotation(decoders, in_both)
    if spec.take_out_rotation:
        decoders["D"] = Turned(decoders["D"], rotation)
    bounds = _same_index({s: decoders[s] for s in ("D", "M", *F_STAGES)})
    chosen = {s: candidates(bounds[s], alive[s], spec.candidates) for s in F_STAGES}
    rows = {s: decoders[s].take(chosen[s]) for s in F_STAGES}
    against = {name: decoders[name] for name in ("D", "M")}
    with job.progress.task("novelty", len(F_STAGES), "dictionaries") as task:
        novelty = {}
        for stage in F_STAGES:
            novelty[stage] = np.maximum(*largest_cosine(rows[stage], against, job.device).values())
            task.advance(1)
    with job.progress.task("agreement", len(PATHS), "dictionaries") as task:
        agreement = {}
        for stage in PATHS:
            others = {s: Masked(decoders[s], alive[s]) for s in F_STAGES if s != stage}
            agreement[stage] = np.maximum(*largest_cosine(rows[stage], others, job.device).values())
            task.advance(1)
    found = match(rows["F_D"], rows["F_M"], job.device)

    table = _features(published, alive, chosen, {"novelty": novelty, "agreement": agreement}, found)
    for stage in PATHS:
        table[f"contrast_{stage}"] = _contrast(spec, stage, job) if spec.base_statistics else np.nan
        examples = job.artifact(spec.statistics[stage]).read_table("examples.parquet", columns=["feature", "is_new"])
        table[f"new_top_{stage}"] = new_share_of_examples(examples, len(table))
        novelty_angle = angles(table[f"novelty_{stage}"].to_numpy(float))
        null = _null_novelty(spec.null, stage, job) if spec.null else None
        table[f"p_{stage}"] = np.nan if null is None else _novelty_p(novelty_angle, null)
        table[f"excess_{stage}"] = np.nan if null is None else novelty_angle - _usual(null)
    table = _over_pairs(table)[list(COLUMNS)]
    enriched = enrichment(pairs(table), spec.random_sample, spec.seed, _scores(spec))
    births = {s: chosen[s][novelty[s] < spec.newborn_below] for s in F_STAGES}
    job.writer.write_table("features.parquet", table, columns=COLUMNS)
    job.writer.write_table("enrichment.parquet", enriched, columns=ENRICHMENT_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return {**_figures(table, births, chosen, bounds, spec), **_ranked(enriched), **rotation.figures()}


def contrast(finetuned_base: np.ndarray, finetuned_new: np.ndarray, base_base: np.ndarray, base_new: np.ndarray) -> np.ndarray:
    """[F] how much more a latent fires in the finetuned model on new rows than in either neighbouring cell, in -1..1; NaN where it never fires.

    Parameters: mean activations per token [F] in the four cells (model, data). A latent's decoder norm would cancel out.
    """
    total = finetuned_base + finetuned_new + base_base + base_new
    with np.errstate(invalid="ignore"):
        return (finetuned_new - np.maximum(finetuned_base, base_new)) / np.where(total > 0, total, np.nan)


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """The pairs of an align step's features.parquet as `enrichment` judges features: all alive, new_top is the mean of both latents."""
    matched = table[table.partner >= 0]
    return matched.assign(
        alive=True,
        new_top=matched.pair_new_top,
        aligned_low=-matched.aligned,
        contrast_low=-matched.pair_contrast,
        excess_low=-matched.pair_excess,
        agreed_low=-matched.pair_agreed,
        agreed_contrast_low=-matched.agreed_contrast,
    ).reset_index(drop=True)


def _check(spec: AlignSpec) -> None:
    needs = ((spec.dictionaries, ALIGNED_STAGES, "dictionary"), (spec.statistics, F_STAGES, "statistics"))
    for given, wanted, what in (*needs, *([(spec.base_statistics, PATHS, "statistics on the base model")] if spec.base_statistics else [])):
        if missing := [s for s in wanted if s not in given]:
            raise UserError(f"Aligning two paths needs {what} of the stages {', '.join(wanted)}; missing: {', '.join(missing)}.")


def _firings(ref: Any, job: "Job", features: int) -> np.ndarray:
    firings = job.artifact(ref).read_table("features.parquet", columns=["firings"]).firings.to_numpy()
    if len(firings) != features:
        raise UserError(f"The statistics {ref} have {len(firings)} features, the diff has {features}: they belong to another dictionary.")
    return firings


def _same_index(decoders: dict[str, Decoder]) -> dict[str, np.ndarray]:
    """Stage -> [F] the larger of a latent's cosines with D's and M's latent of the same index: its novelty is at least that."""
    bounds = {s: np.empty(decoders[s].shape[0]) for s in F_STAGES}
    for start, stop, rows in aligned_blocks(decoders):
        for stage in F_STAGES:
            both = np.stack([cosines(rows[stage], rows[s]).numpy() for s in ("D", "M")])
            bounds[stage][start:stop] = np.where(np.isnan(both).all(0), np.nan, np.nan_to_num(both, nan=-1.0).max(0))
    return bounds


def _features(
    published: pd.DataFrame,
    alive: dict[str, np.ndarray],
    chosen: dict[str, np.ndarray],
    cosines_by_name: dict[str, dict[str, np.ndarray]],
    found: Matching,
) -> pd.DataFrame:
    table = published.copy()
    for stage in PATHS:
        table[f"alive_{stage}"] = alive[stage]
        for name, of in cosines_by_name.items():
            column = np.full(len(table), np.nan)
            column[chosen[stage]] = of[stage]
            table[f"{name}_{stage}"] = column
    mine, other = (chosen[s] for s in PATHS)
    has = found.partner >= 0
    partner, cosine, mutual = np.full(len(table), -1, np.int32), np.full(len(table), np.nan), np.zeros(len(table), bool)
    partner[mine[has]], cosine[mine] = other[found.partner[has]], found.cosine
    mutual[mine] = found.mutual
    return table.assign(partner=partner, pair_cos=cosine, mutual=mutual, same_index=partner == table.feature.to_numpy())


def _contrast(spec: AlignSpec, stage: str, job: "Job") -> np.ndarray:
    cells = []
    for ref in (spec.statistics[stage], spec.base_statistics[stage]):
        artifact = job.artifact(ref)
        mass = artifact.read_table("features.parquet", columns=["mass_base", "mass_new"])
        figures = artifact.manifest.figures
        cells += [mass[f"mass_{rows}"].to_numpy(float) / max(1, figures[f"tokens_{rows}"]) for rows in ("base", "new")]
    return contrast(*cells)


def _null_novelty(ref: Any, stage: str, job: "Job") -> np.ndarray:
    """[F, repeats] angles: how new retraining alone makes the latent of each index."""
    null = job.artifact(ref).read_table("null.parquet", columns=["axis", "repeat", "feature", "novelty"])
    return angles(by_repeat(null[null.axis == ("x" if stage == "F_D" else "y")], "novelty"))


def _novelty_p(novelty: np.ndarray, null: np.ndarray) -> np.ndarray:
    """[F] p of each latent's novelty: against that of the latents which retraining alone leaves at its index where two repeats leave one, else among all of
    the null's. What is born in F takes what latent was free: its index may hold nothing in the null, which is no reason to doubt it."""
    among_all = p_values(novelty, [], null.ravel(), [])
    if null.shape[1] < 2:
        return among_all
    return np.where(np.isfinite(null).sum(1) >= 2, own_p_values(novelty, null), among_all)


def _usual(null: np.ndarray) -> np.ndarray:
    """[F] root mean square of the null angles; the median of all where retraining leaves nothing at the index."""
    there = np.isfinite(null)
    square = np.where(there, null**2, 0.0).sum(1) / np.maximum(there.sum(1), 1)
    return np.where(there.any(1), np.sqrt(square), np.median(null[there]) if there.any() else 0.0)


def _over_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Adds what belongs to both latents of a pair, in the row of F via D's; NaN without a partner."""
    has = table.partner.to_numpy() >= 0

    def of_partner(name: str) -> np.ndarray:
        values = table[name].to_numpy(float)
        return np.where(has, values[np.maximum(table.partner.to_numpy(), 0)], np.nan)

    gain, contrasts, agreed = np.zeros(len(table)), np.zeros(len(table)), np.zeros(len(table))
    for stage, of in (("F_D", lambda name: table[name].to_numpy(float)), ("F_M", of_partner)):
        positive = np.maximum(of(f"contrast_{stage}"), 0)
        gain, contrasts = gain + (1 - of(f"novelty_{stage}")) * positive, contrasts + positive
        excess = of(f"excess_{stage}")
        agreed = agreed + np.where(excess > 0, excess * np.maximum(of(f"agreement_{stage}"), 0) ** 2, excess)
    p = np.maximum(table.p_F_D.to_numpy(float), of_partner("p_F_M"))
    both_top = mean_where_defined([table.new_top_F_D.to_numpy(float), of_partner("new_top_F_M")])
    return table.assign(
        pair_novelty=table.novelty_F_D.to_numpy() + of_partner("novelty_F_M"),
        paired_x_y=table.x.to_numpy() + of_partner("y"),
        aligned=np.where(has, gain, np.nan),
        pair_contrast=np.where(has, contrasts, np.nan),
        pair_excess=table.excess_F_D.to_numpy() + of_partner("excess_F_M"),
        pair_agreed=agreed,
        agreed_contrast=np.where(has, np.maximum(agreed, 0) * contrasts, np.nan),
        pair_p=p,
        pair_q=benjamini_hochberg(p),
        pair_new_top=np.where(has, both_top, np.nan),
    )


def _scores(spec: AlignSpec) -> tuple[str, ...]:
    left_out = (set() if spec.base_statistics else NEEDS_CONTRAST) | (set() if spec.null else NEEDS_NULL)
    return tuple(s for s in PAIR_SCORES if s not in left_out)


def _figures(
    table: pd.DataFrame,
    births: dict[str, np.ndarray],
    chosen: dict[str, np.ndarray],
    bounds: dict[str, np.ndarray],
    spec: AlignSpec,
) -> dict[str, Any]:
    paired = table[table.partner >= 0]
    new = paired[paired.feature.isin(births["F_D"]) & paired.partner.isin(births["F_M"]) & (paired.pair_cos >= spec.newborn_below)]
    carrying = {s: births[s][table[f"new_top_{s}"].to_numpy()[births[s]] >= 0.5] for s in PATHS}
    shared = int((new.feature.isin(carrying["F_D"]) & new.partner.isin(carrying["F_M"])).sum())
    covered = {path: shared / len(carrying[other]) if len(carrying[other]) else None for path, other in (("F_D", "F_M"), ("F_M", "F_D"))}
    known = [c for c in covered.values() if c is not None]
    left_out = [np.setdiff1d(np.flatnonzero(table[f"alive_{s}"]), chosen[s]) for s in PATHS]
    return {
        "pairs": len(paired),
        **{f"newborn_{s}": len(births[s]) for s in F_STAGES},
        "newborn_pairs": len(new),
        **{f"newborn_new_{s}": len(carrying[s]) for s in PATHS},
        "newborn_same_index_rate": float(new.same_index.mean()) if len(new) else None,
        "newborn_cos_median": float(new.pair_cos.median()) if len(new) else None,
        **{f"coverage_{s}": covered[s] for s in PATHS},
        "births_saturated": min(known) >= spec.saturated if known else None,
        "same_index_rate": float(paired.same_index.mean()) if len(paired) else None,
        "pair_cos_median": float(paired.pair_cos.median()) if len(paired) else None,
        "pairs_q_below_0.1": int((paired.pair_q <= LEVEL).sum()) if spec.null else None,
        "left_out": sum(map(len, left_out)),
        "left_out_novelty_at_least": min((float(bounds[s][i].min()) for s, i in zip(PATHS, left_out, strict=True) if len(i)), default=None),
    }


def _ranked(enriched: pd.DataFrame) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for row in enriched.itertuples(index=False):
        name = row.measure if row.measure != "score" else "published_x_y"
        for short, value in (("auroc", row.auroc), ("average_precision", row.average_precision)):
            figures[f"{short}_{name.removesuffix('_low')}"] = None if value is None or not np.isfinite(value) else float(value)
        figures |= {"pairs_flagged": int(row.flagged)}
    return figures


COLUMNS = {
    "feature": ("index", "latent of F via D"),
    "x": ("cosine", "published: D and F via D at this index"),
    "y": ("cosine", "published: M and F via M at this index"),
    "score": ("sum of cosines", "published: x + y at this index; low is suspicious"),
    "alive_F_D": ("flag", "latent of this index, enough firings in F via D"),
    "alive_F_M": ("flag", "latent of this index, enough firings in F via M"),
    "novelty_F_D": ("cosine", "largest with any latent of D or M, of F via D's latent (empty: not a candidate); low is new"),
    "novelty_F_M": ("cosine", "the same of F via M's latent of this index"),
    "partner": ("index", "latent of F via M that F via D's is matched with; -1: none"),
    "pair_cos": ("cosine", "of the two: agreement of the two paths"),
    "mutual": ("flag", "each other's nearest among all candidates"),
    "same_index": ("flag", "whether both have the same index"),
    "paired_x_y": ("sum of cosines", "x of F via D's latent + y of its partner"),
    "pair_novelty": ("sum of cosines", "novelty of the pair's two latents; low is suspicious"),
    "contrast_F_D": ("share", "2 x 2 activation contrast of F via D's latent (empty: not measured, or it never fires)"),
    "contrast_F_M": ("share", "the same of F via M's latent of this index"),
    "aligned": ("score", "(1 - novelty) x contrast where positive, summed over the pair; high is suspicious"),
    "pair_contrast": ("share", "the pair's two contrasts where positive, summed"),
    "excess_F_D": ("radians", "angle of its novelty beyond what retraining alone leaves at its index, F via D (empty: no retrain null)"),
    "excess_F_M": ("radians", "the same of F via M's latent of this index"),
    "pair_excess": ("radians", "sum of the pair's two; high is suspicious"),
    "agreement_F_D": (
        "cosine",
        "largest with any alive latent of F via M or of the direct finetune, of F via D's latent (empty: not a candidate)",
    ),
    "agreement_F_M": ("cosine", "largest with any alive latent of F via D or of the direct finetune, of F via M's latent of this index"),
    "pair_agreed": ("radians", "sum of the pair's two excesses, each where positive times its squared agreement; high is suspicious"),
    "agreed_contrast": ("score", "pair_agreed x pair_contrast where positive; high is suspicious"),
    "p_F_D": ("probability", "of as new a latent by retraining alone, of F via D's (empty: no retrain null)"),
    "p_F_M": ("probability", "the same of F via M's latent of this index"),
    "pair_p": ("probability", "the larger of the pair's two"),
    "pair_q": ("false discovery rate", "at which the pair would be called, Benjamini and Hochberg over the pairs"),
    "new_top_F_D": ("share", "new rows among the top examples of F via D's latent"),
    "new_top_F_M": ("share", "the same of F via M's latent of this index"),
    "pair_new_top": ("share", "mean of the pair's two latents"),
}
