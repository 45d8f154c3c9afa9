"""A flow for every registered step, so that each can be deployed, seen, run and rerun by itself.

Prefect's UI retries flow runs, not tasks; so a step is a small flow that holds one task, and a pipeline starts such flows (`flows/children.py`).
All are made here by one factory from the registry: a room that registers a step has a flow, and with `make deploy` a deployment. Each is an attribute of
this module (dashes become underscores), so `flows/steps.py:harvest` is an entrypoint. The spec's own class is the parameter's type: the UI shows a form
with every setting, and the server refuses a run whose spec does not fit.
"""

import logging
import os
from typing import Any

from prefect import Flow, flow
from prefect.runtime import flow_run

from flows.names import attribute, run_name
from flows.places import check_store
from flows.slots import GPUS, gpu_slots
from stagediff import steps
from stagediff.spec import Ref, Spec
from stagediff.steps import Step
from tasks.steps import compute

__all__ = ["flow_of"]


def flow_of(step: Step) -> Flow[..., str]:
    """The flow of a registered step."""

    def run_step(
        run: str,
        name: str,
        spec: Spec,
        store: str,
        device: str = "auto",
        force: bool = False,
        part: int = 0,
        parts: int = 1,
        report: str | None = None,
    ) -> str:
        logging.getLogger("stagediff").setLevel(logging.INFO)  # Prefect's handler is there, but the level drops what the library says
        check_store(store)
        shown = None if report is None else Ref(report)
        body = spec.model_dump(mode="json")
        with gpu_slots(int(os.environ.get(GPUS, step.resources.gpus))):
            return compute(name, step.name, body, store, device=device, force=force, part=(part, parts), report=shown)

    run_step.__name__ = run_step.__qualname__ = attribute(step.name)
    run_step.__annotations__["spec"] = step.spec
    run_step.__doc__ = f"""Computes one artifact of the step {step.name!r}; at once where the store has it.

    Args:
        run: the name of the run that it belongs to, shown beside its own
        name: what this step is called in the run, "finetune-D"
        spec: everything that determines the result
        store: the folder or s3://bucket/prefix that holds the artifacts
        device: auto, cpu, cuda or cuda:1
        force: compute it again even where it is complete; the manifest says whether the bytes agree
        part: which share of the shards this run writes, of `parts`
        parts: how many runs share this artifact
        report: the run's report ("reports/<key>"), for a link
    """

    def name_of_this_run() -> str:
        given: dict[str, Any] = flow_run.parameters
        spec = step.spec.model_validate(given["spec"])
        return run_name(given["name"], given["run"], spec.key, given.get("part", 0), given.get("parts", 1))

    return flow(name=step.name, flow_run_name=name_of_this_run, persist_result=False, validate_parameters=True)(run_step)


for _step in steps.all_steps():
    globals()[attribute(_step.name)] = flow_of(_step)
