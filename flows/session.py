"""A run of a plan inside a flow: starts what is missing, step by step, by the steps' names."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any

from stagediff.config import make_plan, parse_config
from stagediff.plan import Node, Plan, Run
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
        self._run = Run(self.plan, self.store, force=force, keep=self.config.keep)
        self._seen: set[str] = set()

    def __call__(self, *patterns: str) -> None:
        """Runs the steps whose names match; a pattern may match nothing (a run on given models makes no organism)."""
        for node in self.plan:
            if node.name not in self._seen and any(fnmatch(node.name, pattern) for pattern in patterns):
                self._compute(node)

    def rest(self) -> None:
        """Runs what no pattern has named yet: the steps of rooms that extend this kind of run, and the report."""
        self("*")

    def _compute(self, named: Node) -> None:
        self._seen.add(named.name)
        for node in self._run.due(named):
            again = self._run.is_forced(node)
            compute(node.name, node.spec.step, node.spec.model_dump(mode="json"), self.store.root, device=self.device, force=again)
            self._run.finished(node)
