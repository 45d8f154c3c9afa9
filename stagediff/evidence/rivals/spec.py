"""Specs of the rivals: their trainings, their latents on held-out rows, and the table."""

from typing import Literal

from pydantic import Field

from stagediff.lm.spec import ActivationData
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.spec import Ref, Spec

__all__ = ["BaselineSpec", "CrosscoderSpec", "DifferenceSpec", "LatentsSpec", "RivalsSpec"]


class _Rival(Spec):
    kind = "dictionaries"
    base: ActivationData
    """The base model's activations of the mix."""
    finetuned: ActivationData
    """The finetuned model's of the same rows."""
    dictionary: DictionaryConfig
    budget: Budget
    order_seed: int = 0
    compute: Literal["fp32", "bf16"] = "bf16"
    """Precision of the matrix products; master weights and optimiser are fp32 in either case."""
    checkpoint_tokens: int = 50_000_000
    seed: int = 0


class CrosscoderSpec(_Rival):
    """One dictionary over both models' activations of a token, laid side by side and scaled apart. relu or batchtopk."""

    step = "crosscoder"
    shared: float = Field(0.0, ge=0, lt=1)
    """relu: share of the latents, the first ones, that have one direction for both models."""
    shared_l1: float = Field(1.0, ge=0)
    """relu: their weight in the sparsity term, relative to the others'."""


class DifferenceSpec(_Rival):
    """A dictionary of what finetuning adds to the residual stream: finetuned minus base activations of every token."""

    step = "difference-sae"


class LatentsSpec(Spec):
    """What each latent of a rival does on held-out rows of the mix, and its scores."""

    step = "rival-latents"
    kind = "evidence"
    dictionary: Ref
    base: ActivationData
    finetuned: ActivationData
    top: int = 20
    alive_firings: int = 10
    batch: int = 4096


class RivalsSpec(Spec):
    """Every score on the same question: which features carry the new data."""

    step = "rivals"
    kind = "evidence"
    reads_bulk = False
    diff: Ref
    align: Ref
    latents: dict[str, Ref]
    """Method -> its latents."""
    trainings: dict[str, tuple[Ref, ...]]
    """Which dictionaries each score rests on, from the first training on: the stages "S", "D", … of the diff, and the methods."""


class BaselineSpec(Spec):
    """P1's baseline: the base model in place of the finetuned one, with the same mix; and what tells its features from the real run's."""

    step = "baseline"
    kind = "evidence"
    diff: Ref
    baseline: Ref
    """The diff of the same run with the base model as both models."""
    neighbours: int = Field(10, ge=1)
    """Nearest other alive latents over which clustering is taken."""
    single_token: float = Field(0.9, gt=0, le=1)
    """Share of a feature's top examples that peak on one token, from which it counts as single-token."""
