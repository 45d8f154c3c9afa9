"""Specs of planted truth: synthetic checkpoints of one "training run" whose features and their fates are known (method.md, section 4).

Only trajectories for SAE-Track are planted so far. The planted steps write the artifacts that real ones write (`tokenizers`, `tokens`, `activations`;
their specs are subclasses of the real ones), so that training, statistics and analysis run on them as they are.
"""

from typing import Literal

from pydantic import Field, model_validator

from stagediff.lm.spec import HarvestSpec, TokensSpec
from stagediff.spec import Ref, Spec, Value
from stagediff.synthetic.roles import ROLES, SHARES

__all__ = [
    "CHECKPOINT_STEPS",
    "LADDER",
    "RUNGS",
    "Measures",
    "PlantedHarvestSpec",
    "PlantedTokenizerSpec",
    "PlantedTokensSpec",
    "PlantedTrackSpec",
    "Rung",
    "TrackWorld",
    "world",
]

CHECKPOINT_STEPS = 1000
"""Training steps between two checkpoints: tables that want steps get checkpoint x this."""


class Rung(Value):
    """How hard a world is."""

    noise: float
    """Standard deviation of the Gaussian noise per coordinate; a feature that fires has a norm of about 1."""
    superposition: float
    """Planted features per dimension."""
    rotation: float
    """Degrees per checkpoint by which the moving features turn, always the same way."""
    jitter: float
    """Degrees per checkpoint by which every feature turns, every time another way."""
    width: int
    """Checkpoints over which a change goes."""


LADDER = {
    "easy": Rung(noise=0.05, superposition=1.0, rotation=2.0, jitter=0.5, width=1),
    "middle": Rung(noise=0.08, superposition=1.5, rotation=4.0, jitter=1.0, width=2),
    "hard": Rung(noise=0.2, superposition=3.0, rotation=8.0, jitter=2.0, width=4),
}
RUNGS = tuple(LADDER)


class TrackWorld(Value):
    """A planted training run: everything about rows, features and checkpoints follows from these numbers."""

    seed: int
    rung: Rung
    d: int = Field(64, ge=8)
    checkpoints: int = Field(24, ge=12)
    growth: float = Field(5.0, gt=0)
    """Norm of the activations at the last checkpoint, in those at the first (geometric in between), as residual norms grow in pretraining."""
    context: int = Field(32, ge=8)
    segment: int = Field(16, ge=1)
    """Tokens that share a topic."""
    shares: dict[str, float] = SHARES
    """Role -> share of the planted features that has it."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrackWorld":
        if unknown := sorted(set(self.shares) - set(ROLES)):
            raise ValueError(f"unknown roles {', '.join(unknown)}; known: {', '.join(ROLES)}")
        if self.context % self.segment:
            raise ValueError(f"context {self.context} is no multiple of segment {self.segment}")
        return self

    @property
    def features(self) -> int:
        """How many features are planted."""
        return round(self.rung.superposition * self.d)


def world(rung: str, seed: int) -> TrackWorld:
    """The world of a rung of the ladder."""
    return TrackWorld(seed=seed, rung=LADDER[rung])


class PlantedTokenizerSpec(Spec):
    """A tokenizer that knows the artificial words w0, w1, … of a world, split at blanks."""

    step = "planted-tokenizer"
    kind = "tokenizers"
    vocab: int


class PlantedTokensSpec(TokensSpec):
    """Token rows of a world, and beside them the array "topics" [rows, context, streams] int32: the topics that hold at each token."""

    step = "planted-tokens"
    world: TrackWorld


class PlantedHarvestSpec(HarvestSpec):
    """Activations of a world's rows at one checkpoint (array "data", as a harvest's), or its reference space.

    `model`, `hook`, `precision` and `batch_rows` mean nothing here.
    """

    step = "planted-harvest"
    world: TrackWorld
    checkpoint: int = Field(ge=0)
    space: Literal["hook", "reference"] = "hook"
    """reference: what a token means in its context, free of the checkpoint: a stand-in for the final model's last layer."""

    @model_validator(mode="after")
    def _exists(self) -> "PlantedHarvestSpec":
        if self.checkpoint >= self.world.checkpoints:
            raise ValueError(f"checkpoint {self.checkpoint} is asked of a world with {self.world.checkpoints}")
        if self.skip_positions:
            raise ValueError(f"planted activations skip no positions, given: {self.skip_positions}")
        return self

    @property
    def width(self) -> int | None:
        return self.world.d


class Measures(Value):
    """What counts as right."""

    match_cosine: float = 0.7
    """Decoder cosine from which a latent counts as a planted feature's."""
    slack: int = 1
    """Checkpoints by which a found time may be off."""
    kind_share: float = 0.9
    """A feature's kind is right when it is so at this share of the checkpoints at which the truth is known."""


class PlantedTrackSpec(Spec):
    """Scores an analysed chain against its world.

    features.parquet: a row per planted feature (see stagediff.synthetic.score). kinds.parquet: feature, checkpoint, truth, found. events.parquet: every
    planted and every found event. confusion.parquet: truth, found, count.
    """

    step = "planted-track"
    kind = "planted"
    world: TrackWorld
    tokens: Ref
    """Probe rows."""
    dictionaries: tuple[Ref, ...]
    """One per checkpoint."""
    kinds: Ref
    formation: Ref
    patterns: Ref
    measures: Measures = Measures()
