"""Starts crashed runs again, a few times each: what the deployment `janitor` does every two minutes.

A run that crashed (its process, worker or machine went away) had no fault of its own, and everything here may be done twice, so it is scheduled again in place.
Not before a minute has passed: the late report of a crash would end a run that was started at once, and a living pipeline sees to its children itself.
Not for ever: a run that kills its machine each time is left for people after `runs` crashes. Failed runs are theirs from the beginning.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.states import AwaitingRetry
from pydantic import Field

from flows.crashes import CRASHES, past_of
from flows.names import RETRY_TAG

__all__ = ["janitor"]

MOST = 200
"""How many runs are looked at each time."""


@flow(name="janitor", persist_result=False)
def janitor(
    grace: Annotated[float, Field(ge=0)] = 60.0, runs: Annotated[int, Field(ge=1)] = CRASHES, hours: Annotated[float, Field(gt=0)] = 24.0
) -> list[str]:
    """Schedules crashed runs again; returns their names.

    Args:
        grace: seconds since the crash
        runs: how often a run may have crashed; at that number it is left alone, as is one that was being cancelled
        hours: crashes longer ago than this are left alone
    """
    now = datetime.now(UTC)
    crashed = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
        tags=FlowRunFilterTags(all_=["stagediff", RETRY_TAG]),
        end_time=FlowRunFilterEndTime(before_=now - timedelta(seconds=grace), after_=now - timedelta(hours=hours)),
    )
    log = get_run_logger()
    again: list[str] = []
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=crashed, limit=MOST):
            if run.deployment_id is None:
                continue
            past = past_of(client, run)
            if not past.may_run_again(runs):
                why = "was cancelled" if past.was_cancelled else f"crashed {past.crashes} times"
                log.warning("%s %s and is left alone; press Retry on it once the cause is mended", run.name, why)
                continue
            client.set_flow_run_state(run.id, AwaitingRetry(message="janitor: started again after a crash"), force=False)
            log.info("%s crashed and is started again (%d of %d)", run.name, past.crashes, runs - 1)
            again.append(run.name)
    return again
