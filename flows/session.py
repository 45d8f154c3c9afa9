"""A run of a plan inside a flow: starts what is missing, step by step, by the steps' names."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from stagediff.config import make_plan, parse_config
from stagediff.errors import UserError
from stagediff.plan import Node, Plan, forced_after
from stagediff.spec import Ref
from stagediff.store import Store
from tasks.steps import compute

__all__ = ["Session"]


class Session:
    """The plan of a config, being run. Calling it with name patterns runs what matches and is missing, in the plan's order."""

    def __init__(self, config: Mapping[str, Any], store: str | None = None, *, device: str = "auto", force: Iterable[str] = ()):
        self.config = parse_config(config, store=store)
        self.store = Store(self.config.store)
        self.plan: Plan = make_plan(self.config, self.store)
        self.device = device
        unknown = [name for name in force if name not in self.plan]
        if unknown:
            raise UserError(f"force names {', '.join(unknown)}; this run's steps are: {', '.join(n.name for n in self.plan)}.")
        self.forced: set[Ref] = {self.plan[name].ref for name in force}
        self.seen: set[str] = set()

    def __call__(self, *patterns: str) -> None:
        """Runs the steps whose names match; a pattern may match nothing (a run on given models makes no organism)."""
        for node in self.plan:
            if node.name not in self.seen and any(fnmatch(node.name, pattern) for pattern in patterns):
                self._run(node)

    def rest(self) -> None:
        """Runs what no pattern has named yet: the steps of rooms that extend this kind of run, and the report."""
        self("*")

    def _run(self, node: Node) -> None:
        self.seen.add(node.name)
        again = node.ref in self.forced
        if not again and node not in self.plan.missing(self.store):
            return
        compute(node.name, node.spec.step, node.spec.model_dump(mode="json"), self.store.root, device=self.device, force=again)
        if again:
            self.forced |= forced_after(self.plan, node, self.store)
        if self.config.keep == "tables":
            self.plan.evict_unneeded(self.store)
