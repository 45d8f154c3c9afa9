"""Specs of planted truth for the stage-wise diff: two "models" and two "data sets" whose features, and what makes each differ, are known.

A feature's direction may depend on the model and on the data (u_i(model, data)). Classes:

unchanged    fires on both data, in both models; like all others it wanders up to `jitter` degrees from the base to the finetuned model
model only   turned by `model_angle` in the finetuned model, on all data
data only    fires on new rows alone, in both models alike
appears      both: fires on new rows alone, and writes nothing in the base model
differs      both: fires on new rows alone, in two directions `angle` apart in the two models
turns        both: rare in base data; on new rows of the finetuned model it is frequent and turned by `angle`, elsewhere it stays

The last three are the target of a stage-wise diff: only model and data together explain them. A common rotation turns the whole finetuned model.
"""

from typing import Literal

from pydantic import Field, model_validator

from stagediff.lm.spec import HarvestSpec, TokensSpec
from stagediff.spec import Ref, Spec, Value

__all__ = [
    "BLOCK_ROWS",
    "CLASSES",
    "TARGETS",
    "DiffMeasures",
    "DiffWorld",
    "PlantedDiffHarvestSpec",
    "PlantedDiffSpec",
    "PlantedDiffTokensSpec",
]

BLOCK_ROWS = 256
"""Rows whose random numbers are drawn together."""
TARGETS = ("appears", "differs", "turns")
CLASSES = ("unchanged", "model only", "data only", *TARGETS)


class DiffWorld(Value):
    """Everything about features, rows and activations follows from these numbers.."""

    seed: int
    d: int = Field(128, ge=8)
    unchanged: int = Field(404, ge=1)
    model_only: int = Field(40, ge=0)
    data_only: int = Field(24, ge=0)
    appears: int = Field(16, ge=0)
    differs: int = Field(16, ge=0)
    turns: int = Field(16, ge=0)
    l0: float = Field(8.0, gt=0)
    """Base features that fire per token of base data, shared out by Zipf's law: p(rank) ~ 1 / (rank + 10)."""
    new_share: float = Field(0.05, gt=0, lt=1)
    """New rows in the mix."""
    angle: float = Field(60.0, ge=0, le=90)
    model_angle: float = Field(60.0, ge=0, le=90)
    jitter: float = Field(10.0, ge=0, le=90)
    common_rotation: float = Field(0.0, ge=0, le=90)
    """Degrees by which a common rotation turns a direction of the finetuned model, on average."""
    noise: float = Field(0.05, ge=0)
    """Standard deviation per coordinate; a feature that fires has a norm of 0.5 to 1.5. The same in both models."""
    topics: int = Field(16, ge=1)
    """Every row has one; it makes some features more frequent and others rarer, so that they are correlated."""
    topic_spread: float = Field(0.7, ge=0)
    """Standard deviation of the logarithm of these factors."""
    context: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _has_targets(self) -> "DiffWorld":
        if not self.targets:
            raise ValueError("a world needs features that model and data explain together: appears, differs and turns are all 0")
        return self

    @property
    def base_features(self) -> int:
        """Features that fire in base data."""
        return self.unchanged + self.model_only + self.turns

    @property
    def features(self) -> int:
        return self.base_features + self.data_only + self.appears + self.differs

    @property
    def targets(self) -> int:
        return self.appears + self.differs + self.turns


class PlantedDiffTokensSpec(TokensSpec):
    """Rows of one of the world's two data sets (`is_new`). A row's tokens all are the word of its topic: they stand for places, not for text."""

    step = "planted-diff-tokens"
    world: DiffWorld


class PlantedDiffHarvestSpec(HarvestSpec):
    """Activations of the world's rows in one of its two models (array "data", as a harvest's).

    `hook`, `precision` and `batch_rows` mean nothing here; `model` only tells the two models apart.
    """

    step = "planted-diff-harvest"
    world: DiffWorld
    side: Literal["base", "finetuned"]

    @model_validator(mode="after")
    def _whole_rows(self) -> "PlantedDiffHarvestSpec":
        if self.skip_positions:
            raise ValueError(f"planted activations skip no positions, given: {self.skip_positions}")
        return self

    @property
    def width(self) -> int | None:
        return self.world.d


class DiffMeasures(Value):
    """What counts as found."""

    represents: float = Field(0.75, gt=0, lt=1)
    """Decoder cosine from which a latent stands for a planted feature, if no other feature is nearer."""
    born: float = Field(0.9, gt=0, le=1)
    """Share of the target features that both F dictionaries must have; with less the dictionaries are undertrained and nothing is scored."""


class PlantedDiffSpec(Spec):
    """Scores a diff of the world, and its rivals, against what was planted.

    scores.parquet: a row per score and class. cuts.parquet: what cuts select, against the truth. births.parquet: which share of each class exists in each F.
    features.parquet: a row per target feature.
    """

    step = "planted-diff"
    kind = "planted"
    world: DiffWorld
    diff: Ref
    align: Ref
    null: Ref
    dictionaries: dict[str, Ref]
    """All stages, and "D_null", "M_null": D and M trained on with nothing new, the null's first repeat."""
    rivals: dict[str, Ref] = {}
    """Method (`stagediff.evidence.rivals`) -> its latents."""
    measures: DiffMeasures = DiffMeasures()
