"""A run of a plan inside a flow: starts what is missing, in this process or as runs of their own.

inline       in the flow's own process, one step after the other or `jobs` of them side by side: a laptop, tests, `stagediff run`
deployments  every step a run of its own on a work pool, all whose inputs are there at the same time; the pools hold them back as far as they must

Both ask the store alone what is done, so either continues what the other began.
"""

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, Literal

from flows.places import absolute, check_store
from stagediff import lanes
from stagediff.config import load_config, make_plan, parse_config
from stagediff.errors import UserError
from stagediff.plan import Node, Plan, Run
from stagediff.store import Store
from tasks.steps import compute

__all__ = ["POOL", "Mode", "Session"]

Mode = Literal["inline", "deployments"]
POOL = "stagediff"
"""The work pool whose deployments steps go to where the config names no other."""


class Session:
    """The plan of a config, being run. Calling it with name patterns runs what matches and is missing, in the plan's order.

    With `mode="deployments"`, or `jobs` steps at a time, the order follows from what reads what, and `rest()` runs everything at once.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str,
        store: str | None = None,
        *,
        device: str = "auto",
        force: Iterable[str] = (),
        mode: Mode = "inline",
        pool: str = POOL,
        jobs: int = 1,
    ):
        if mode == "deployments":
            logging.getLogger("stagediff").setLevel(logging.INFO)  # Prefect's handler is there, but the level drops what the library says
        self.config = load_config(config, store=store) if isinstance(config, str) else parse_config(config, store=store)
        check_store(self.config.store)
        self.store = Store(absolute(self.config.store) if mode == "deployments" else self.config.store)
        self.plan: Plan = make_plan(self.config, self.store)
        self.device, self.mode, self.pool, self.jobs = device, mode, pool, jobs
        self.steps_run = Run(self.plan, self.store, force=self._names(force), keep=self.config.keep)
        self._seen: set[str] = set()

    def __call__(self, *patterns: str) -> None:
        """Runs the steps whose names match; a pattern may match nothing (a run on given models makes no organism)."""
        if self.mode == "deployments" or self.jobs > 1:
            return
        for named in self.plan:
            if named.name not in self._seen and any(fnmatch(named.name, pattern) for pattern in patterns):
                self._seen.add(named.name)
                for node in self.steps_run.due(named):
                    self._compute(node)
                    self.steps_run.finished(node)

    def rest(self) -> None:
        """Runs what no pattern has named yet: the steps of rooms that extend this kind of run, and the report."""
        if self.mode == "deployments":
            from flows.schedule import run_all

            run_all(self)
        elif self.jobs > 1:
            lanes.execute(self.steps_run, self.jobs, self._compute)
        else:
            self("*")

    def _compute(self, node: Node) -> None:
        report = self.plan["report"].ref if "report" in self.plan else None
        body = node.spec.model_dump(mode="json")
        compute(node.name, node.spec.step, body, self.store.root, device=self.device, force=self.steps_run.is_forced(node), report=report)

    def _names(self, given: Iterable[str]) -> list[str]:
        """The steps' names as the plan has them: whoever types "finetune-d" into a form means finetune-D."""
        names: dict[str, list[str]] = {}
        for node in self.plan:
            names.setdefault(node.name.lower(), []).append(node.name)
        out = []
        for name in given:
            alike = names.get(name.lower(), [])
            if name not in self.plan and len(alike) > 1:
                raise UserError(f"force names {name}, which may mean {' or '.join(alike)}: write it as it stands there.")
            out.append(name if name in self.plan or not alike else alike[0])
        return out
