"""The step `kinds`: token-level, concept-level, noise or dead, for every feature at every checkpoint (SAE-Track, arXiv 2412.17626; method.md, section 3).

The paper picks features of each kind by hand. The rule here (KindRule) looks at a feature's strongest examples on the probe rows, at most one per row:

token    one token (" the", "the" and "The" are one, unless `fold_tokens` is off) holds at least `token_share` of the examples' activation mass;
concept  not token, and the examples are more alike than random positions in the reference space, which is the same for all checkpoints and not the
         dictionary's own. Likeness is the mean cosine over pairs of examples with different tokens (`likeness`); it must lie `margin` above the mean of
         random sets and reach p <= `p` among them (`random_sets`, also for how large the random sets are);
noise    neither.

What the rule cannot tell: a feature of two concepts, each with several tokens, has half the likeness of one and passes where that is enough. And p is per
feature: of features that fire at random, a share of up to `p` would pass by chance (the margin holds most of these back).
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.lm.models import load_tokenizer
from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint
from stagediff.track.columns import named
from stagediff.track.likeness import PairLikeness, ReferenceSpace
from stagediff.track.probe import Probe
from stagediff.track.random_sets import RandomSets, set_sizes
from stagediff.track.spec import KINDS, KindRule, KindsSpec, Point
from stagediff.track.vocabulary import ProbeTokens

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["REASONS", "compute", "decide", "heaviest"]

REASONS = ("dead", "too few examples", "one token only")
TOKEN, CONCEPT, NOISE, DEAD = range(len(KINDS))
UNKNOWN = -1


def compute(spec: KindsSpec, job: "Job") -> dict[str, Any]:
    """Writes kinds.parquet and shares.parquet (KindsSpec). Raises UserError for inputs that do not belong together or hold too few examples."""
    began = time.monotonic()
    probe = Probe(spec.points, job)
    _check(spec, probe, job)
    reader = ActivationReader(job.store, ActivationData(base=spec.reference, rows=probe.rows))
    tokens = ProbeTokens(reader.token_ids(np.arange(probe.rows)), load_tokenizer(spec.tokenizer, job.store), fold=spec.rule.fold_tokens)
    space = ReferenceSpace(reader, job.progress)
    largest = min(spec.rule.examples, probe.rows)
    null = RandomSets(space, tokens.codes[:, probe.positions], spec.rule.random_sets, largest, spec.seed)
    likeness = PairLikeness(space)
    measured = []
    with job.progress.task("examples", len(spec.points), "checkpoints") as task:
        for point in spec.points:
            measured.append(_measure(point, spec, job, tokens, probe, likeness))
            task.advance()
    features = len(measured[0].alive)
    if wrong := [p.step for p, m in zip(spec.points, measured, strict=True) if len(m.alive) != features]:
        raise UserError(
            f"The dictionaries of a chain must have the same features, but that of step {wrong[0]} does not have {features:,} as that of step "
            f"{spec.points[0].step} does. Each has to be finetuned from the one before."
        )
    values = likeness.finish().reshape(len(measured), features)
    parts = [_table(p.step, m, v, null, tokens, spec.rule) for p, m, v in zip(spec.points, measured, values, strict=True)]
    table = pd.concat(parts, ignore_index=True)
    shares = _shares(table)
    job.writer.write_table("kinds.parquet", table, columns=COLUMNS)
    job.writer.write_table("shares.parquet", shares, columns=SHARE_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(table, shares, null, features)


def decide(
    alive: np.ndarray,
    examples: np.ndarray,
    token_share: np.ndarray,
    likeness: np.ndarray,
    random: np.ndarray,
    p: np.ndarray,
    rule: KindRule,
) -> tuple[np.ndarray, np.ndarray]:
    """(kind, reason) of features from their measures, all arrays [F], as indices into KINDS and REASONS; -1: none. NaN passes no threshold."""
    enough = examples >= rule.fewest
    is_token = token_share >= rule.token_share
    is_concept = (likeness - random >= rule.margin) & (p <= rule.p)
    kind = np.select([~alive, ~enough, is_token, is_concept], [DEAD, UNKNOWN, TOKEN, CONCEPT], NOISE)
    return kind, np.select([~alive, ~enough, np.isnan(likeness)], [0, 1, 2], -1)


def heaviest(feature: np.ndarray, code: np.ndarray, mass: np.ndarray, features: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Which code holds most of each feature's mass.

    Entries are examples, the strongest of a feature first; of equally heavy codes the one with the strongest example wins. Returns its entry's code [F]
    int64 (-1: a feature without examples), its share of the feature's mass [F] float64 (NaN), and a row per (feature, code): feature, code, count, mass.
    """
    order = np.lexsort((code, feature))
    feature, code, mass = feature[order], code[order], mass[order].astype(float)
    opens = np.ones(len(feature), bool)
    opens[1:] = (feature[1:] != feature[:-1]) | (code[1:] != code[:-1])
    cell, starts = np.cumsum(opens) - 1, np.flatnonzero(opens)
    cells = pd.DataFrame({"feature": feature[starts], "code": code[starts], "count": np.bincount(cell), "mass": np.bincount(cell, mass)})
    ranked = cells.iloc[np.lexsort((order[starts], -cells.mass, cells.feature))].drop_duplicates("feature")
    best, share = np.full(features, -1), np.full(features, np.nan)
    best[ranked.feature] = ranked.code
    share[ranked.feature] = ranked.mass / np.bincount(feature, mass, features)[ranked.feature]
    return best, share, cells


@dataclass
class _Measured:
    """Of one checkpoint, arrays [F]."""

    alive: np.ndarray
    examples: np.ndarray
    token: np.ndarray
    """Index into the probe's token strings; -1: none."""
    token_id: np.ndarray
    share: np.ndarray
    distinct: np.ndarray
    size: np.ndarray
    """Of the random sets to compare with; 0: no pair with different tokens."""


def _measure(point: Point, spec: KindsSpec, job: "Job", tokens: ProbeTokens, probe: Probe, likeness: PairLikeness) -> _Measured:
    """Everything but likeness, which is only asked for here: `likeness` gets one set per feature."""
    statistics = job.artifact(point.statistics)
    alive = statistics.read_table("features.parquet", columns=["firings"]).firings.to_numpy() >= spec.alive_firings
    table = statistics.read_table("examples.parquet", columns=["feature", "rank", "activation", "row", "position"])
    table = table[table["rank"] < spec.rule.examples].sort_values(["feature", "rank"], ignore_index=True)
    examples = np.bincount(table.feature, minlength=len(alive))
    table = table[(alive & (examples >= spec.rule.fewest))[table.feature]]
    feature, row, position = (table[name].to_numpy(np.int64) for name in ("feature", "row", "position"))
    code, id_, mass = tokens.codes[row, position], tokens.ids[row, position], table.activation.to_numpy()
    best, share, cells = heaviest(feature, code, mass, len(alive))
    mine = code == best[feature]
    token_id = heaviest(feature[mine], id_[mine], mass[mine], len(alive))[0]
    size = set_sizes(cells.feature.to_numpy(), cells["count"].to_numpy(), len(alive))
    likeness.add(feature, probe.flat(row, position), code, len(alive))
    return _Measured(alive, examples, best, token_id, share, np.bincount(cells.feature, minlength=len(alive)), size)


def _table(step: int, measured: _Measured, likeness: np.ndarray, null: RandomSets, tokens: ProbeTokens, rule: KindRule) -> pd.DataFrame:
    m = measured
    random, p = null.compare(likeness, m.size)
    kind, reason = decide(m.alive, m.examples, m.share, likeness, random, p, rule)
    columns = {
        "feature": np.arange(len(kind), dtype=np.int32),
        "step": np.full(len(kind), step, np.int64),
        "kind": named(kind, KINDS),
        "token": named(m.token, tokens.names),
        "token_id": _or_null(m.token_id, m.token >= 0),
        "token_share": m.share,
        "distinct_tokens": _or_null(m.distinct, m.token >= 0),
        "likeness": likeness,
        "set_size": _or_null(m.size, m.size > 0),
        "likeness_random": random,
        "likeness_p": p,
        "examples": m.examples.astype(np.int32),
        "reason": named(reason, REASONS),
    }
    return pd.DataFrame(columns)


def _or_null(values: np.ndarray, known: np.ndarray) -> pd.Series:
    return pd.Series(values.astype(np.int32)).astype("Int32").where(known)


def _shares(table: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for step, of in table.groupby("step"):
        count = of.kind.value_counts().reindex(list(KINDS), fill_value=0)
        known = int(count[list(KINDS[:DEAD])].sum())
        total = np.array([known] * DEAD + [len(of)], float)
        share = np.divide(count, total, out=np.full(len(KINDS), np.nan), where=total > 0)
        parts.append(pd.DataFrame({"step": step, "kind": list(KINDS), "count": count.to_numpy(), "share": share}))
    return pd.concat(parts, ignore_index=True)


def _figures(table: pd.DataFrame, shares: pd.DataFrame, null: RandomSets, features: int) -> dict[str, Any]:
    first, final = table.step.min(), table.step.max()
    counts = shares.set_index(["step", "kind"])["count"]
    figures: dict[str, Any] = {
        "features": features,
        "checkpoints": int(table.step.nunique()),
        "first_step": int(first),
        "final_step": int(final),
    }
    figures |= {f"{kind}_{name}": int(counts[step, kind]) for kind in KINDS for name, step in (("first", first), ("final", final))}
    figures["without_kind"] = int(table.kind.isna().sum())
    figures["likeness_random"] = float(null.likeness[-1].mean())
    return figures


def _check(spec: KindsSpec, probe: Probe, job: "Job") -> None:
    """Raises UserError where the statistics hold too few examples for the rule, or the reference is not of the probe's positions in a space of its own."""
    for point in spec.points:
        top = getattr(job.artifact(point.statistics).spec(), "top", 0)
        if top < spec.rule.examples:
            raise UserError(
                f"The rule for kinds looks at {spec.rule.examples} examples of a feature, but the statistics {point.statistics} of step {point.step} kept "
                f"{top}. Compute them with top: {spec.rule.examples} or more, or lower the rule's examples."
            )
    if probe.rows < spec.rule.fewest:
        raise UserError(
            f"There are {probe.rows} probe rows, and a feature has at most one example in each; a kind needs {spec.rule.fewest}. Use more probe rows."
        )
    own, reference = probe.reader(spec.points[-1]).spec, job.artifact(spec.reference).spec()
    if not isinstance(reference, HarvestSpec):
        raise UserError(f"The reference {spec.reference} was made by step {reference.step!r}; activations of the probe rows were expected.")
    if (own.tokens, own.skip_positions) != (reference.tokens, reference.skip_positions):
        raise UserError(
            f"The probe and the reference {spec.reference} are not of the same positions: token rows {own.tokens} without positions "
            f"{list(own.skip_positions)}, and {reference.tokens} without {list(reference.skip_positions)}. Harvest both alike."
        )
    if _place(own.hook) == _place(reference.hook):
        raise UserError(
            f"The reference {spec.reference} was read at {reference.hook.site} of layer {reference.hook.layer}, which is the space that the dictionaries "
            "live in: a feature's examples are alike there by construction. Take the reference from another layer, the last one as a rule, or "
            "move the hook point."
        )


def _place(hook: HookPoint) -> tuple[str, int]:
    """The same for two names of one space: behind a block and before the next one."""
    return ("resid_pre", hook.layer + 1) if hook.site == "resid_post" else (hook.site, hook.layer)


COLUMNS = {
    "feature": ("index", "feature of the chain"),
    "step": ("training step", "of the model's checkpoint"),
    "kind": ("name", "token, concept, noise or dead (empty: too few examples)"),
    "token": ("token", "the one with the largest share of the examples' activation mass, as it is compared (folded, if the rule says so)"),
    "token_id": ("index", "vocabulary entry of that token with the most activation mass"),
    "token_share": ("share", "of the examples' activation mass that lies on the token"),
    "distinct_tokens": ("tokens", "different ones among the examples"),
    "likeness": ("cosine", "mean over pairs of examples with different tokens, reference space, mean subtracted"),
    "set_size": ("positions", "size of the random sets that likeness is compared with: the effective number of different tokens"),
    "likeness_random": ("cosine", "mean likeness of these random sets"),
    "likeness_p": ("probability", "that a random set is at least as alike"),
    "examples": ("examples", "looked at, at most one per probe row"),
    "reason": ("text", "why something is empty"),
}
SHARE_COLUMNS = {
    "step": ("training step", "of the model's checkpoint"),
    "kind": ("name", "token, concept, noise or dead"),
    "count": ("features", "of this kind"),
    "share": ("share", "of the alive features with a kind; dead: of all features"),
}
