"""Spec of the report step, which ends every plan."""

from typing import Any

from stagediff.config import RunConfig
from stagediff.plan import Plan
from stagediff.spec import Ref, Spec

__all__ = ["ReportSpec", "add_report"]


class ReportSpec(Spec):
    """A self-contained page about one run. Sections come from the rooms whose steps registered one."""

    step = "report"
    kind = "reports"
    reads_bulk = False
    title: str
    nodes: dict[str, Ref]
    """Every artifact of the run, by its name in the plan ("statistics-S"): lineage, and what the sections read."""
    config: dict[str, Any]
    """The run's config as the user wrote it (defaults filled in)."""
    examples: int = 200
    """How many extreme and how many random features carry examples beside the selected ones."""
    seed: int = 0


def add_report(config: RunConfig, plan: Plan) -> None:
    """Ends a plan with the report on all its artifacts."""
    nodes = {node.name: node.ref for node in plan}
    plan.add("report", ReportSpec(title=plan.name, nodes=nodes, config=plan.config, examples=config.report.examples, seed=config.seed))
