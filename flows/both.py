"""Both methods on one dictionary lineage: the chain is tracked up to the base model, its last dictionary settles and becomes S of the diff."""

from typing import Any

from prefect import flow

from flows.children import cancel_children
from flows.names import pipeline_name
from flows.session import POOL, Mode, Session
from flows.stagewise import stages
from flows.track import walk

__all__ = ["both"]


@flow(name="both", flow_run_name=pipeline_name("both"), persist_result=False, on_cancellation=[cancel_children])
def both(
    config: dict[str, Any] | str,
    store: str | None = None,
    device: str = "auto",
    force: list[str] | None = None,
    mode: Mode = "inline",
    pool: str = POOL,
    jobs: int = 1,
) -> str:
    """Runs what is missing of both; returns the report's reference.

    Args:
        config: the run's config, or the path of its file on the worker's machine
        store: instead of the config's
        device: auto, cpu, cuda or cuda:1
        force: names of steps to compute again, "finetune-D"; what depends on one follows if its bytes changed
        mode: inline, in this process; deployments, every step a run of its own
        pool: the work pool of those runs, where the config's `resources` name no other
        jobs: inline, how many steps to run at a time, each in a process with its share of the cores
    """
    run = Session(config, store, device=device, force=force or (), mode=mode, pool=pool, jobs=jobs)
    walk(run)
    stages(run)
    run.rest()
    return run.plan["report"].ref
