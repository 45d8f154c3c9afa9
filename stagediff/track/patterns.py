"""The step `patterns`: what happened to every feature between consecutive checkpoints (SAE-Track, arXiv 2412.17626; method.md, section 3).

Index i is the same feature at all checkpoints, because each dictionary is carried on from the one before. So a pattern follows from its two kinds:

    from \\ to   token               concept           noise        dead
    token       maintaining (1)     token_to_concept  losing       vanishing
    concept     concept_to_token    maintaining (2)   losing       vanishing
    noise       grouping            grouping          maintaining  vanishing
    dead        appearing           appearing         appearing    null

Noise too faint to be a feature counts as dead here (`faint`). (1) the same token; else token_to_token. (2) where its decoder turned little
(PatternRule.concept_cosine); else null: the rule for kinds says that a concept's examples are alike, not which concept they are of. A feature that is alive
without a kind (too few examples) appears and vanishes like any other; its other patterns are null. Which features merged: `merges`.
"""

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.track.columns import named
from stagediff.track.decoders import ChainDecoders
from stagediff.track.faint import faint, strengths
from stagediff.track.firing import firing_shares
from stagediff.track.merges import Shares, find_merges, strongest_places
from stagediff.track.probe import Probe
from stagediff.track.spec import KINDS, PATTERNS, KindsSpec, PatternsSpec, Point

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["REASONS", "compute", "pattern_of"]

REASONS = ("dead at both", "no kind at from_step", "no kind at to_step", "no kind at both", "concept turned", "faint or dead at both")
TOKEN, CONCEPT, NOISE, DEAD = range(len(KINDS))
UNKNOWN = -1


def compute(spec: PatternsSpec, job: "Job") -> dict[str, Any]:
    """Writes patterns.parquet, merges.parquet and counts.parquet (PatternsSpec). Raises UserError where `kinds` is not of these points."""
    began = time.monotonic()
    examples = _check(spec, job)
    table = job.artifact(spec.kinds).read_table("kinds.parquet", columns=["feature", "step", "kind", "token"])
    table = table.sort_values(["step", "feature"], ignore_index=True)
    kind = pd.Categorical(table.kind, list(KINDS)).codes.reshape(len(spec.points), -1)
    token, names = pd.factorize(table.token)
    token = token.reshape(kind.shape)
    features = ChainDecoders(job, [p.dictionary for p in spec.points]).features
    if features != kind.shape[1]:
        raise UserError(
            f"The chain's dictionaries have {features:,} features, but the kinds {spec.kinds} are of {kind.shape[1]:,}: they belong to another chain."
        )
    probe = Probe(spec.points, job)
    relative = strengths(spec, job, kind, examples)
    is_faint = faint(kind, relative, spec.rule.faint)
    there = np.where(is_faint, DEAD, kind)
    patterns, merges, cut = [], [], 0
    with job.progress.task("patterns", len(spec.points) - 1, "intervals") as task:
        for t, (earlier, later) in enumerate(pairwise(spec.points)):
            decoders = ChainDecoders(job, (earlier.dictionary, later.dictionary))
            alive = np.flatnonzero((there[t] != DEAD) & (there[t + 1] != DEAD))
            cosine, before, after = _turned(decoders, alive)
            pattern, reason = pattern_of(there[t], there[t + 1], token[t] == token[t + 1], cosine, spec.rule.concept_cosine)
            reason[(reason == REASONS.index("dead at both")) & (is_faint[t] | is_faint[t + 1])] = REASONS.index("faint or dead at both")
            columns = {
                "feature": np.arange(len(pattern), dtype=np.int32),
                "from_step": earlier.step,
                "to_step": later.step,
                "pattern": named(pattern, PATTERNS),
                "from_kind": named(kind[t], KINDS),
                "to_kind": named(kind[t + 1], KINDS),
                "from_token": named(token[t], names),
                "to_token": named(token[t + 1], names),
                "from_strength": relative[t],
                "to_strength": relative[t + 1],
                "cosine": cosine,
                "reason": named(reason, REASONS),
            }
            patterns.append(pd.DataFrame(columns))
            places = strongest_places(job.artifact(earlier.statistics), examples, features, probe)
            found, blocks_cut = find_merges(before, after, _shares((earlier, later), places, alive, probe, job), spec.rule, job.device)
            for name in ("feature", "partner"):
                found[name] = alive[found[name]].astype(np.int32)
            merges.append(found.assign(from_step=earlier.step, to_step=later.step)[list(MERGE_COLUMNS)])
            cut += blocks_cut
            task.advance()
    table, merged = pd.concat(patterns, ignore_index=True), pd.concat(merges, ignore_index=True)
    counts = _counts(table)
    job.writer.write_table("patterns.parquet", table, columns=PATTERN_COLUMNS)
    job.writer.write_table("merges.parquet", merged, columns=MERGE_COLUMNS)
    job.writer.write_table("counts.parquet", counts, columns=COUNT_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    total = counts.groupby("pattern")["count"].sum()
    figures = {"features": kind.shape[1], "intervals": len(patterns)} | {name: int(total[name]) for name in PATTERNS}
    figures |= {"without_pattern": int(table.pattern.isna().sum()), "faint": int(is_faint.sum())}
    return figures | {"merged": len(merged), "merge_blocks_cut": cut}


def pattern_of(
    before: np.ndarray, after: np.ndarray, same_token: np.ndarray, cosine: np.ndarray, concept_cosine: float
) -> tuple[np.ndarray, np.ndarray]:
    """(pattern, reason) of features, arrays [F], as indices into PATTERNS and REASONS; -1: none.

    `before`, `after`: kinds as indices into KINDS, -1 for none; `cosine`: of the decoder rows, NaN (a row is zero) counts as turned.
    """
    known = np.minimum(before, after) >= 0
    meant = np.isin(before, (TOKEN, CONCEPT)), np.isin(after, (TOKEN, CONCEPT))
    turned = known & (before == CONCEPT) & (after == CONCEPT) & ~(cosine >= concept_cosine)
    rules = {
        "appearing": (before == DEAD) & (after != DEAD),
        "vanishing": (before != DEAD) & (after == DEAD),
        "token_to_token": (before == TOKEN) & (after == TOKEN) & ~same_token,
        "maintaining": known & (before == after) & (before != DEAD) & ~turned,
        "token_to_concept": (before == TOKEN) & (after == CONCEPT),
        "concept_to_token": (before == CONCEPT) & (after == TOKEN),
        "grouping": (before == NOISE) & meant[1],
        "losing": meant[0] & (after == NOISE),
    }
    pattern = np.select(list(rules.values()), [PATTERNS.index(name) for name in rules], -1)
    nothing = (before == UNKNOWN).astype(int) + 2 * (after == UNKNOWN)  # 1: at from, 2: at to, 3: at both
    reason = np.select([pattern >= 0, (before == DEAD) & (after == DEAD), turned], [-1, 0, REASONS.index("concept turned")], nothing)
    return pattern, reason


def _shares(points: tuple[Point, Point], places: np.ndarray, alive: np.ndarray, probe: Probe, job: "Job") -> Shares:
    """Loads one dictionary at a time, and none where there is no pair to look at."""

    def shares(is_later: bool, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        point = points[is_later]
        sae = SAE.load(job.artifact(point.dictionary)).to(job.device)
        return firing_shares(alive[x], alive[y], places, point, sae, probe)

    return shares


def _turned(decoders: ChainDecoders, alive: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
    """Cosine of every feature's two decoder rows [F] (NaN where one is zero), and the unit rows of the `alive` ones, 2 x [alive, d] fp32."""
    cosine = np.empty(decoders.features)
    units = torch.zeros(2, len(alive), decoders.d)
    for start, stop, rows in decoders.blocks():
        unit = functional.normalize(rows, dim=2)
        is_zero = (~unit.any(2)).any(1)
        cosine[start:stop] = (unit[:, 0] * unit[:, 1]).sum(1).clamp(-1, 1).masked_fill(is_zero, torch.nan).numpy()
        low, high = np.searchsorted(alive, [start, stop])
        units[:, low:high] = unit[torch.from_numpy(alive[low:high] - start)].transpose(0, 1).float()
    return cosine, units[0], units[1]


def _counts(table: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for (first, second), of in table.groupby(["from_step", "to_step"]):
        count = of.pattern.value_counts().reindex(list(PATTERNS), fill_value=0).to_numpy()
        share = count / count.sum() if count.sum() else np.full(len(count), np.nan)
        parts.append(pd.DataFrame({"from_step": first, "to_step": second, "pattern": list(PATTERNS), "count": count, "share": share}))
    return pd.concat(parts, ignore_index=True)


def _check(spec: PatternsSpec, job: "Job") -> int:
    """How many examples of a feature the kinds were told from."""
    kinds = job.artifact(spec.kinds).spec()
    if not isinstance(kinds, KindsSpec):
        raise UserError(f"{spec.kinds} was made by step {kinds.step!r}; the patterns of features follow from the kinds step's tables.")
    if kinds.points != spec.points or kinds.alive_firings != spec.alive_firings:
        raise UserError(
            f"The kinds {spec.kinds} are of steps {[p.step for p in kinds.points]} with alive_firings {kinds.alive_firings}, the patterns of steps "
            f"{[p.step for p in spec.points]} with {spec.alive_firings}; both must be of the same checkpoints, dictionaries and statistics. Plan them from "
            "one config."
        )
    return kinds.rule.examples


PATTERN_COLUMNS = {
    "feature": ("index", "feature of the chain"),
    "from_step": ("training step", "the earlier checkpoint"),
    "to_step": ("training step", "the next one"),
    "pattern": ("name", "what happened in between (empty: see reason)"),
    "from_kind": ("name", "kind at the earlier checkpoint (empty: too few examples)"),
    "to_kind": ("name", "kind at the later one (empty: too few examples)"),
    "from_token": ("token", "with the largest share of the activation mass, earlier"),
    "to_token": ("token", "with the largest share of the activation mass, later"),
    "from_strength": ("share", "of its largest strength along the chain, earlier (empty: dead)"),
    "to_strength": ("share", "of its largest strength along the chain, later (empty: dead)"),
    "cosine": ("cosine", "of the two decoder rows (empty: one is zero)"),
    "reason": ("text", "why there is no pattern"),
}
MERGE_COLUMNS = {
    "feature": ("index", "a feature that merged"),
    "partner": ("index", "of those it merged with the one nearest in decoder direction at the later checkpoint"),
    "from_step": ("training step", "the earlier checkpoint"),
    "to_step": ("training step", "the later one, the first at which they are together"),
    "cos_before": ("cosine", "of their decoder rows, earlier"),
    "cos_after": ("cosine", "of their decoder rows, later"),
    "shared_before": (
        "share",
        "of one's strongest places at the earlier checkpoint at which the other fires, earlier (the larger of the two)",
    ),
    "shared": ("share", "the same, of the same places, later"),
}
COUNT_COLUMNS = {
    "from_step": ("training step", "the earlier checkpoint"),
    "to_step": ("training step", "the next one"),
    "pattern": ("name", "what happened in between"),
    "count": ("features", "with this pattern"),
    "share": ("share", "of the features with a pattern"),
}
