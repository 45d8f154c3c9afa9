"""The labels step: who is asked about, what is shown, every answer, and what the answers say together.

Tables: `labels.parquet` (a row per feature asked about), `examples.parquet` (what was shown: rows and positions), `confusion.parquet`. A language model's
answers lie beside them as they came, `answers/<feature>.json`.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.enrichment import carries_new_data
from stagediff.errors import UserError
from stagediff.evidence.labels.asking import Kept, ask_all
from stagediff.evidence.labels.choice import Choice, choose
from stagediff.evidence.labels.cost import cost_of
from stagediff.evidence.labels.excerpts import Place, Shown, read
from stagediff.evidence.labels.judge import CONFUSION_COLUMNS, confusion, figures
from stagediff.evidence.labels.keywords import Keywords
from stagediff.evidence.labels.labeller import Answer, Labeller
from stagediff.evidence.labels.servers import check_client, connect, key_of
from stagediff.evidence.labels.spec import LabelsSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "check", "compute"]

log = logging.getLogger("stagediff")

BLOCK = 256
"""Features whose examples are in memory at once."""
DIFF_COLUMNS = ["feature", "score", "alive", "alive_F_D", "born", "selected", "new_top"]


def check(spec: LabelsSpec) -> None:
    """Raises UserError where a client or a key is missing, before anything of the run is computed."""
    if spec.model is not None:
        check_client(spec.labeller)
        key_of(spec.labeller, spec.model.base_url, spec.requests)


def compute(spec: LabelsSpec, job: "Job") -> dict[str, Any]:
    """The step. Raises UserError for a server that refuses or is not there, NoAnswerError for one that does not answer now."""
    began = time.monotonic()
    features = job.artifact(spec.diff).read_table("features.parquet", columns=DIFF_COLUMNS)
    choice = choose(features, spec)
    if not choice.selected.any():
        log.info("the diff's cut selects nothing: only newborn and random features are labelled")
    labeller: Labeller = Keywords(spec.topics, spec.share) if spec.model is None else connect(spec)
    answers, places = _answers(spec, job, labeller, choice)
    table = _table(choice, answers, places, carries_new_data(features))
    job.writer.write_table("labels.parquet", table, columns=COLUMNS)
    job.writer.write_table("examples.parquet", _examples(answers, places), columns=EXAMPLE_COLUMNS)
    job.writer.write_table("confusion.parquet", confusion(table), columns=CONFUSION_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    spent = {name: sum(getattr(a, name) for a in answers.values()) for name in ("tokens_in", "tokens_out")}
    repeated = sum(a.asked > 1 for a in answers.values())
    who = {"labeller": spec.labeller, **({"model": spec.model.name, **spent, "asked_twice": repeated} if spec.model else {})}
    return {**figures(table), **who}


def _answers(spec: LabelsSpec, job: "Job", labeller: Labeller, choice: Choice) -> tuple[dict[int, Answer], dict[int, tuple[Place, ...]]]:
    """Feature -> answer, and feature -> where what was shown of it stands."""
    order = [int(f) for f in choice.feature]
    kept = Kept(job.writer) if labeller.is_costly else None
    answers = {f: a for f in order if (a := kept.get(f)) is not None} if kept else {}
    missing, places = len(order) - len(answers), dict[int, tuple[Place, ...]]()
    with job.progress.task("labels", len(order), "features", done=len(answers)) as task:
        for start in range(0, len(order), BLOCK):
            block = order[start : start + BLOCK]
            shown = _shown(spec, job, block)
            places |= {f: shown[f].places for f in block}
            questions = {f: shown[f].question for f in block if f not in answers}
            if kept and questions and start == 0:
                log.info(
                    "labels: %d of %d answers are there already; %s", len(answers), len(order), cost_of(spec, questions.values(), missing)
                )
            for feature, answer in ask_all(labeller, list(questions), questions.__getitem__, kept.put if kept else _keep_nothing):
                answers[feature] = answer
                task.advance(1)
    return answers, places


def _shown(spec: LabelsSpec, job: "Job", features: list[int]) -> dict[int, Shown]:
    shown = read(job.store, spec, features)
    if silent := [f for f in features if not shown[f].question.excerpts]:
        raise UserError(
            f"The statistics {spec.statistics} have no examples of feature {silent[0]}, which the diff {spec.diff} calls alive: they belong to different "
            "dictionaries."
        )
    return shown


def _keep_nothing(feature: int, answer: Answer) -> None:
    pass


def _table(choice: Choice, answers: dict[int, Answer], places: dict[int, tuple[Place, ...]], carries: np.ndarray) -> pd.DataFrame:
    given = [answers[int(f)] for f in choice.feature]
    columns = {
        "feature": choice.feature.astype(np.int32),
        "group": choice.first_group(),
        **choice.groups(),
        "label": [a.label for a in given],
        "flagged": [a.flagged for a in given],
        "unclear": [a.unclear for a in given],
        "topic": [a.topic for a in given],
        "examples": np.array([len(places[int(f)]) for f in choice.feature], np.int16),
        "examples_flagged": np.array([len(a.examples) for a in given], np.int16),
        "carries": carries[choice.feature],
        "order": np.arange(len(given), dtype=np.int32),
        "asked": np.array([a.asked for a in given], np.int8),
        "answer": [a.raw for a in given],
    }
    return pd.DataFrame(columns).sort_values("feature").reset_index(drop=True)[list(COLUMNS)]


def _examples(answers: dict[int, Answer], places: dict[int, tuple[Place, ...]]) -> pd.DataFrame:
    rows = [
        (feature, rank, place.row, place.position, place.start, place.tokens, rank in answers[feature].examples)
        for feature in sorted(places)
        for rank, place in enumerate(places[feature])
    ]
    kinds = dict(zip(EXAMPLE_COLUMNS, (np.int32, np.int16, np.int64, np.int32, np.int32, np.int32, bool), strict=True))
    return pd.DataFrame(rows, columns=list(EXAMPLE_COLUMNS)).astype(kinds)


COLUMNS = {
    "feature": ("index", "the same in all stages"),
    "group": ("name", "selected, born or random: the first of these that it is in"),
    "selected": ("flag", "by the diff's cut"),
    "born": ("flag", "dead in S, alive in F via D"),
    "random": ("flag", "drawn from all alive features"),
    "label": ("text", "what it stands for, in the labeller's words; keywords: the token on which it is strongest"),
    "flagged": ("flag", "said to be related to a topic (not set where the answer is unclear)"),
    "unclear": ("flag", "nothing that could be understood was answered, twice"),
    "topic": ("text", "the topic that it is related to; keywords: the one that most examples hold; empty: none"),
    "examples": ("examples", "shown to the labeller"),
    "examples_flagged": ("examples", "of these, related to a topic"),
    "carries": ("flag", "the truth, not shown: at least half of its top examples in F via D and F via M are new rows"),
    "order": ("index", "place in the order of questions"),
    "asked": ("times", "the question was put"),
    "answer": ("text", "a language model's last answer as it came"),
}
EXAMPLE_COLUMNS = {
    "feature": ("index", "the same in all stages"),
    "rank": ("index", "0 is the strongest"),
    "row": ("index", "token row of the mix"),
    "position": ("index", "of the strongest token in the row"),
    "start": ("index", "of the first token shown"),
    "tokens": ("tokens", "shown"),
    "flagged": ("flag", "related to a topic, says the labeller"),
}
