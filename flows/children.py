"""The child runs of a pipeline run: one flow run per step that is missing, each found again when the pipeline is retried.

A child has an idempotency key made of the pipeline's run and what it computes. So however often a pipeline is retried, killed or run twice at once, it
meets the children it has: finished ones are done, running ones are waited for, and one that failed, crashed or was cancelled is scheduled again, in place,
as the UI's Retry button does. A forced step's key names the bytes of what it reads too: a retried pipeline neither forces it again nor mistakes an older
answer for it.

The server may be away for a while: what is asked of it is asked again for some minutes. The store, not the server, says what is complete.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Cancelling
from prefect.utilities.urls import url_for

from flows.crashes import Past, past_of, take_back
from flows.names import run_name, tags
from stagediff import steps
from stagediff.errors import UserError
from stagediff.plan import Node
from stagediff.spec import Ref
from stagediff.store import Store

__all__ = ["Child", "Children", "Piece", "cancel_children", "patiently"]

log = logging.getLogger("stagediff")

SETTLE = 5.0
"""Seconds between a crash and the next start, so that what ends at once is not started in a rush. Late reports: flows/crashes.py."""
AWAY = 900.0
"""Seconds for which the API may be away."""

PAGE = 100
"""How many runs are asked for at once; the API gives 200 at most unless it is set up otherwise."""
UNFINISHED = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED)

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What one child computes: a step, or one share of it."""

    node: Node
    part: int = 0
    parts: int = 1
    force: bool = False


@dataclass
class Child:
    """A child run as it was last seen."""

    piece: Piece
    run: FlowRun
    given_up: UUID | None = None
    """The crash after which it is left to people."""

    @property
    def is_final(self) -> bool:
        return self.run.state is not None and self.run.state.is_final()

    @property
    def is_completed(self) -> bool:
        return self.run.state is not None and self.run.state.is_completed()

    @property
    def may_run_again(self) -> bool:
        """Whether it crashed (its machine or process is gone) and is not given up. A step that failed would fail again."""
        return self.run.state is not None and self.run.state.is_crashed() and self.run.state.id != self.given_up

    @property
    def told(self) -> str:
        """How it stands, for people: its name, state, reason and page in the UI."""
        state = self.run.state
        reason = f": {' '.join(state.message.split())[:500]}" if state and state.message else ""
        return f"{self.run.name} is {state.name if state else 'unknown'}{reason} ({url_for('flow-run', obj_id=self.run.id) or self.run.id})"


class Children:
    """Starts, finds, follows and retries the children of one pipeline run."""

    def __init__(
        self,
        parent: UUID | str,
        run: str,
        store: Store,
        *,
        device: str = "auto",
        report: Ref | None = None,
        deployment: Callable[[str], str],
        job_variables: Callable[[str], Mapping[str, Any]] = lambda _: {},
        queue: Callable[[str], str | None] = lambda _: None,
        gpus: Callable[[str], int] = lambda step: steps.get(step).resources.gpus,
    ):
        """`deployment`, `job_variables`, `queue` and `gpus` say of a step's name where and on what its runs go."""
        self._parent, self._run, self._store, self._device, self._report = str(parent), run, store, device, report
        self._deployment, self._job_variables, self._queue, self._gpus = deployment, job_variables, queue, gpus

    def start(self, piece: Piece) -> Child:
        """The child for this piece: as it is where it has finished or is on its way, scheduled again where it ended otherwise, else a new one."""
        is_there = steps.is_done(piece.node.spec, self._store)
        again = 0
        while True:
            key = self._key(piece, again)
            with get_client(sync_client=True) as client:
                found = patiently(partial(self._find, client, key))
            if found is None:
                return Child(piece, patiently(partial(self._make, piece, key)))
            child = Child(piece, found)
            if child.is_final and not child.is_completed:
                return self._goes_on(child, self._past(child)) or self.retry(child)
            if not child.is_completed or is_there:
                return child
            again += 1  # it did its part, and what it made has been dropped or moved since

    def restart(self, child: Child) -> Child:
        """Schedules a crashed child once more, unless it crashes every time or was being cancelled: then it is given up.

        One whose crash is the late report of an earlier start's goes on as if nothing had been said.
        """
        assert child.run.state is not None
        past = self._past(child)
        if goes_on := self._goes_on(child, past):
            return goes_on
        if past.may_run_again():
            return self.retry(child)
        log.info(
            "%s is not started again: %s", child.run.name, "it was cancelled" if past.was_cancelled else f"it crashed {past.crashes} times"
        )
        return Child(child.piece, child.run, given_up=child.run.state.id)

    def retry(self, child: Child) -> Child:
        """Schedules a child that ended once more, as Retry in the UI does, some seconds after a crash."""
        state = child.run.state
        self._settle(child)
        log.info("%s ended as %s: scheduled again", child.run.name, state.name if state else "?")
        with get_client(sync_client=True) as client:
            now = patiently(lambda: client.read_flow_run(child.run.id))
            if now.state is not None and state is not None and now.state.type == state.type:  # nobody else was faster
                patiently(lambda: client.set_flow_run_state(now.id, AwaitingRetry(message="its pipeline was retried"), force=False))
                now = patiently(lambda: client.read_flow_run(child.run.id))
        return Child(child.piece, now)

    @staticmethod
    def _past(child: Child) -> Past:
        with get_client(sync_client=True) as client:
            return patiently(partial(past_of, client, child.run))

    @staticmethod
    def _goes_on(child: Child, past: Past) -> Child | None:
        """The child as it was before a late report took its state's place; None where no such thing has happened."""
        with get_client(sync_client=True) as client:
            if not patiently(partial(take_back, client, child.run, past)):
                return None
            return Child(child.piece, patiently(lambda: client.read_flow_run(child.run.id)))

    @staticmethod
    def _settle(child: Child) -> None:
        """Waits until a crash is some seconds old."""
        state = child.run.state
        if state is not None and state.is_crashed() and state.timestamp is not None:
            time.sleep(max(0.0, SETTLE - (datetime.now(UTC) - state.timestamp).total_seconds()))

    def look(self, children: Iterable[Child]) -> None:
        """Brings the children's states up to date: one question for all."""
        by_id = {child.run.id: child for child in children}
        ids = list(by_id)
        with get_client(sync_client=True) as client:
            for start in range(0, len(ids), 100):
                chosen = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + 100]))
                for run in patiently(partial(client.read_flow_runs, flow_run_filter=chosen)):
                    by_id[run.id].run = run

    def _key(self, piece: Piece, again: int) -> str:
        key = f"{self._parent}:{piece.node.ref}:{piece.part}/{piece.parts}"
        if piece.force:
            key += f":forced-{self._store.bytes_of(piece.node.spec.refs())}"
        return f"{key}:{again}" if again else key

    @staticmethod
    def _find(client: SyncPrefectClient, key: str) -> FlowRun | None:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key])), limit=1)
        return found[0] if found else None

    def _make(self, piece: Piece, key: str) -> FlowRun:
        node = piece.node
        step = steps.get(node.spec.step)
        gpus = self._gpus(step.name)
        parameters = {
            "run": self._run,
            "name": node.name,
            "spec": node.spec.model_dump(mode="json"),
            "store": self._store.root,
            "device": self._device,
            "force": piece.force,
            "part": piece.part,
            "parts": piece.parts,
            "report": self._report,
        }
        try:
            made: FlowRun = run_deployment(  # type: ignore[assignment]
                self._deployment(step.name),
                parameters=parameters,
                flow_run_name=run_name(node.name, self._run, node.ref.key, piece.part, piece.parts),
                tags=tags(step, gpus),
                idempotency_key=key,
                work_queue_name=self._queue(step.name),
                job_variables=dict(self._job_variables(step.name)),
                timeout=0,
            )
        except PrefectHTTPStatusError as refused:
            if refused.response.status_code in (409, 422):
                raise UserError(
                    f"The Prefect server refuses a run of {self._deployment(step.name)} for {node.name}: {refused.response.text[:500]} "
                    "If the deployments are older than this code, `make deploy` brings them up to date."
                ) from None
            raise
        log.info("%s: started as a run of its own", made.name)
        return made


def cancel_children(flow: Any, flow_run: FlowRun, state: Any) -> None:
    """Hook of a pipeline that was cancelled: its unfinished children are cancelled too. A retried pipeline starts them again."""
    asked: set[UUID] = set()
    with get_client(sync_client=True) as client:
        # again until a whole reading brings nothing new: what ends between two pages moves the next one
        while new := [child for child in _unfinished(client, flow_run.id) if child.id not in asked]:
            for child in new:
                log.info("cancelling %s", child.name)
                patiently(partial(client.set_flow_run_state, child.id, Cancelling(message="its pipeline was cancelled")))
                asked.add(child.id)


def _unfinished(client: SyncPrefectClient, parent: UUID) -> list[FlowRun]:
    """The children that have not ended and are not being cancelled, however many: the API gives a page at a time."""
    mine = FlowRunFilter(
        parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(UNFINISHED))),
    )
    found: list[FlowRun] = []
    while page := patiently(partial(client.read_flow_runs, flow_run_filter=mine, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(found))):
        found += page
    return found


def patiently(ask: Callable[[], T], *, away: float = AWAY, every: float = 2.0) -> T:
    """The answer of the API, asked again while it is away or overloaded, for `away` seconds."""
    until = time.monotonic() + away
    warned = False
    while True:
        try:
            return ask()
        except PrefectHTTPStatusError as fault:
            if fault.response.status_code < 500 and fault.response.status_code != 429:
                raise
            last: Exception = fault
        except httpx.TransportError as fault:
            last = fault
        if time.monotonic() > until:
            raise last
        if not warned:
            log.warning("the Prefect API does not answer (%s); asking again", type(last).__name__)
            warned = True
        time.sleep(every)
