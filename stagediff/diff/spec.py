"""Specs of the diff, null and align steps."""

from typing import Annotated, Literal

from pydantic import Field

from stagediff.spec import Later, Ref, Spec, Value

__all__ = ["ALIGNED_STAGES", "PATHS", "STAGES", "AlignSpec", "Cut", "DiffSpec", "NullSpec"]

STAGES = ("S", "D", "M", "F_D", "F_M", "F_direct")
"""The dictionaries of a run: F_D is F via D, F_M is F via M, F_direct the direct finetune S -> F with the whole path's budget."""

PATHS = ("F_D", "F_M")
"""The two dictionaries that should end alike."""
ALIGNED_STAGES = ("S", "D", "M", *PATHS, "F_direct")


class Cut(Value):
    """Which features are selected (lower left of the scatter)."""

    kind: Literal["absolute", "quantile", "fdr"] = "quantile"
    value: float = 0.1
    """absolute: x and y both below it (P1: 0.7). quantile: the lowest share of alive features by x + y. fdr: those that moved more than their retrain null
    on both axes, q at most this (expected share of false ones among the selected)."""


class DiffSpec(Spec):
    """Compares the decoders of all stages feature by feature."""

    step = "diff"
    kind = "diffs"
    version = 2
    """1: no intervals."""
    dictionaries: dict[str, Ref]
    """Stage -> dictionary, all of STAGES."""
    statistics: dict[str, Ref]
    """Stage -> statistics on held-out rows, all of STAGES."""
    cut: Cut = Cut()
    random_sample: int = 500
    seed: int = 0
    alive_firings: int = 10
    """Firings in a stage's statistics rows from which a feature counts as alive there."""
    null: Annotated[Ref | None, Later()] = None
    """The retrain null, for the cut fdr."""
    take_out_rotation: Annotated[bool, Later()] = False
    """Whether the common rotation from S to M is taken out of every cosine between a dictionary of the base model and one of the finetuned model."""


class NullSpec(Spec):
    """How far features move by continued training alone: D trained on as D', M as M', with nothing new; and how unusual the real moves are against that."""

    step = "null"
    kind = "evidence"
    version = 2
    """1: all repeats pooled, also where a feature had several of its own."""
    dictionaries: dict[str, Ref]
    """Stage -> dictionary: S, D, M, F_D, F_M."""
    statistics: dict[str, Ref]
    """Stage -> statistics on held-out rows: S, D, M, F_D, F_M."""
    nulls: dict[str, tuple[Ref, ...]]
    """D, M -> the dictionaries D', M' of every repeat."""
    null_statistics: dict[str, tuple[Ref, ...]]
    """D, M -> their statistics, as D's and M's own."""
    take_out_rotation: bool = False
    """As the diff's."""
    candidates: int = Field(16_384, ge=1)
    """Latents of each D' and M' whose novelty is measured: as the align step's."""
    alive_firings: int = 10


class AlignSpec(Spec):
    """Scores that need no index: latents of F via D and F via M matched by direction, and how new each pair is against D and M."""

    step = "align"
    kind = "evidence"
    version = 5
    """1: no excess; 2: no intervals; 3: no contrast with a null; 4: no agreement."""
    diff: Ref
    """The published scores, index by index: they stand beside."""
    dictionaries: dict[str, Ref]
    """Stage -> dictionary, all of ALIGNED_STAGES."""
    statistics: dict[str, Ref]
    """Stage -> statistics on the finetuned model's held-out mix, of the F dictionaries."""
    base_statistics: dict[str, Ref] = {}
    """F_D, F_M -> their statistics on the base model's activations of the same rows: with them, the 2 x 2 contrast. Empty: without it."""
    candidates: int = Field(16_384, ge=1)
    """Latents per dictionary that are matched: all alive ones, or, where there are more, those that turned most from D's and M's of their index."""
    newborn_below: float = Field(0.7, gt=0, lt=1)
    """A latent of F is newborn when its direction has a smaller cosine than this with every latent of D and of M. Two newborns nearer than this are one."""
    null: Ref | None = None
    """The retrain null: with it, every pair has a p and a q."""
    take_out_rotation: bool = False
    """Whether D is turned by the common rotation from S to M before novelty is measured against it."""
    saturated: float = Field(0.85, gt=0, le=1)
    """Share of the other path's newborns that carry the new data which a path must have too; below it the births have not saturated."""
    alive_firings: int = 10
    random_sample: int = 500
    seed: int = 0
