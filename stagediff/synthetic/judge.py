"""The step planted-track: reads what tracking wrote about a planted chain, scores it, and keeps the tables behind the score."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.sae.dictionary import SAE
from stagediff.synthetic.rows import TOPICS
from stagediff.synthetic.score import COLUMNS, Answer, figures, match, score
from stagediff.synthetic.spec import CHECKPOINT_STEPS, PlantedTokensSpec, PlantedTrackSpec
from stagediff.synthetic.truth import MERGING, Block, Truth, truth
from stagediff.synthetic.world import BLOCK_ROWS, Planted
from stagediff.track.spec import FormationSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["compute"]

MAINTAINED = "maintaining"
TURNED = "concept turned"
"""Reason for which a feature has no pattern although something happened to it: reported as an event of that name."""


def compute(spec: PlantedTrackSpec, job: "Job") -> dict[str, Any]:
    """Writes features.parquet, kinds.parquet, confusion.parquet, roles.parquet and events.parquet (PlantedTrackSpec)."""
    planted = Planted(spec.world)
    formation = job.artifact(spec.formation).spec()
    assert isinstance(formation, FormationSpec)
    true = truth(planted, lambda: _blocks(spec, job), formation.rule, spec.world.seed)
    answer = _answer(spec, job)
    cosines = _cosines(spec, job, planted, answer.kinds)
    latent, cosine = match(cosines, true.home, spec.measures.match_cosine)
    kin = [np.flatnonzero(cosines[t][g] >= spec.measures.match_cosine) for g, t in enumerate(true.home)]
    table = score(true, answer, latent, kin, spec.measures)
    table.insert(1, "role", [f.role for f in planted.features])
    table.insert(3, "cosine", cosine)
    kinds = _kinds(true, answer, latent)
    known = kinds[~kinds.truth.isin(["", "dead"])]
    write = job.writer.write_table
    write("features.parquet", table, columns={**COLUMNS, **MORE_COLUMNS})
    write("kinds.parquet", kinds, columns=KIND_COLUMNS)
    write("confusion.parquet", known.groupby(["truth", "found"]).size().reset_index(name="count"), columns=CONFUSION_COLUMNS)
    write("roles.parquet", _roles(table), columns=ROLE_COLUMNS)
    write("events.parquet", _events(true, answer, latent), columns=EVENT_COLUMNS)
    births = table[table.planted_event == "appearing"]
    return {
        **figures(table),
        "births_matched": float((births.latent >= 0).mean()) if len(births) else None,
        "explained_variance": float(np.mean([job.artifact(ref).manifest.figures["ev"] for ref in spec.dictionaries])),
    }


def _blocks(spec: PlantedTrackSpec, job: "Job") -> Iterator[Block]:
    stored = job.artifact(spec.tokens)
    token_spec = stored.spec()
    assert isinstance(token_spec, PlantedTokensSpec)
    rows, topics, split = stored.array("rows"), stored.array(TOPICS), token_spec.split
    n = rows.shape[0]
    for low in range(0, n, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, n)
        yield rows.read_rows(low, high), topics.read_rows(low, high), split, low // BLOCK_ROWS


def _answer(spec: PlantedTrackSpec, job: "Job") -> Answer:
    kinds = job.artifact(spec.kinds).read_table("kinds.parquet", columns=["feature", "step", "kind"])
    by_step = kinds.pivot(index="step", columns="feature", values="kind").sort_index()
    formed = job.artifact(spec.formation).read_table("formed.parquet", columns=["feature", "set", "measure", "formed_step"])
    formed = formed[(formed["set"] == "top") & (formed.measure == "activation_cosine")].set_index("feature").formed_step
    tracked = job.artifact(spec.patterns)
    patterns = tracked.read_table("patterns.parquet", columns=["feature", "from_step", "pattern", "reason"])
    turned = patterns.reason == TURNED
    happened = patterns[turned | (patterns.pattern.notna() & (patterns.pattern != MAINTAINED))]
    merges = tracked.read_table("merges.parquet", columns=["feature", "partner", "from_step"])
    events = [
        pd.DataFrame({"latent": happened.feature, "partner": -1, "step": happened.from_step, "pattern": happened.pattern.fillna(TURNED)}),
        pd.DataFrame({"latent": merges.feature, "partner": merges.partner, "step": merges.from_step, "pattern": MERGING}),
    ]
    table = pd.concat(events, ignore_index=True)
    table["checkpoint"] = table.pop("step") // CHECKPOINT_STEPS
    at = pd.to_numeric(formed.sort_index()).to_numpy(float, na_value=np.nan) / CHECKPOINT_STEPS
    return Answer(by_step.fillna("").to_numpy(str), at, table)


def _cosines(spec: PlantedTrackSpec, job: "Job", planted: Planted, kinds: np.ndarray) -> list[np.ndarray]:
    """Planted directions with decoder rows [G, F] at every checkpoint; -1 where the latent is dead there."""
    out = []
    for t, ref in enumerate(spec.dictionaries):
        rows = SAE.load(job.artifact(ref)).directions().double().numpy()
        out.append(np.where(kinds[t] == "dead", -1.0, planted.directions[t] @ rows.T))
    return out


def _kinds(true: Truth, answer: Answer, latent: np.ndarray) -> pd.DataFrame:
    checkpoints, features = true.kinds.shape
    found = np.where(latent >= 0, answer.kinds[:, latent], "unmatched")
    columns = {
        "feature": np.tile(np.arange(features), checkpoints),
        "checkpoint": np.repeat(np.arange(checkpoints), features),
        "truth": true.kinds.ravel(),
        "found": np.where(found == "", "none", found).ravel(),
    }
    return pd.DataFrame(columns)


def _roles(table: pd.DataFrame) -> pd.DataFrame:
    """What goes wrong, by what was planted."""
    flags = ["kind_right", "formed_right", "patterns_right"]
    numbers = table.assign(matched=table.latent >= 0)[["role", "matched", *flags]].astype({name: "Float64" for name in ("matched", *flags)})
    return numbers.groupby("role").agg(features=("matched", "size"), **{name: (name, "mean") for name in ("matched", *flags)}).reset_index()


def _events(true: Truth, answer: Answer, latent: np.ndarray) -> pd.DataFrame:
    planted = pd.DataFrame([(e.feature, e.checkpoint, e.pattern) for e in true.events], columns=["feature", "checkpoint", "pattern"])
    of = pd.DataFrame({"feature": np.arange(len(latent)), "latent": latent})
    found = of.merge(answer.events, on="latent")[["feature", "checkpoint", "pattern"]]
    both = pd.concat([planted.assign(what="planted"), found.assign(what="found")])
    return both.sort_values(["feature", "checkpoint", "what", "pattern"], ignore_index=True)


MORE_COLUMNS = {
    "role": ("name", "what was planted"),
    "cosine": ("cosine", "of planted direction and decoder row at its home (unmatched: the largest there is)"),
}
KIND_COLUMNS = {
    "feature": ("index", "planted feature"),
    "checkpoint": ("index", "of the planted run"),
    "truth": ("name", "planted kind (empty: changing; dead: not there)"),
    "found": ("name", "kind of the latent (none: no kind; unmatched: no latent)"),
}
CONFUSION_COLUMNS = {
    "truth": ("name", "planted kind"),
    "found": ("name", "kind of the latent"),
    "count": ("checkpoints", "over all features"),
}
ROLE_COLUMNS = {
    "role": ("name", "what was planted"),
    "features": ("features", "planted with this role"),
    "matched": ("share", "of them that have a latent"),
    "kind_right": ("share", "with the right kind"),
    "formed_right": ("share", "of those with a formation time, found in time"),
    "patterns_right": ("share", "with the event found, if there is one, and no false one"),
}
EVENT_COLUMNS = {
    "feature": ("index", "planted feature"),
    "checkpoint": ("index", "the one before the event"),
    "pattern": ("name", "of PATTERNS, merging, or concept turned"),
    "what": ("name", "planted or found (on the feature's latent, its life and what the index stood for besides)"),
}
