"""Sizes of SAE-Track's analysis steps for `stagediff plan`.

With T checkpoints, F features, width d and N probe activations: kinds, drift and the tables grow with F T; formation encodes all datapoints at all checkpoints
(2 sets x F x datapoints x T codes of F features); patterns compare all pairs of features between checkpoints. So at large F formation is nearly all of it.

The numbers were measured on one core (docs/results.md, "What the analysis costs"). That every feature is alive and has all its datapoints is assumed: dead
features cost less.
"""

from dataclasses import dataclass

from stagediff.estimate import Estimate
from stagediff.lm.estimate import activation_shape, spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of
from stagediff.track.spec import (
    MEASURES,
    SETS,
    DriftSpec,
    EfficiencySpec,
    FormationRule,
    FormationSpec,
    KindsSpec,
    PatternsSpec,
    PhasesSpec,
    Point,
    UmapSpec,
)

__all__ = ["Chain", "chain_of", "codes", "drift", "efficiency", "formation", "kinds", "patterns", "phases", "umap"]


PER_CODE = 500.0
"""Operations that fit into the time of the passes over one code besides its product: ReLU, norms, counts, the columns that a set's codes share."""
PER_PAIR = 180.0
"""The same for one pair of features: comparing its cosine."""
BOOTSTRAPS = 200
"""Of the drift step."""


@dataclass(frozen=True)
class Chain:
    """The sizes that an analysis step works on."""

    checkpoints: int
    features: int
    width: int
    probe: int
    """Activations of the probe rows at one checkpoint."""

    @property
    def cells(self) -> int:
        """Rows of a table with one per feature and checkpoint."""
        return self.features * self.checkpoints


def chain_of(points: tuple[Point, ...], plan: Plan) -> Chain:
    last = points[-1]
    n, d, _ = activation_shape(spec_of(last.statistics, plan).data, plan)
    return Chain(len(points), features_of(last.dictionary, plan), d, n)


def codes(c: Chain, rule: FormationRule) -> int:
    """Numbers that formation encodes: the pass for the regions, then every datapoint of both sets at every checkpoint."""
    return c.features * (c.probe + c.checkpoints * len(SETS) * c.features * rule.datapoints)


def kinds(spec: KindsSpec, plan: Plan) -> Estimate:
    c = chain_of(spec.points, plan)
    examples = c.cells * spec.rule.examples
    reference = c.probe * c.width  # numbers of the reference space, read twice
    pairs = spec.rule.random_sets * spec.rule.examples**2
    seconds = 0.3 + 4e-9 * reference + examples * (8e-7 + 6e-10 * c.width) + 2.5e-6 * c.cells + 2e-9 * pairs * c.width
    return Estimate(tokens=c.probe, bytes=22 * c.cells, seconds=seconds)


def formation(spec: FormationSpec, plan: Plan) -> Estimate:
    c, rule = chain_of(spec.points, plan), spec.rule
    datapoints = len(SETS) * c.features * rule.datapoints
    pairs = c.checkpoints * datapoints * (rule.datapoints - 1) / 2
    resampled = 2.0 * len(MEASURES) * pairs * (1 + rule.bootstrap)
    rows = len(SETS) * c.cells + 2 * datapoints
    kept = 14 * len(SETS) * c.cells + 7 * datapoints + 12 * len(SETS) * len(MEASURES) * c.features
    seconds = 0.3 + 1e-6 * rows + 2e-6 * datapoints
    return Estimate(tokens=c.probe, bytes=kept, flops=codes(c, rule) * (2.0 * c.width + PER_CODE) + resampled, seconds=seconds)


def drift(spec: DriftSpec, plan: Plan) -> Estimate:
    c = chain_of(spec.points, plan)
    read = (c.cells + len(spec.null) * c.features) * c.width
    resampled = BOOTSTRAPS * 2 * c.cells if spec.formation is not None else 0
    seconds = 0.1 + 1e-8 * read + c.features * (1e-5 + 4e-9 * c.checkpoints**3) + 1e-8 * resampled + 1e-6 * c.cells
    return Estimate(bytes=30 * c.cells + 12 * len(spec.null) * c.features, seconds=seconds)


def patterns(spec: PatternsSpec, plan: Plan) -> Estimate:
    c = chain_of(spec.points, plan)
    intervals = c.checkpoints - 1
    pairs = intervals * c.features**2 / 2
    return Estimate(
        bytes=14 * c.cells, flops=pairs * (2.0 * c.width + PER_PAIR), seconds=0.1 + intervals * c.features * (4e-6 + 2e-8 * c.width)
    )


def phases(spec: PhasesSpec, plan: Plan) -> Estimate:
    c, repeats = chain_of(spec.points, plan), spec.rule.bootstrap
    axes = 3 * 2 * repeats  # a segmentation for each resample and each shuffling, on three axes
    return Estimate(bytes=2**14, seconds=0.1 + repeats * 2e-8 * c.cells + axes * 1e-7 * c.checkpoints**2 + 1e-6 * c.cells)


def umap(spec: UmapSpec, plan: Plan) -> Estimate:
    rule, made_from = spec.rule, spec_of(spec.formation, plan)
    shown = (len(rule.features) or rule.count) * len(SETS) * made_from.rule.datapoints + made_from.rule.random
    maps = min(rule.checkpoints, len(spec.points))
    c = chain_of(spec.points, plan)
    return Estimate(bytes=2**13 + 7 * 2 * maps * shown, seconds=15.0 + maps * (0.5 + 5e-3 * shown) + maps * 1e-9 * c.probe * c.width)


def efficiency(spec: EfficiencySpec, plan: Plan) -> Estimate:
    return Estimate(bytes=2**14, seconds=0.05 + 0.003 * len(spec.rows))
