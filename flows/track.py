"""SAE-Track as a flow: a dictionary walks through the checkpoints of a training run.

per checkpoint t:  harvest(model[t]) ── SAE[t], from SAE[t-1] ── statistics, quality on the probe rows
                   here and there beside it: the null over a frozen checkpoint, dictionaries from scratch to compare with
all checkpoints ── kinds, formation, drift, patterns, phases, umap, efficiency ── report
"""

from typing import Any

from prefect import flow

from flows.children import cancel_children
from flows.names import pipeline_name
from flows.session import POOL, Mode, Session

__all__ = ["track", "walk"]


@flow(name="sae-track", flow_run_name=pipeline_name("sae-track"), persist_result=False, on_cancellation=[cancel_children])
def track(
    config: dict[str, Any] | str,
    store: str | None = None,
    device: str = "auto",
    force: list[str] | None = None,
    mode: Mode = "inline",
    pool: str = POOL,
    jobs: int = 1,
) -> str:
    """Runs what is missing of a tracked run; returns the report's reference.

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
    run.rest()
    return run.plan["report"].ref


def walk(run: Session) -> None:
    """The chain and its analysis."""
    run("tokenizer", "tokens-chain", "tokens-probe", "tokens-organism", "organism")
    # in the plan's order: each harvest stands before the trainings that read it, as far ahead as the disk budget goes
    run(
        "harvest-step*", "probe-*", "train-step*", "follow-step*", "statistics-s*", "quality-s*", "null-*", "harvest-scratch-*", "scratch-*"
    )
    run("kinds", "formation", "drift")
    run("patterns", "phases", "umap", "efficiency")
