"""Both methods on one dictionary lineage: the chain is tracked up to the base model, its last dictionary settles and becomes S of the diff."""

from typing import Any

from prefect import flow

from flows.session import Session
from flows.stagewise import stages
from flows.track import walk

__all__ = ["both"]


@flow(name="both", flow_run_name="both · {config[name]}", persist_result=False)
def both(config: dict[str, Any], store: str | None = None, device: str = "auto", force: list[str] | None = None) -> str:
    """Runs what is missing; returns the report's reference. `force` names steps to compute again."""
    run = Session(config, store, device=device, force=force or ())
    walk(run)
    stages(run)
    run.rest()
    return run.plan["report"].ref
