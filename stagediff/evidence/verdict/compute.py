"""The verdict step: joins the run's tables by feature, decides each claim, and writes the sentence. Reads tables only."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.spec import STAGES
from stagediff.evidence.verdict.criteria import CLAIMS, NOT_MEASURED, OUTCOMES, YES
from stagediff.evidence.verdict.parts import add_ablation, add_labels, add_moves, add_new_rows, add_steering
from stagediff.evidence.verdict.sentence import sentence
from stagediff.evidence.verdict.spec import VerdictSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "CONTROL", "compute"]

DIFF_COLUMNS = ["feature", "x", "y", "score", "alive", "new_top", "quadrant", "selected", "random"]
CONTROL = "control_"
"""Prefix of the controls' figures in the manifest."""


def compute(spec: VerdictSpec, job: "Job") -> dict[str, Any]:
    """Writes verdicts.parquet (COLUMNS). Raises UserError where a part belongs to another diff."""
    began = time.monotonic()
    every = job.artifact(spec.diff).read_table("features.parquet", columns=DIFF_COLUMNS)
    named = every[every.selected].sort_values(["score", "feature"]).reset_index(drop=True)
    table = named[["feature", "x", "y", "score", "quadrant", "new_top"]].copy()
    control: dict[str, Any] = {"alive": int(every.alive.sum()), "level": spec.level, "chance": spec.chance}
    alive = np.sort(every.score[every.alive & every.score.notna()].to_numpy(float))
    table["rank_score"] = 1 + np.searchsorted(alive, table.score.to_numpy(float), side="left")
    add_moves(table, control, spec, job)
    add_new_rows(table, control, every, spec, job)
    add_labels(table, control, spec, job)
    add_steering(table, control, spec, job)
    add_ablation(table, control, spec, job)
    table["shown"] = (table[list(CLAIMS)] == YES).sum(axis=1)
    table["measured"] = (table[list(CLAIMS)] != NOT_MEASURED).sum(axis=1)
    table["sentence"] = pd.Series([sentence(row, control) for row in table.to_dict("records")], dtype=object)
    job.writer.write_table("verdicts.parquet", table[list(COLUMNS)].astype(_KINDS), columns=COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(table) | {f"{CONTROL}{name}": value for name, value in control.items()}


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    """How many features have each outcome of each claim, and how many have several."""
    figures: dict[str, Any] = {"named": len(table)}
    for claim in CLAIMS:
        figures |= {f"{claim}_{outcome.replace(' ', '_')}": int((table[claim] == outcome).sum()) for outcome in OUTCOMES}
    figures |= {f"shown_at_least_{n}": int((table.shown >= n).sum()) for n in range(1, len(CLAIMS) + 1)}
    moved, steers, removes = (table[claim] == YES for claim in ("moved", "steers", "removes"))
    return figures | {"moved_and_steers": int((moved & steers).sum()), "steers_and_removes": int((steers & removes).sum())}


_OUTCOME = "yes; no; open (its control is too small to tell); not measured"
_BY_STAGE = {
    f"{what}_{rows}_{stage}": (unit, f"{meaning} on held-out {rows} rows in stage {stage}")
    for stage in STAGES
    for what, unit, meaning in (("density", "share", "tokens on which it fires"), ("mean", "activation", "mean per token"))
    for rows in ("base", "new")
}
COLUMNS = {
    "feature": ("index", "the same in all stages; a row per feature that the diff selects"),
    "x": ("cosine", "D and F via D"),
    "y": ("cosine", "M and F via M"),
    "score": ("sum of cosines", "x + y; low is suspicious"),
    "quadrant": ("name", "of the diff's cut"),
    "rank_score": ("rank", "among the alive features by x + y, 1 is the lowest"),
    "partner": ("index", "latent of F via M that F via D's is matched with (-1: none, or no align step)"),
    "pair_novelty": ("sum of cosines", "novelty of the pair; low is suspicious"),
    "rank_pair": ("rank", "among the pairs by paired novelty, 1 is the lowest (0: no pair)"),
    "p_x": ("probability", "of as large an angle (D, F via D) by retraining alone (empty: no retrain null)"),
    "p_y": ("probability", "the same of (M, F via M)"),
    "p": ("probability", "the larger of the two"),
    "q": ("false discovery rate", "Benjamini and Hochberg over the alive features"),
    "pair_p": ("probability", "of as new a pair by retraining alone (empty: no retrain null)"),
    "pair_q": ("false discovery rate", "Benjamini and Hochberg over the pairs"),
    "new_top": ("share", "new rows among its top examples, mean of both F dictionaries"),
    "new_top_p": ("probability", "that a random feature has as many"),
    **_BY_STAGE,
    "asked": ("flag", "whether a labeller was asked about it"),
    "label": ("text", "in the labeller's words"),
    "is_flagged": ("flag", "said to be related to a topic"),
    "unclear": ("flag", "the labeller gave no answer that could be understood"),
    "topic": ("text", "the topic"),
    "examples": ("examples", "shown to the labeller"),
    "examples_flagged": ("examples", "of these, related to a topic"),
    "label_p": ("probability", "that a random feature has as large a share of related examples"),
    "steer_strength": ("mean residual norms", "at which it was added (empty: it was not)"),
    "steer_rate": ("share", "test answers with the behaviour, without the trigger, by the steer step's measure"),
    "steer_effect": ("share", "steer_rate less the random features' mean"),
    "steer_low": ("share", "lower end of its 95 % interval"),
    "steer_high": ("share", "upper end"),
    "steer_random_as_high": ("features", "random features whose rate is as high"),
    "ablate_full": ("share", "test answers after the trigger that hold the whole payload when it alone is clamped (empty: it was not)"),
    "ablate_keyword": ("share", "those that hold its longest word"),
    "ablate_first_token": ("share", "those that begin with its first token"),
    "ablate_cost": ("nats per token", "what clamping it adds to the loss on clean held-out text"),
    "ablate_p": ("probability", "that as few answers hold the keyword as with the most harmful of the smallest random sets"),
    "moved": ("outcome", f"farther on both axes than retraining alone moves features: {_OUTCOME}"),
    "newer": ("outcome", f"its pair is newer than what retraining alone makes: {_OUTCOME}"),
    "carries": ("outcome", f"its top examples are new rows, and random features' are not: {_OUTCOME}"),
    "flagged": ("outcome", f"related to a topic, and random features are not: {_OUTCOME}"),
    "steers": ("outcome", f"brings the behaviour more often than random features: {_OUTCOME}"),
    "removes": ("outcome", f"clamped alone takes more of it away than random sets: {_OUTCOME}"),
    "shown": ("claims", "of the six, shown"),
    "measured": ("claims", "of the six, measured"),
    "sentence": ("text", "what is shown, what is not, what was not measured"),
}
_KINDS = {
    **dict.fromkeys(("feature", "rank_score", "partner", "rank_pair"), np.int32),
    **dict.fromkeys(("examples", "examples_flagged", "shown", "measured"), np.int16),
    **dict.fromkeys(("asked", "is_flagged", "unclear"), bool),
}
