"""Specs of SAE-Track's analysis steps (arXiv 2412.17626; method.md, section 3): what happened to every feature along a chain of checkpoints.

All of them read `points`: the chain's checkpoints in ascending training step, whatever the direction in which the dictionary walked. "Final" is
the last point, "previous" the one before in training time. Every table has a row for every feature; where something could not be measured the
value is null and the column `reason` says why.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stagediff.lm.spec import TokenizerSource
from stagediff.spec import Later, Ref, Spec, Value

__all__ = [
    "KINDS",
    "MEASURES",
    "PATTERNS",
    "SETS",
    "DriftSpec",
    "EfficiencyRow",
    "EfficiencySpec",
    "FormationRule",
    "FormationSpec",
    "KindRule",
    "KindsSpec",
    "PatternRule",
    "PatternsSpec",
    "PhaseRule",
    "PhasesSpec",
    "Point",
    "UmapRule",
    "UmapSpec",
]

KINDS = ("token", "concept", "noise", "dead")
"""token-level, concept-level, noise: among features alive at that checkpoint; dead: fewer than `alive_firings` firings there."""
PATTERNS = ("maintaining", "token_to_token", "token_to_concept", "concept_to_token", "grouping", "losing", "appearing", "vanishing")
"""One feature from one checkpoint to the next. maintaining: same kind (token: same top token); token_to_token, token_to_concept,
concept_to_token: shifting; grouping: noise becomes token or concept (P2); losing: token or concept becomes noise; appearing, vanishing: dead (or
faint noise, PatternRule.faint) to alive and back."""
MEASURES = ("activation_cosine", "feature_cosine", "feature_jaccard", "feature_weighted_jaccard")
"""Space and similarity of a progress measure M_i(t) (P2, section on feature formation)."""
SETS = ("top", "levels")
"""Datapoints of a feature: the strongest positions at the final checkpoint (P2), one per row, or a sample across the activation levels of its region R_i."""


class Point(Value):
    """One checkpoint of the chain."""

    step: int
    """Training step of the model."""
    dictionary: Ref
    statistics: Ref
    """Of that dictionary on the probe rows."""
    probe: Ref
    """activations/… of the probe rows at the hook point: kept for good, the same rows at every checkpoint."""


class _Analysis(Spec):
    kind = "tracks"
    points: tuple[Point, ...] = Field(min_length=2)
    alive_firings: int = 10
    """Firings on the probe rows from which a feature counts as alive at a checkpoint."""
    seed: int = 0

    @model_validator(mode="after")
    def _ascending(self) -> "_Analysis":
        steps = [p.step for p in self.points]
        if steps != sorted(set(steps)):
            raise ValueError(f"points must be in ascending order of step without repeats; given: {steps}")
        return self


class KindRule(Value):
    """Thresholds of the rule for kinds (the paper picks features by hand: this rule is ours)."""

    examples: int = Field(25, ge=2)
    """Strongest examples that are looked at (at most; the statistics must hold as many)."""
    fold_tokens: bool = True
    """Whether " the", "the" and "The" count as one token: compared without white space around and without case (white space alone stays as it
    is: a line break is no indentation). On by default, so that "concept-level" claims more than spelling: a feature of the word "the" is
    token-level, though the model has three entries for it, and pairs of these would be the most alike of all. Off: every string by itself."""
    token_share: float = Field(0.8, gt=0, le=1)
    """token-level: one token holds at least this share of the examples' activation mass."""
    margin: float = 0.1
    """concept-level: likeness of examples (mean cosine over pairs with DIFFERENT tokens, in the reference space) above that of random sets …"""
    p: float = Field(0.01, gt=0, lt=1)
    """… by this margin, and above this upper quantile of the random sets."""
    random_sets: int = Field(1000, ge=1)
    fewest: int = Field(5, ge=2)
    """Examples below which nothing is said: kind null, reason "too few examples"."""

    @model_validator(mode="after")
    def _reachable(self) -> "KindRule":
        if self.fewest > self.examples:
            raise ValueError(f"fewest ({self.fewest}) is more than the {self.examples} examples looked at, so no feature would get a kind")
        if self.p * (1 + self.random_sets) < 1:
            raise ValueError(
                f"{self.random_sets} random sets give no p below {1 / (1 + self.random_sets):.2g}, so p {self.p:g} could not be reached; "
                f"ask for at least {math.ceil(1 / self.p) - 1} random_sets"
            )
        return self


class KindsSpec(_Analysis):
    """Which kind every feature is at every checkpoint.

    kinds.parquet, one row per feature and step: feature, step, kind, token (the string with the largest share of the activation mass, folded
    as the rule says), token_id (of that token's spellings the heaviest), token_share, distinct_tokens, likeness, set_size (of the random sets
    that it is compared with, see `random_sets`), likeness_random (their mean), likeness_p, examples, reason ("dead", "too few examples", or, beside
    a kind, "one token only": no likeness).
    shares.parquet: step, kind, count, share (of alive features with a kind; dead: of all features).
    """

    step = "kinds"
    tokenizer: TokenizerSource
    reference: Ref
    """activations/… of the probe rows in a space that is NOT the hook's own and is fixed for all checkpoints (the final checkpoint's last
    layer): where examples are compared."""
    rule: KindRule = KindRule()


class FormationRule(Value):
    """Datapoints, and when a feature counts as formed."""

    datapoints: int = Field(25, ge=2)
    random: int = Field(100, ge=2)
    levels: int = Field(5, ge=1)
    """Activation levels (equal-width bands of a feature's range at the final checkpoint) that the levels set samples `datapoints` from."""
    share: float = Field(0.5, gt=0, le=1)
    smallest_m: float = 0.05
    """Final M below which a feature has not formed (reason "final M too small")."""
    bootstrap: int = Field(100, ge=1)


class FormationSpec(_Analysis):
    """Regions, datapoints and progress measures of every feature; when it formed.

    regions.parquet, the datapoints: feature, set (of SETS), rank (0: strongest of its set), level (0 = weakest band, of the levels set; 0 for top), row,
    position, activation (scaled units, at the final checkpoint). Set top is the final statistics' examples, at most one per row; set levels is
    drawn from all positions of the region. random.parquet: row, position of the fixed random positions.
    formation.parquet: feature, step, set, m_<measure> for all MEASURES: mean off-diagonal similarity over the feature's datapoints minus that
    over the random positions, at that checkpoint; reason. baseline.parquet: step, measure, similarity of the random positions.
    formed.parquet: feature, set, measure, formed_step (first step from which M stays at or above `share` of its final value), low, high
    (bootstrap interval over datapoints, 90 %, steps; a resample that does not form counts as later than all checkpoints, and an end that falls there
    is null), formed_share (of the resamples that form), final_m, datapoints, reason.
    by_kind.parquet (where `kinds` is given): step, set, measure, kind (at the final checkpoint, not dead), m (mean), low, high (bootstrap over
    features), features.
    agreement.parquet, once per pair of measures, features alive at the end: set, measure_a, measure_b, m_correlation (Pearson over features and steps),
    time_correlation (Spearman of formation steps, over features formed by both), features, formed (by both), reason.
    """

    step = "formation"
    kinds: Ref | None = None
    rule: FormationRule = FormationRule()


class DriftSpec(_Analysis):
    """How far every feature's decoder moved, beside the null: the same recipe carried on over a frozen checkpoint.

    features.parquet: feature, step, cos_final, cos_previous (null at the first), norm, density, alive, formed (flag: step >= formed_step of set
    top, measure `measure`; null where the feature never formed), reason.
    histogram.parquet: step, against (final | previous | null), low, high, count, over features alive in both (null: alive at the frozen
    checkpoint; features x repeats).
    null.parquet: feature, repeat (1, 2, …), cos_start, cos_previous along the frozen checkpoint.
    trajectories.parquet: feature, step, pc1, pc2 (PCA of J_i = {W_dec_i[t]}, unit vectors, centred), formed; one row of `explained` per feature in
    trajectory.parquet: feature, explained (share of variance in two components), length (sum of angles, degrees), reason.
    before_after.parquet: feature, drift_before, drift_after (mean 1 - cos_previous per checkpoint before / from formation on, where alive at both
    ends), null (same of the null), reason.
    same_step.parquet: step, formed, unformed (features that form later), drift_formed, drift_unformed (medians of 1 - cos_previous), difference,
    low, high: before_after alone would also show that everything moves less late in training.
    """

    step = "drift"
    formation: Ref | None = None
    measure: Literal["activation_cosine", "feature_cosine", "feature_jaccard", "feature_weighted_jaccard"] = "activation_cosine"
    null: tuple[Ref, ...] = ()
    """Dictionaries along the frozen checkpoint: the chain's own there, then every repeat of the following recipe."""
    null_step: int | None = None
    """Which checkpoint was frozen."""
    bins: int = 100


class PatternRule(Value):
    """When noise is too weak to be a feature, when a concept counts as the same one, and when two features count as merged (all
    ours; `stagediff.track.merges`)."""

    faint: float = Field(0.33, ge=0, lt=1)
    """A noise feature under this share of its own largest strength along the chain is not there, like a dead one: from noise so faint to a meaning is
    appearing, not grouping, and from a meaning to it vanishing, not losing (see `stagediff.track.faint`). 0: every firing feature is there."""

    concept_cosine: float = 0.5
    """concept to concept is maintaining with a decoder cosine between the two checkpoints of at least this. Below it the feature may stand for
    another concept, which kinds cannot tell: pattern null, reason "concept turned"."""
    merge_cosine: float = Field(0.5, gt=0, le=1)
    """Decoder cosine of at least this, and …"""
    merge_shared: float = Field(0.5, gt=0, le=1)
    """… one fires at this share of the places at which the other one was strongest at the earlier checkpoint: both at the later one and not both at the
    earlier, and one of the two at least twice as large as there."""


class PatternsSpec(_Analysis):
    """What happened to every feature from one checkpoint to the next, and which features merged.

    patterns.parquet: feature, from_step, to_step, pattern (of PATTERNS; null with reason), from_kind, to_kind, from_token, to_token, from_strength,
    to_strength (as a share of its largest along the chain), cosine (of its decoder rows), reason ("dead at both", "faint or dead at both", "no kind at
    from_step", "no kind at to_step", "no kind at both", "concept turned").
    merges.parquet, one row per feature that merged, with its strongest partner: feature, partner, from_step, to_step, cos_before, cos_after,
    shared_before, shared.
    counts.parquet: from_step, to_step, pattern, count, share (of features with a pattern).
    """

    step = "patterns"
    kinds: Ref
    rule: PatternRule = PatternRule()


class PhaseRule(Value):
    """How many phases are looked for."""

    phases: int = Field(3, ge=2)
    """P2: initialisation and warm-up, emergent, convergent."""
    bootstrap: int = Field(200, ge=1)


class PhasesSpec(_Analysis):
    """Phases of training: change points of the shares of kinds and of drift, on the index axis and on the step axis (the index axis alone can fake phases).

    phases.parquet: axis (index | step | log_step), boundary (1, 2, …), at_step (the first checkpoint of the later phase), low, high (90 % bootstrap
    over features), gain (share of the variation that one phase fewer leaves which this number of phases explains), gain_shuffled (95 % quantile of
    the same in random order), gain_trend (of a straight line), reason.
    series.parquet: step, series (token, concept, noise, dead, drift), value, low, high, reason.
    """

    step = "phases"
    kinds: Ref
    drift: Ref
    rule: PhaseRule = PhaseRule()


class UmapRule(Value):
    """Which features, checkpoints and settings (P2: 100 neighbours, minimum distance 0, cosine, seed 42)."""

    features: tuple[int, ...] = ()
    """(): chosen by rule: of each final kind those with the largest final M."""
    count: int = Field(6, ge=1)
    """How many features are chosen by the rule."""
    checkpoints: int = Field(5, ge=1)
    """How many checkpoints are fitted, spread over the chain, the final one among them."""
    neighbors: int = Field(100, ge=2)
    """Of the fits apart (fewer where there are not so many positions)."""
    aligned_neighbors: int = Field(15, ge=2)
    """Of the aligned fit: umap-learn's default. With 100 of some 340 positions (toy model) it lost what the maps apart show: of a point's five nearest, 37 to
    51 % were of its own feature, against 72 % apart and 66 to 73 % with 15, and a point moved as far as to any other."""
    aligned: Annotated[bool, Later()] = True
    """Whether the aligned fit is made too; its functions alone take half a minute to compile."""
    min_dist: float = 0.0
    seed: int = 42


class UmapSpec(_Analysis):
    """UMAP of chosen features' datapoints, each checkpoint fitted apart (P2) and all together (aligned), so that points can be followed.

    Shown are both sets of datapoints of the chosen features, and the random positions. umap.parquet: fit (apart | aligned), step, feature (-1: random
    positions), row, position, u, v. features.parquet: feature, kind, why.
    """

    step = "umap"
    formation: Ref
    kinds: Ref
    rule: UmapRule = UmapRule()


class EfficiencyRow(Value):
    """One dictionary whose quality is compared."""

    step: int
    how: Literal["chained", "scratch_full", "scratch_short"]
    """chained: the chain's own; scratch_full: from scratch with the first budget; scratch_short: from scratch with the following budget."""
    tokens: int
    """Training tokens spent for this dictionary at this checkpoint."""
    dictionary: Ref
    statistics: Ref
    quality: Ref


class EfficiencySpec(Spec):
    """Quality at every checkpoint, chained and from scratch: is the following budget enough?

    quality.parquet: step, how, tokens, explained_variance, l0, dead, loss_recovered, input_scale, revived, reason.
    compared.parquet, for the steps that have them: step, how, ev_chained, ev_other, ev_gap (chained - other), loss_recovered_gap (the same).
    """

    step = "efficiency"
    kind = "tracks"
    rows: tuple[EfficiencyRow, ...]
