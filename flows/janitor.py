"""Finds runs that were lost and starts crashed ones again, a few times each: what the deployment `janitor` does every two minutes.

A run that crashed (its process, worker or machine went away) had no fault of its own, and everything here may be done twice, so it is scheduled again in place.
Not before a minute has passed, for a living pipeline sees to its children itself. A crash that is the late report of an earlier start's is taken back.
Not for ever: a run that kills its machine each time is left for people after `runs` crashes. Failed runs are theirs from the beginning.

Two kinds of lost runs report no crash, and are marked as crashed here. One whose worker died between taking it and starting its process stays Pending:
workers look for scheduled runs only. And one whose machine went away while the server was down stays Running: the automation that waits for the next
heartbeat (infra/automations) forgets what it waits for when its server ends.
"""

import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import AwaitingRetry, Crashed
from pydantic import Field

from flows.crashes import CRASHES, JANITOR, past_of, take_back
from flows.names import RETRY_TAG
from flows.pools import type_of

__all__ = ["janitor"]

MOST = 200
"""How many runs are looked at each time."""
BEATS = 75.0
"""Seconds in which a living run's heart beats at least twice, a slow machine's once."""


@flow(name="janitor", persist_result=False)
def janitor(
    grace: Annotated[float, Field(ge=0)] = 60.0,
    runs: Annotated[int, Field(ge=1)] = CRASHES,
    hours: Annotated[float, Field(gt=0)] = 24.0,
    pending: Annotated[float, Field(ge=0)] = 600.0,
    silence: Annotated[float, Field(ge=0)] = 300.0,
) -> list[str]:
    """Marks lost runs as crashed and schedules crashed runs again; returns the names of the latter.

    Args:
        grace: seconds since the crash
        runs: how often a run may have crashed; at that number it is left alone, as is one that was being cancelled
        hours: crashes longer ago than this are left alone
        pending: seconds after which a run that a process pool's worker took and never started is lost
        silence: seconds without a heartbeat after which a run whose heart did beat is lost
    """
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        for run, why in [*_never_started(client, now - timedelta(seconds=pending)), *_silent(client, silence)]:
            _set(client, run, Crashed(message=f"{JANITOR}{why}"))
        crashed = _runs(
            client,
            StateType.CRASHED,
            FlowRunFilterEndTime(before_=now - timedelta(seconds=grace), after_=now - timedelta(hours=hours)),
        )
        return [run.name for run in crashed if run.deployment_id is not None and _start_again(client, run, runs)]


def _start_again(client: SyncPrefectClient, run: FlowRun, runs: int) -> bool:
    log = get_run_logger()
    past = past_of(client, run)
    try:
        if take_back(client, run, past):
            return False
    except (ObjectNotFound, PrefectHTTPStatusError) as refused:
        log.warning("the late report of a crash of %s cannot be taken back: %s", run.name, refused)
        return False
    if not past.may_run_again(runs):
        why = "was cancelled" if past.was_cancelled else f"crashed {past.crashes} times"
        log.warning("%s %s and is left alone; press Retry on it once the cause is mended", run.name, why)
        return False
    if not _set(client, run, AwaitingRetry(message=f"{JANITOR}started again after a crash")):
        return False
    log.info("%s crashed and is started again (%d of %d)", run.name, past.crashes, runs - 1)
    return True


def _never_started(client: SyncPrefectClient, before: datetime) -> Iterator[tuple[FlowRun, str]]:
    """Runs of process pools that are Pending since `before`: there a process follows within seconds. On a cluster they may wait in its queue for days."""
    kinds = {pool.name: type_of(pool) for pool in client.read_work_pools(limit=MOST)}
    for run in _runs(client, StateType.PENDING):
        if _is_older(run, before) and kinds.get(run.work_pool_name or "") == "process":
            yield run, "its worker took it and never started its process"


def _silent(client: SyncPrefectClient, silence: float) -> list[tuple[FlowRun, str]]:
    """Running runs whose heart did beat, and has not for `silence` seconds: looked at twice, for after the server was away a living one is late too."""
    before = datetime.now(UTC) - timedelta(seconds=silence)
    suspects = [run for run in _runs(client, StateType.RUNNING) if _is_older(run, before) and _last_beat(client, run, before) is False]
    if suspects:
        time.sleep(min(BEATS, silence))
    return [(run, f"no heartbeat for {silence:.0f} seconds: its machine is presumed gone") for run in _still(client, suspects, before)]


def _still(client: SyncPrefectClient, suspects: Iterable[FlowRun], before: datetime) -> Iterator[FlowRun]:
    for suspect in suspects:
        try:
            run = client.read_flow_run(suspect.id)
        except ObjectNotFound:  # deleted meanwhile
            continue
        if run.state is not None and run.state.is_running() and _last_beat(client, run, before) is False:
            yield run


def _last_beat(client: SyncPrefectClient, run: FlowRun, before: datetime) -> bool | None:
    """Whether the run's heart has beaten since `before`; None when it never did, in any of its starts (its machine may beat none)."""
    beats = client.read_events(
        EventFilter(
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
            occurred=EventOccurredFilter(since=run.start_time or before),
        ),
        limit=1,  # the newest comes first
    ).events
    return beats[0].occurred >= before if beats else None


def _runs(client: SyncPrefectClient, state: StateType, ended: FlowRunFilterEndTime | None = None) -> list[FlowRun]:
    """This project's runs in a state that may be started again."""
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[state])),
        tags=FlowRunFilterTags(all_=["stagediff", RETRY_TAG]),
        end_time=ended,
    )
    return client.read_flow_runs(flow_run_filter=wanted, limit=MOST)


def _is_older(run: FlowRun, before: datetime) -> bool:
    return run.state is not None and run.state.timestamp is not None and run.state.timestamp < before


def _set(client: SyncPrefectClient, run: FlowRun, state: State) -> bool:
    """Whether the server took the state. A run that was deleted or has moved on meanwhile is no reason to leave the others."""
    try:
        return client.set_flow_run_state(run.id, state, force=False).status is SetStateStatus.ACCEPT
    except (ObjectNotFound, PrefectHTTPStatusError) as refused:
        get_run_logger().warning("%s cannot be set to %s: %s", run.name, state.name, refused)
        return False
