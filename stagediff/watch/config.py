"""The `watch` settings of a config: where a training run's checkpoints appear, and when one counts."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from stagediff.config import RunConfig
from stagediff.plan import Plan
from stagediff.spec import Value
from stagediff.store import Store

__all__ = ["STEP", "TRAINER", "WatchConfig", "add_nothing"]

STEP = "{step}"
TRAINER = "checkpoint-{step}"
"""How transformers' Trainer names its checkpoints' folders."""


class WatchConfig(Value):
    """Where checkpoints appear, and how they are taken.

    watch: {source: runs/lm, every: 60}                          # folders runs/lm/checkpoint-{step}, as the Trainer makes them
    watch: {source: "s3://bucket/run/step{step}/hf"}             # any template
    watch: {source: owner/model, revision: "step{step}"}         # a hub repository's branches or tags
    """

    source: str | None = None
    """A folder, an s3:// prefix (Trainer's names in it), a path or URL with {step}, or a hub name; None: where the config's model name leads."""
    revision: str | None = None
    """Of a hub repository: its branches or tags, such as "step{step}"."""
    run: str | None = None
    """The name under which the training announces its checkpoints; None: the config's name."""
    every: float = Field(60.0, ge=1)
    """Seconds between two looks."""
    quiet: float = Field(60.0, ge=0)
    """A checkpoint of which nothing proves that it is whole counts once none of its files has changed for so many seconds."""
    multiple_of: int = Field(1, ge=1)
    """Only steps that this number divides are taken."""

    @model_validator(mode="before")
    @classmethod
    def _whole_template(cls, body: Any) -> Any:
        """A folder or prefix means the Trainer's names in it."""
        if not isinstance(body, Mapping) or body.get("revision") is not None or not isinstance(body.get("source"), str):
            return body
        source = body["source"].strip()
        if not source:
            raise ValueError("source is empty; expected a folder, s3://bucket/prefix, or a hub name with revision")
        return body if STEP in source else {**body, "source": f"{source.rstrip('/')}/{TRAINER}"}

    @model_validator(mode="after")
    def _one_place_for_the_step(self) -> "WatchConfig":
        if self.revision is not None:
            if self.source is not None and STEP in self.source:
                raise ValueError(f"source ({self.source!r}) and revision both tell the step; a hub repository's name holds no {STEP}")
            if self.revision.count(STEP) != 1:
                raise ValueError(f'revision {self.revision!r} should hold {STEP} once, as in "step{STEP}"')
        elif self.source is not None and self.source.count(STEP) > 1:
            raise ValueError(f"source {self.source!r} holds {STEP} more than once")
        return self


def add_nothing(config: RunConfig, settings: dict[str, Any], plan: Plan, store: Store) -> None:
    """What `watch` adds to the plan of the run that the file names: nothing. `stagediff watch` makes the configs for what it finds."""
