"""The rivals step: every method on one question, with equal numbers of candidates and what it cost.

Asked is for features (pairs, latents) that carry the new data, by the one rule of all methods. A method ranks its own alive candidates, low score first;
AUROC and average precision are of that ranking. n is the number of the diff's features that carry the new data, the same for all: how many of a method's
first n and 2 n candidates carry the new data, and what share of its own carriers that is. Methods split the same behaviour into different numbers of
latents, so that hits of different methods are not hits of the same features.

Tables hold no timings: seconds are read from the trainings' manifests where the table is shown (`seconds_of`).
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.aligned import pairs
from stagediff.diff.enrichment import carries_new_data
from stagediff.diff.ranking import auroc, average_precision
from stagediff.evidence.rivals.latents import CROSSCODER_SCORES, DIFFERENCE_SCORES
from stagediff.evidence.rivals.spec import RivalsSpec

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.steps import Job
    from stagediff.store import Store

__all__ = ["COLUMNS", "STAGES_OF", "compute", "judge", "seconds_of"]

BY_INDEX = ("score", "x", "y", "cos_s_d", "cos_s_m", "cos_s_f_direct")
BY_PAIR = ("pair_novelty", "excess_low", "agreed_low", "agreed_contrast_low", "aligned_low", "contrast_low", "paired_x_y")
LABELLED = ("agreed_contrast_low", "aligned_low", "contrast_low")
BOTH_PATHS = ("S", "D", "M", "F_D", "F_M")
STAGES_OF: dict[str, tuple[str, ...]] = {
    "score": BOTH_PATHS,
    "x": ("S", "D", "F_D"),
    "y": ("S", "M", "F_M"),
    "cos_s_d": ("S", "D"),
    "cos_s_m": ("S", "M"),
    "cos_s_f_direct": ("S", "F_direct"),
    **dict.fromkeys(BY_PAIR, BOTH_PATHS),
}
"""Score of the diff -> the stages it rests on."""

COLUMNS = {
    "method": ("name", "whose score it is: diff, or a rival"),
    "measure": ("name", "the score; its low end is found"),
    "unit": ("name", "what is ranked: feature (one index in all stages), pair (matched latents of both F), latent"),
    "needs_labels": ("flag", "whether the score needs to know which rows are new"),
    "candidates": ("count", "alive ones with this score"),
    "carriers": ("count", "of them, those that carry the new data (at least half of the top examples are new rows)"),
    "auroc": ("probability", "that one that carries the new data has a lower score than one that does not"),
    "average_precision": ("precision", "of the ranking; by chance it is carriers / candidates"),
    "n": ("count", "the diff's features that carry the new data: the same number of candidates for every method"),
    "hits_n": ("count", "carriers among the first n"),
    "recall_n": ("share", "hits_n / carriers"),
    "hits_2n": ("count", "carriers among the first 2 n"),
    "recall_2n": ("share", "hits_2n / carriers"),
    "tokens": ("tokens", "trained on by all dictionaries that the score rests on, from the first one"),
}


def compute(spec: RivalsSpec, job: "Job") -> dict[str, Any]:
    """Writes rivals.parquet (COLUMNS), a row per score."""
    began = time.monotonic()
    features = job.artifact(spec.diff).read_table("features.parquet")
    matched = pairs(job.artifact(spec.align).read_table("features.parquet"))
    n = int((features.alive.to_numpy(bool) & carries_new_data(features)).sum())
    rows = [judge(features, "diff", m, "feature", n) for m in BY_INDEX]
    rows += [judge(matched, "diff", m, "pair", n) for m in BY_PAIR if np.isfinite(matched[m].to_numpy(float)).any()]
    for method, ref in spec.latents.items():
        latents = job.artifact(ref).read_table("latents.parquet")
        scores = CROSSCODER_SCORES if method.startswith("crosscoder") else DIFFERENCE_SCORES
        rows += [judge(latents, method, m, "latent", n) for m in scores]
    for row in rows:
        of = STAGES_OF[row["measure"]] if row["method"] == "diff" else (row["method"],)
        row["tokens"] = sum(_tokens(job.store, ref) for ref in _each_once(spec, of))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    job.writer.write_table("rivals.parquet", table, columns=COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    figures: dict[str, Any] = {"n": n}
    for row in table.itertuples(index=False):
        name = row.measure if row.method == "diff" else f"{row.method}_{row.measure}"
        figures[f"average_precision_{name}"] = _plain(row.average_precision)
    return figures


def judge(table: pd.DataFrame, method: str, measure: str, unit: str, n: int) -> dict[str, Any]:
    """A row of the table but for its tokens. `table`: columns alive, new_top and `measure`, a row per candidate; of equal scores the first row wins."""
    value = table[measure].to_numpy(float)
    able = table.alive.to_numpy(bool) & np.isfinite(value)
    value, carries = value[able], carries_new_data(table)[able]
    ranked = carries[np.argsort(value, kind="stable")]
    row: dict[str, Any] = {
        "method": method,
        "measure": measure,
        "unit": unit,
        "needs_labels": measure in LABELLED,
        "candidates": len(value),
        "carriers": int(carries.sum()),
        "auroc": _or_nan(auroc(carries, -value)),
        "average_precision": _or_nan(average_precision(carries, -value)),
        "n": n,
    }
    for times, name in ((1, "n"), (2, "2n")):
        hits = int(ranked[: times * n].sum())
        row |= {f"hits_{name}": hits, f"recall_{name}": hits / row["carriers"] if row["carriers"] else float("nan")}
    return row


def seconds_of(store: "Store", spec: RivalsSpec, method: str, measure: str) -> float | None:
    """Seconds that the trainings behind a score took, from their manifests; a training that was continued is taken at the rate of its last part.

    None where one of them says nothing (an imported dictionary).
    """
    of = STAGES_OF[measure] if method == "diff" else (method,)
    total = 0.0
    for ref in _each_once(spec, of):
        notes = store.artifact(ref).manifest.notes
        if not notes.get("tokens_this_run"):
            return None
        total += notes["training_seconds"] * _tokens(store, ref) / notes["tokens_this_run"]
    return total


def _each_once(spec: RivalsSpec, stages: Iterable[str]) -> "list[Ref]":
    return list(dict.fromkeys(ref for stage in stages for ref in spec.trainings[stage]))


def _tokens(store: "Store", ref: "Ref") -> int:
    budget = getattr(store.artifact(ref).spec(), "budget", None)
    return budget.tokens // budget.batch * budget.batch if budget else 0


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
