"""The config of a tracked training run (`kind: track`), as design and README show it."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from stagediff.config import RunConfig
from stagediff.inputs.config import CorpusConfig, FinetuneConfig, HarvestConfig, OrganismConfig, TrainConfig
from stagediff.lm.spec import HookPoint, ModelSource
from stagediff.sae.spec import DictionaryConfig, ascending_shares
from stagediff.spec import Value
from stagediff.track.spec import FormationRule, KindRule, PatternRule, PhaseRule, UmapRule

__all__ = ["CheckpointsConfig", "FollowConfig", "FoundCheckpoint", "TrackConfig", "TrackDataConfig", "TrackModelConfig"]


class FoundCheckpoint(Value):
    """A checkpoint as `stagediff watch` found it: where, and the digest of what was there (as in `ModelSource`)."""

    name: str
    revision: str | None = None
    digest: str


class TrackModelConfig(Value):
    """The model whose checkpoints are followed: a name with `{step}` in it or in its revision, or an organism made here."""

    name: str | None = None
    """A hub name, or a path such as "runs/lm/checkpoint-{step}"."""
    revision: str | None = None
    """Such as "step{step}" (Pythia)."""
    organism: OrganismConfig | None = None
    """Its `checkpoints` default to the run's steps. Name more of them where the chain is to grow: they are part of the organism's key."""
    found: dict[int, FoundCheckpoint] = {}
    """Checkpoints that were found by watching, by step: they are taken by their digest, wherever name leads and even where they are gone since."""

    @model_validator(mode="after")
    def _one_source(self) -> "TrackModelConfig":
        if (self.name is None) == (self.organism is None):
            raise ValueError("the model is given by exactly one of name and organism")
        if self.name and "{step}" not in self.name + (self.revision or ""):
            raise ValueError(
                f"neither name ({self.name!r}) nor revision ({self.revision!r}) holds {{step}}, so every checkpoint would be the same model; "
                'write for example revision: "step{step}" or name: "runs/lm/checkpoint-{step}"'
            )
        return self

    def at(self, step: int) -> dict[str, Any]:
        """Name and revision of one checkpoint."""
        if step in self.found:
            return {"name": self.found[step].name, "revision": self.found[step].revision}
        return {k: v and v.replace("{step}", str(step)) for k, v in (("name", self.name), ("revision", self.revision))}

    def pinned(self, step: int) -> ModelSource | None:
        """The model of a checkpoint that was found by watching."""
        return ModelSource(**self.found[step].model_dump()) if step in self.found else None


class CheckpointsConfig(Value):
    """Which checkpoints, and which way the dictionary walks."""

    steps: tuple[int, ...] = ()
    """At least two; a run that is watched may name none, or those it begins with."""
    direction: Literal["forward", "backward"] = "forward"
    """forward: from the first checkpoint on (the paper); backward: from the last one back (its script)."""

    @field_validator("steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if any(s < 0 for s in steps):
            raise ValueError(f"steps are training steps of the model, 0 or more; given: {min(steps)}")
        repeated = sorted({s for s in steps if steps.count(s) > 1})
        if repeated:
            raise ValueError(f"every step is named once; repeated: {repeated}")
        if list(steps) != sorted(steps):
            raise ValueError("steps must ascend (for a backward walk set direction: backward)")
        return steps


class TrackDataConfig(CorpusConfig):
    """The corpus, and which part of it is held out for the probe rows."""

    heldout: float = Field(0.1, gt=0, lt=1)
    seed: int | None = None


class FollowConfig(FinetuneConfig):
    """How the dictionary is carried on to each next checkpoint (P2: 1/20 of the first budget, a tenth of its lr)."""

    optimiser: Literal["fresh", "carried"] = "fresh"
    anchor: float = Field(0.0, ge=0)
    """Pull towards the previous checkpoint's weights."""
    revive: Literal["none", "resample"] = "none"
    """What happens to features that are dead at a new checkpoint; a resampled index is a new feature from there on."""
    revive_at: tuple[float, ...] = (0.0,)
    """When, as shares of the following steps; [0, 0.4]: before the first step, and for those that died since once more on the way."""
    transport: Literal["none", "linear"] = "none"
    """linear: before it is trained on, the dictionary is carried to the new checkpoint by the linear maps between the two checkpoints'
    activations of the same rows (`stagediff.sae.transport`); indices stay. The previous checkpoint's activations lie on disk until then."""

    @field_validator("revive_at")
    @classmethod
    def _ascending(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        return ascending_shares(at)

    @model_validator(mode="after")
    def _moments_in_one_basis(self) -> "FollowConfig":
        if self.transport != "none" and self.optimiser == "carried":
            raise ValueError(
                "follow.transport changes the dictionary's coordinates, which a carried optimiser's moments do not follow; "
                "use optimiser: fresh, or transport: none"
            )
        return self


class ScratchConfig(Value):
    """Dictionaries from scratch to compare with."""

    at: tuple[int, ...] = ()
    """Checkpoints at which one is trained with the first budget."""
    short: bool = True
    """And one with the following budget."""


class ProbeConfig(Value):
    """Held-out rows kept at every checkpoint for good: statistics, regions, formation and drift draw on them."""

    tokens: int = Field(4_194_304, gt=0)
    quality_rows: int = Field(256, ge=1)


class NullConfig(Value):
    """The retrain null: the following recipe carried on over a frozen checkpoint."""

    at: int | None = None
    """Which checkpoint is frozen; None: the chain's last. A chain that grows keeps its null when a step is named here."""
    repeats: int = Field(3, ge=0)


class TrackConfig(RunConfig):
    """One dictionary followed through the checkpoints of a training run."""

    kind: Literal["track"]
    model: TrackModelConfig
    checkpoints: CheckpointsConfig
    data: TrackDataConfig
    hook: HookPoint
    context: int = Field(128, ge=2)
    tokens: int | None = Field(None, gt=0)
    """Tokens drawn from the corpus; None: as many as the largest budget reads. A larger budget reads them again."""
    harvest: HarvestConfig = HarvestConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    train: TrainConfig = TrainConfig()
    follow: FollowConfig = FollowConfig()
    scratch: ScratchConfig = ScratchConfig()
    probe: ProbeConfig = ProbeConfig()
    retrain_null: NullConfig = NullConfig()
    ahead_gib: float | None = Field(None, gt=0)
    """Disk for activations harvested ahead of training; None: one checkpoint ahead. With `keep: tables` no more than this stays."""
    alive_firings: int = Field(10, ge=1)
    kinds: KindRule = KindRule()
    formation: FormationRule = FormationRule()
    patterns: PatternRule = PatternRule()
    phases: PhaseRule = PhaseRule()
    umap: UmapRule | None = UmapRule()

    @model_validator(mode="before")
    @classmethod
    def _watched(cls, body: Any) -> Any:
        """A run that is watched finds its model's checkpoints itself (see stagediff.watch): it need not name them."""
        watch = (body.get("extensions") or {}).get("watch") if isinstance(body, Mapping) else None
        if not isinstance(watch, Mapping):
            return body
        source = {"model": {"name": watch["source"], "revision": watch.get("revision")}} if watch.get("source") else {}
        return {**source, "checkpoints": {}, **body}

    @model_validator(mode="after")
    def _consistent(self) -> "TrackConfig":
        if "watch" in self.extensions:
            self._check_watched()
        elif len(self.checkpoints.steps) < 2:
            raise ValueError(f"checkpoints.steps should name at least 2 checkpoints; given: {list(self.checkpoints.steps)}")
        steps = self.checkpoints.steps
        for name, named in (
            ("scratch.at", self.scratch.at),
            ("retrain_null.at", (self.retrain_null.at,) if self.retrain_null.at is not None else ()),
        ):
            if (unknown := [s for s in named if s not in steps]) and "watch" not in self.extensions:
                raise ValueError(f"{name} names {unknown}, which are not among checkpoints.steps")
        organism = self.model.organism
        if organism and steps[-1] > organism.training.steps:
            raise ValueError(f"checkpoints.steps go up to {steps[-1]}, but the organism is trained for {organism.training.steps} steps")
        if organism and organism.checkpoints:
            missing = [s for s in steps if s not in organism.checkpoints and s != organism.training.steps]
            if missing:
                raise ValueError(
                    f"checkpoints.steps {missing} are not among model.organism.checkpoints; leave the latter out, or name them there"
                )
        if max(self.harvest.skip_positions, default=-1) >= self.context or len(set(self.harvest.skip_positions)) >= self.context:
            raise ValueError(f"harvest.skip_positions {self.harvest.skip_positions} leave nothing of a context of {self.context}")
        if self.data.builtin not in (None, "stdlib"):
            raise ValueError(f"data cannot be builtin: {self.data.builtin}; that corpus belongs to a stage-wise run")
        return self

    def _check_watched(self) -> None:
        if self.model.organism:
            raise ValueError("watch cannot follow an organism: its checkpoints are made by the run itself")
        if self.checkpoints.direction == "backward":
            raise ValueError("watch needs direction: forward; a backward walk would begin anew at every new checkpoint")
