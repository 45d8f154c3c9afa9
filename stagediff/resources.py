"""What a step wants of a cluster: the config's `resources`, by step name. No part of any key.

    resources:
      harvest: {gpus: 4, memory: 64G}              # four processes on one node, each with its share of the shards
      train: {gpus: 8, cpus: 32, time_limit: 12h}  # eight ranks, data parallel; with shard: features each holds an eighth of the dictionary
      diff: {gpus: 0, memory: 32G}
      finetune: {parts: 1, pool: small}

A step that is not named gets what it was registered with (`steps.Resources`).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, field_serializer

from stagediff import steps
from stagediff.spec import Value

__all__ = ["StepResources", "checked", "resources_of"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"M": 1, "G": 1 << 10, "T": 1 << 20}


def _seconds(value: Any) -> Any:
    if isinstance(value, str):
        if match := re.fullmatch(r"(\d+)\s*(s|m|h|d)", value.strip()):
            return int(match[1]) * _UNITS[match[2]]
        raise ValueError(f"{value!r} is no duration; expected a number and s, m, h or d, as in 90m or 12h")
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; expected a number and s, m, h or d, as in 90m or 12h")
    return value


def _mebibytes(value: Any) -> Any:
    if isinstance(value, str):
        if match := re.fullmatch(r"(\d+)\s*(M|G|T)(i?B?)", value.strip()):
            return int(match[1]) * _SIZES[match[2]]
        raise ValueError(f"{value!r} is no amount of memory; expected a number and M, G or T, as in 64G (1 G is 1,024 M)")
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"{value} has no unit; expected a number and M, G or T, as in 64G (1 G is 1,024 M)")
    return value


class StepResources(Value):
    """One step's wishes. What is None is left to the pool's defaults."""

    gpus: int | None = Field(None, ge=0)
    """On one node. More than one means as many processes: of a sharded step each takes its share of the shards, of a training a slice of every batch."""
    shard: Literal["batch", "features"] = "batch"
    """What the processes of a training share out: every batch, or the dictionary's features where one GPU does not hold it."""
    cpus: PositiveInt | None = None
    """Also the number of threads."""
    memory: Annotated[int | None, BeforeValidator(_mebibytes)] = None
    """MiB; written as 64G."""
    time_limit: Annotated[int | None, BeforeValidator(_seconds)] = None
    """Seconds; written as 90m or 12h."""
    parts: PositiveInt = 1
    """Child runs, each with its share of the shards; sharded steps only."""
    pool: str | None = None
    """Name of the work pool; None: the deployment's."""

    @field_serializer("memory")
    def _memory_text(self, value: int | None) -> str | None:
        return None if value is None else f"{value}M"

    @field_serializer("time_limit")
    def _time_text(self, value: int | None) -> str | None:
        return None if value is None else f"{value}s"


def checked(resources: Mapping[str, StepResources]) -> None:
    """Raises ValueError, in plain words, where a name is no step's or a step cannot be run that way."""
    known = {step.name: step for step in steps.all_steps()}
    for name, wanted in resources.items():
        if name not in known:
            raise ValueError(f"{name!r} is not a step; known steps: {', '.join(sorted(known))}")
        if wanted.parts > 1 and not known[name].resources.sharded:
            able = ", ".join(sorted(s.name for s in known.values() if s.resources.sharded))
            raise ValueError(f"{name}.parts is {wanted.parts}, but only these steps can be shared out: {able}")
        if (wanted.gpus or 0) > 1 and not known[name].by_ranks:
            able = ", ".join(sorted(s.name for s in known.values() if s.by_ranks))
            raise ValueError(f"{name}.gpus is {wanted.gpus}, but that step runs on one device; these can use several: {able}")
        if wanted.shard == "features" and (known[name].assist is None or (wanted.gpus or 0) < 2):
            able = ", ".join(sorted(s.name for s in known.values() if s.assist))
            raise ValueError(f"{name}.shard is features with gpus: {wanted.gpus or 0}; that is for these steps on two GPUs or more: {able}")


def resources_of(step: str, resources: Mapping[str, StepResources | Mapping[str, Any]]) -> StepResources:
    """What a step gets: the config's word, else what it was registered with."""
    wanted = StepResources.model_validate(resources.get(step, {}))
    return wanted if wanted.gpus is not None else wanted.model_copy(update={"gpus": steps.get(step).resources.gpus})
