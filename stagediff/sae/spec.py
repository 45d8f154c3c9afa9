"""Specs of the dictionary steps: train, finetune, import, statistics, quality."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from stagediff.lm.spec import ActivationData, ModelSource
from stagediff.spec import Later, Ref, Spec, Value, Where

__all__ = ["Budget", "DictionaryConfig", "FinetuneSpec", "ImportSpec", "QualitySpec", "StatisticsSpec", "TrainSpec", "ascending_shares"]


class DictionaryConfig(Value):
    """The dictionary itself: architecture, width and what belongs to its function."""

    architecture: Literal["relu", "topk", "batchtopk", "jumprelu"] = "relu"
    features: PositiveInt = 1024
    k: int = 32
    """topk, batchtopk: active features per token (batchtopk: on average)."""
    l1: float = Field(3.0, ge=0)
    """relu: weight of sum_i f_i ||W_dec_i||. jumprelu: weight of the L0 term."""
    l1_warmup: float = Field(0.05, ge=0, le=1)
    """Share of the steps over which l1 rises linearly from 0 (training from scratch only)."""
    bandwidth: float = Field(0.2, gt=0)
    """jumprelu: width of the straight-through kernel, in units of the pre-activation. (The paper's 0.001 is for
    E||x||^2 = 1 and very long trainings; here E||x|| is sqrt(d), and bf16 resolves 0.008 between 1 and 2.)"""
    initial_threshold: float = Field(0.3, gt=0)
    """jumprelu: threshold of every feature at the start. It moves by at most a factor of 1 + lr a step: with a small one a short training
    never becomes sparse."""
    decoder_norm: Literal["free", "unit"] | None = None
    """None: free for relu (April-2024 recipe), unit for the others."""
    initial_norm: float | None = None
    """Decoder rows' norm at the start; None: 0.1 for relu, 1 for the others."""
    subtract_b_dec: bool | None = None
    """Whether b_dec is subtracted from the input; None: no for relu, yes for the others."""
    auxk: int | None = None
    """topk, batchtopk: dead features that reconstruct the error; None: d/2. Refused elsewhere: a dead ReLU feature has no positive
    pre-activation to reconstruct with (see `FinetuneSpec.revive`)."""
    auxk_weight: float = 0.03125
    dead_after: int = 10_000_000
    """Tokens without a firing after which a feature counts as dead in training."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.architecture in ("topk", "batchtopk") and not 0 < self.k <= self.features:
            raise ValueError(f"k is {self.k}, but the dictionary has {self.features} features; k must lie between 1 and that number")
        if self.auxk and self.architecture not in ("topk", "batchtopk"):
            raise ValueError(
                f"auxk is {self.auxk}, but {self.architecture} has no AuxK, only topk and batchtopk have. Leave auxk out; features that are "
                "dead at a finetune's start can be resampled (revive)"
            )
        return self


class Budget(Value):
    """One training's length and optimiser."""

    tokens: PositiveInt
    batch: PositiveInt = 4096
    lr: float = Field(4e-4, gt=0)
    warmup: float = Field(0.01, ge=0, le=1)
    """Share of the steps over which lr rises linearly."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of the steps, at the end, over which lr falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    focus: Annotated[float, Later()] = Field(0.0, ge=0, le=4)
    """How much more tokens count that are explained badly: each token's part of the loss is weighted by its squared error to this power
    (`stagediff.sae.focus`). 0: all alike, as both papers have it."""


def ascending_shares(at: tuple[float, ...]) -> tuple[float, ...]:
    """Checks `revive_at`."""
    if not at or list(at) != sorted(set(at)) or not (at[0] >= 0 and at[-1] < 1):
        raise ValueError(f"revive_at is {list(at)}; expected ascending shares of the steps, each at least 0 and below 1, such as [0, 0.4]")
    return at


class _Training(Spec):
    kind = "dictionaries"
    data: ActivationData
    budget: Budget
    order_seed: int = 0
    """Permutation of the rows; D, M, F and the nulls share it, so that they read the same rows in the same order."""
    compute: Literal["fp32", "bf16"] = "bf16"
    """Precision of the matrix products; master weights and optimiser are fp32 in either case."""
    checkpoint_tokens: int = 50_000_000
    """Tokens between two training checkpoints (in the key only so that a manifest tells what a kill may cost)."""
    keep_optimiser: bool = False
    """Whether the final optimiser state is stored too (optimiser.safetensors, twice the weights' size), for finetunes that carry it on."""


class TrainSpec(_Training):
    """A dictionary from scratch. The input scale is measured here, so that E||x|| = sqrt(d), and kept for good."""

    step = "train"
    dictionary: DictionaryConfig
    seed: int = 0


class FinetuneSpec(_Training):
    """A copy of `start` trained on: same indices, constant l1; same input scale and a fresh optimiser unless said otherwise.

    The defaults are those of a stage-wise diff. `rescale`, `optimiser`, `anchor`, `revive` and `paired` are for following a training run's
    checkpoints (method.md, section 3).
    """

    step = "finetune"
    start: Ref
    seed: int = 0
    """Draws the inputs of `revive`."""
    rescale: bool = False
    """Whether the input scale is measured anew on this data, so that E||x|| = sqrt(d) again: along a training run residual norms grow.
    Weights and optimiser state are in scaled units and stay as they are."""
    optimiser: Literal["fresh", "carried"] = "fresh"
    """carried: moments and step counts are those that `start` stored (keep_optimiser); the learning-rate schedule is the new budget's."""
    anchor: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Weight of ||W - W_0||^2, summed over all weights and biases, that draws them to where they are at step 0 (revived features: to their
    new weights). Applied beside Adam, see `stagediff.sae.optimiser.pull`."""
    revive: Literal["none", "resample"] = "none"
    """resample: features that are dead get new weights (see `stagediff.sae.revive`), listed in revived.parquet; such an index is a new feature
    from there on."""
    revive_at: tuple[float, ...] = (0.0,)
    """When: shares of the steps, ascending; 0 is before step 0. Features also die while a dictionary is trained on at a high learning rate;
    those can only be found on the way."""
    paired: ActivationData | None = None
    """The activations of the start's own checkpoint on the rows of `data`. Given, the start is carried over before step 0 (and before
    `revive`) by the linear maps between the two, see `stagediff.sae.transport`; every feature keeps its index. None: the start as it is."""
    revive_tokens: PositiveInt = 131_072
    """Tokens of the training order (at most one epoch) in which a feature that never fires counts as dead, and whose inputs are drawn."""

    @field_validator("revive_at")
    @classmethod
    def _ascending(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        return ascending_shares(at)

    @model_validator(mode="after")
    def _moments_in_one_basis(self) -> Self:
        if self.paired is not None and self.optimiser == "carried":
            raise ValueError(
                "a start that is transported (paired) cannot carry its optimiser: Adam's second moments belong to the coordinates before; "
                "use a fresh optimiser"
            )
        return self


class ImportSpec(Spec):
    """A dictionary made elsewhere, taken in unchanged."""

    step = "import"
    kind = "dictionaries"
    path: Where = None
    format: Literal["saelens", "dictionary_learning", "sparsify"] = "saelens"
    digest: str


class StatisticsSpec(Spec):
    """One streaming pass of a dictionary over held-out rows: densities, histograms, maxima, top examples."""

    step = "statistics"
    kind = "statistics"
    dictionary: Ref
    data: ActivationData
    """Rows of the stage's model on the held-out mix: new and base rows are counted apart."""
    base_rows_only: bool = False
    """True for stages whose data is base data: density, alive and quality are taken over base rows (new rows still fill the *_new columns)."""
    top: int = 20
    bins: int = 64
    """Histogram bins, logarithmic in activation, the same for every feature and stage."""
    batch: int = 4096


class QualitySpec(Spec):
    """The LM's cross-entropy with the reconstruction spliced in at the hook point (loss recovered)."""

    step = "quality"
    kind = "quality"
    dictionary: Ref
    model: ModelSource
    data: ActivationData
    """Which token rows (through base's and new's manifests); hook, skip_positions and precision are the harvest's."""
    rows: int = 256
