"""What is deployed: every registered step, the pipelines, watch and janitor, as entries of `prefect.yaml`.

    python -m flows.deployments --write      writes prefect.yaml anew, from the registry
    python -m flows.deployments              says whether it is up to date

`make deploy` (`flows/deploy.py`) registers the same entries, on the pools it is given, with the API that PREFECT_API_URL names; `prefect deploy --all`
does so with the file alone, once the pool exists.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from flows.names import RETRY_TAG, attribute, tags
from flows.pools import CPU, GPU
from flows.session import POOL
from stagediff import steps
from stagediff.steps import Step

__all__ = ["FILE", "document", "other_entries", "step_entry"]

FILE = Path(__file__).parents[1] / "prefect.yaml"

ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "stagediff",  # the library's lines reach the UI
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # so that a run whose machine is gone is found out
    "PREFECT_CLIENT_MAX_RETRIES": "10",  # a server may restart
}
PIPELINES = {
    "stagewise": ("flows/stagewise.py:stagewise", "Stage-wise diff of a base and a finetuned model."),
    "sae-track": ("flows/track.py:track", "A dictionary followed through a training run's checkpoints."),
    "both": ("flows/both.py:both", "A training run tracked up to its last checkpoint, and the diff of a finetune that goes on from there."),
}
HEAD = """\
# Deployments of the pipeline, one per flow. Made from the registry of steps by `python -m flows.deployments --write`: do not edit.
# `make deploy` registers them with the Prefect API that PREFECT_API_URL names, and makes the work pool, its queues and the automations too.
"""


def step_entry(step: Step, pool: str = POOL) -> dict[str, Any]:
    """The deployment of a step. Its runs are started by a pipeline, or by hand from the form that the UI makes of its spec."""
    return {
        "name": pool,
        "description": f"The step {step.name!r}: computes one artifact ({step.spec.kind}/…), at once where the store has it.",
        "entrypoint": f"flows/steps.py:{attribute(step.name)}",
        "tags": tags(step),
        "work_pool": {"name": pool, "work_queue_name": GPU if step.resources.gpus else CPU, "job_variables": {"env": dict(ENVIRONMENT)}},
    }


def other_entries(pool: str = POOL) -> list[dict[str, Any]]:
    """The deployments that are no steps. They compute nothing themselves, so nothing holds them back."""
    from flows.watch import TRIGGERS  # it reads this module

    work_pool = {"name": pool, "job_variables": {"env": dict(ENVIRONMENT)}}
    out: list[dict[str, Any]] = [
        {
            "name": pool,
            "description": f"{what} Runs what is missing in the store, nothing else.",
            "entrypoint": entrypoint,
            "tags": ["stagediff", "pipeline", RETRY_TAG],
            "parameters": {"mode": "deployments", "pool": pool},
            "work_pool": work_pool,
        }
        for entrypoint, what in PIPELINES.values()
    ]
    watch = {
        "name": pool,
        "description": "Looks for new checkpoints of a training run and starts the pipeline for each, once.",
        "entrypoint": "flows/watch.py:watch",
        "tags": ["stagediff", "watch", RETRY_TAG],
        "parameters": {"mode": "deployments", "pool": pool},
        "work_pool": work_pool,
        "triggers": TRIGGERS,
    }
    janitor = {
        "name": pool,
        "description": "Starts crashed runs again, a few times each.",
        "entrypoint": "flows/janitor.py:janitor",
        "tags": ["stagediff", "janitor"],
        "work_pool": work_pool,
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        "schedules": [{"interval": 120.0}],
    }
    return [*out, watch, janitor]


def document() -> str:
    """prefect.yaml."""
    entries = [*(step_entry(step) for step in sorted(steps.all_steps(), key=lambda s: s.name)), *other_entries()]
    body = {"name": "stagediff", "prefect-version": ">=3.8.8", "deployments": entries}
    return HEAD + yaml.dump(body, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=150)


class _Plain(yaml.SafeDumper):
    """Without anchors: every entry stands for itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description="prefect.yaml, made from the registry of steps.")
    parser.add_argument("--write", action="store_true", help="write the file; otherwise only say whether it is up to date")
    if parser.parse_args().write:
        FILE.write_text(document())
        return 0
    if FILE.read_text() == document():
        print(f"{FILE.name} is up to date")
        return 0
    print(f"{FILE.name} is not what the registry says; write it anew: python -m flows.deployments --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
