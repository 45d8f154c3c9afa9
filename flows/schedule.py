"""Runs a plan as child runs on work pools: everything whose inputs are there is started, the others follow as soon as they can.

The loop asks the store what is missing and the server how the children stand; it holds nothing that a retried pipeline could not find again. A child that
crashes is started again a few times; one that fails leaves what depends on it undone, while everything else still runs. The pipeline then fails and says which.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run

from flows.children import Child, Children, Piece, patiently
from flows.pools import CPU, GPU, gpus_of, type_of
from flows.resources import check_variables, job_variables
from flows.slots import GPUS
from stagediff import steps
from stagediff.errors import StagediffError, UserError
from stagediff.resources import StepResources, resources_of
from stagediff.spec import Ref

if TYPE_CHECKING:
    from flows.session import Session

__all__ = ["StepsFailedError", "Targets", "run_all"]

log = logging.getLogger("stagediff")

EVERY = 1.0
"""Seconds between two looks at the children."""
TRIES = 3
"""How often a step is started within one run of the pipeline while its artifact does not appear."""


class StepsFailedError(StagediffError):
    """Some steps of a pipeline did not finish; says which and what to do."""


class Targets:
    """Where each step's runs go: deployment, queue and job variables, from the config's `resources` and what the server has. Looked up once per step."""

    def __init__(self, resources: Mapping[str, StepResources], pool: str):
        self._resources, self._pool = resources, pool
        self._pools: dict[str, tuple[WorkPool, str]] = {}

    def wants(self, step: str) -> StepResources:
        return resources_of(step, self._resources)

    def gpus(self, step: str) -> int:
        return self.wants(step).gpus or 0

    def pool(self, step: str) -> str:
        return self.wants(step).pool or self._pool

    def deployment(self, step: str) -> str:
        return f"{step}/{self.pool(step)}"

    def queue(self, step: str) -> str:
        return GPU if self.gpus(step) > 0 else CPU

    def job_variables(self, step: str) -> dict[str, Any]:
        if self.pool(step) not in self._pools:  # of a step that became due later
            self.check({step})
        _, kind = self._pools[self.pool(step)]
        variables = job_variables(self.wants(step), kind)
        return {**variables, "env": {**variables.get("env", {}), GPUS: str(self.gpus(step))}}

    def check(self, wanted: set[str]) -> None:
        """Raises UserError where a step of the run could never start: no such pool or deployment, variables that the pool lacks, too many GPUs."""
        with get_client(sync_client=True) as client:
            for step in sorted(wanted):
                name = self.pool(step)
                if name not in self._pools:
                    self._pools[name] = self._look(client, name)
                try:
                    patiently(partial(client.read_deployment_by_name, self.deployment(step)))
                except ObjectNotFound:
                    raise UserError(
                        f"The Prefect server has no deployment {self.deployment(step)!r}. `make deploy` puts all steps on the pool "
                        f'"stagediff"; `make deploy POOLS="stagediff=process {name}=TYPE"` puts them on {name!r} too.'
                    ) from None
                pool, kind = self._pools[name]
                check_variables(self.job_variables(step), pool.base_job_template, name)
                has = patiently(partial(gpus_of, client, name)) if kind == "process" else None
                if has is not None and self.gpus(step) > has:
                    raise UserError(
                        f"The step {step} wants {self.gpus(step)} GPUs and the work pool {name!r} has {has}. Ask for less in the config's `resources`, name a "
                        f"larger pool there, or tell the pool that it has more: `make deploy GPUS={self.gpus(step)}`."
                    )

    def _look(self, client: Any, name: str) -> tuple[WorkPool, str]:
        try:
            pool = patiently(lambda: client.read_work_pool(name))
        except ObjectNotFound:
            there = ", ".join(sorted(p.name for p in patiently(client.read_work_pools)))
            raise UserError(
                f"The Prefect server has no work pool {name!r}; it has: {there or 'none'}. Correct `pool` in the config's `resources` (or the run's "
                "parameter `pool`), or make it with `make deploy`."
            ) from None
        return pool, type_of(pool)


def run_all(session: "Session") -> None:
    """Runs what is missing of the session's plan as children of the current flow run; raises StepsFailedError at the end where some did not finish."""
    plan, store, run = session.plan, session.store, session.steps_run
    if run.is_done:
        return
    targets = Targets(session.config.resources, session.pool)
    targets.check({node.spec.step for node in plan if not run.is_finished(node)})
    store.check_writable()
    children = Children(
        flow_run.id,
        plan.name,
        store,
        device=session.device,
        report=plan["report"].ref if "report" in plan else None,
        deployment=targets.deployment,
        job_variables=targets.job_variables,
        queue=targets.queue,
        gpus=targets.gpus,
    )
    going: dict[Ref, list[Child]] = {}
    failed: dict[Ref, list[Child]] = {}
    started: Counter[Ref] = Counter()
    while True:
        for node in run.startable(going, failed):
            started[node.ref] += 1
            if started[node.ref] > TRIES:
                raise StepsFailedError(
                    f"{node.name} ended as Completed {TRIES} times, but its artifact {store.root}/{node.ref} is not complete. Do its workers use "
                    "the same store as this run? A folder must be shared by all machines."
                )
            parts = 1 if node.spec.is_made_by_readers else targets.wants(node.spec.step).parts
            pieces = [Piece(node, part, parts, run.is_forced(node)) for part in range(parts)]
            going[node.ref] = [children.start(piece) for piece in pieces]
        if not going:
            break
        children.look(child for group in [*going.values(), *failed.values()] for child in group)
        moved = False
        for ref, group in list({**failed, **going}.items()):
            moved = _settle(session, children, ref, group, going, failed) or moved
        if not moved:
            time.sleep(EVERY)
    if failed:
        raise StepsFailedError(_told(session, failed))


def _settle(
    session: "Session", children: Children, ref: Ref, group: list[Child], going: dict[Ref, list[Child]], failed: dict[Ref, list[Child]]
) -> bool:
    """Takes notice of how a step's children stand; whether anything has changed that lets others start."""
    for i, child in enumerate(group):
        if child.is_final and child.may_run_again:
            group[i] = children.restart(child)
    if not all(child.is_final for child in group):
        if ref in failed:  # somebody pressed Retry on a failed child meanwhile
            going[ref] = failed.pop(ref)
        return False
    if not all(child.is_completed for child in group):
        going.pop(ref, None)
        failed[ref] = group
        return False
    node = group[0].piece.node
    going.pop(ref, None)
    failed.pop(ref, None)
    if steps.is_done(node.spec, session.store):
        session.steps_run.finished(node)
        log.info("%s: done", node.name)
    else:
        log.warning("%s: its run is over but its artifact is not complete; starting another", node.name)
    return True


def _told(session: "Session", failed: Mapping[Ref, list[Child]]) -> str:
    bad = [child for group in failed.values() for child in group if not child.is_completed]
    left = sum(not session.steps_run.is_finished(node) for node in session.plan) - len(failed)
    after = f" {left} steps that depend on {'it' if len(bad) == 1 else 'them'} were not started." if left else ""
    return (
        f"{len(bad)} of the pipeline's steps did not finish. {'; '.join(child.told for child in bad)}.{after} "
        "Mend the cause, then press Retry on this run: it starts what is missing and nothing else. (Retry on the step first does the same.)"
    )
