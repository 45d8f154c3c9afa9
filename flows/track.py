"""SAE-Track as a flow: a dictionary walks through the checkpoints of a training run.

per checkpoint t:  harvest(model[t]) ── SAE[t], from SAE[t-1] ── statistics, quality on the probe rows
                   here and there beside it: the null over a frozen checkpoint, dictionaries from scratch to compare with
all checkpoints ── kinds, formation, drift, patterns, phases, umap, efficiency ── report
"""

from typing import Any

from prefect import flow

from flows.session import Session

__all__ = ["track", "walk"]


@flow(name="sae-track", flow_run_name="sae-track · {config[name]}", persist_result=False)
def track(config: dict[str, Any], store: str | None = None, device: str = "auto", force: list[str] | None = None) -> str:
    """Runs what is missing of a tracked run; returns the report's reference. `force` names steps to compute again."""
    run = Session(config, store, device=device, force=force or ())
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
