"""One Prefect task per registered step.

The store is the truth about what is done, not Prefect's cache: a task asks it first and returns at once when the artifact is complete, so a
rerun computes only what is missing, from any machine and after any kill. Faults of disk and network are tried again with growing, jittered
delays; a user's mistake or a defect is not.
"""

import logging
from functools import cache
from typing import Any

from prefect import Task, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.runtime import flow_run
from prefect.tasks import exponential_backoff

from stagediff import lanes, steps
from stagediff.errors import StagediffError
from stagediff.progress import Progress
from stagediff.spec import Ref
from stagediff.store import Store
from tasks.display import Reporter, show_result

__all__ = ["compute", "task_for"]

RETRIES = 4
FIRST_DELAY = 5.0
"""Seconds before the first retry; it doubles each time."""


@cache
def task_for(step: str) -> Task[..., str]:
    """The task of a registered step: named by it, tagged `gpu` where it wants one."""
    resources = steps.get(step).resources
    return task(
        name=step,
        task_run_name="{name}",
        tags=["gpu"] if resources.gpus else [],
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=FIRST_DELAY),
        retry_jitter_factor=0.5,
        retry_condition_fn=is_fault_of_the_moment,
    )(_compute)


def compute(
    name: str,
    step: str,
    spec: dict[str, Any],
    store: str,
    *,
    device: str = "auto",
    force: bool = False,
    part: tuple[int, int] = (0, 1),
    report: str | None = None,
) -> Ref:
    """Runs one step as a task of its own name within the current flow; returns its artifact's reference.

    `part`: (i, n), this worker's share of a sharded step. `report`: the reference of the run's report, to which the UI shows a link.
    """
    return Ref(task_for(step)(name=name, step=step, spec=spec, store=store, device=device, force=force, part=part, report=report))


def is_fault_of_the_moment(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: faults of disk and network, not user errors or defects."""
    try:
        state.result()
    except StagediffError:
        return False
    except (OSError, TimeoutError, ConnectionError) as fault:
        logging.getLogger("stagediff").warning("%s: %s: %s; trying again", run.name, type(fault).__name__, fault)
        return True
    except Exception:
        return False
    return False


def _compute(
    name: str,
    step: str,
    spec: dict[str, Any],
    store: str,
    device: str = "auto",
    force: bool = False,
    part: tuple[int, int] = (0, 1),
    report: str | None = None,
) -> str:
    opened = Store(store)
    full = steps.spec_from_json(step, spec)
    if not TaskRunContext.get():
        return lanes.run(full, opened, device=device, part=part, force=force, name=name)
    # once for a pipeline's run, however often this one is retried: a run that was killed just after the commit finds its work done
    once: bool | str = str(flow_run.parent_flow_run_id or flow_run.id) if force else False
    was_there = steps.is_done(full, opened, once)
    with Reporter(name, full.key) as reporter:
        ref = lanes.run(full, opened, device=device, part=part, progress=Progress(listener=reporter), force=once, name=name)
    if steps.is_done(full, opened):
        how = "was complete, nothing was computed" if was_there else "computed"
        show_result(name, ref, opened, how, report)
    else:
        how = f"part {part[0] + 1} of {part[1]} is done, others' shards are missing"
    get_run_logger().info("%s: %s at %s/%s", name, how, opened.root, ref)
    return ref
