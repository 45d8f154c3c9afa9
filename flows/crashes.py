"""What a crashed run's past says about starting it again: how often it has crashed, and whether it was being cancelled.

Prefect's own count of starts rises when a run begins to run. One that crashes before that (a job that is refused, a Python that is not there) has
never started, however often it is scheduled; so crashes are counted in the history of its states. And a cancelled job's engine, which only sees a
signal, reports a crash first; its worker reports the cancelling once the job is gone, or never, where the worker is gone too.
"""

from typing import NamedTuple

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType

__all__ = ["CRASHES", "Past", "past_of"]

CRASHES = 3
"""How often a run may crash before nothing but a person starts it again."""


class Past(NamedTuple):
    crashes: int
    """How often it went over from another state to Crashed: both the engine and the worker may report one."""
    was_cancelled: bool
    """Somebody has asked for its cancelling since it was last scheduled."""

    def may_run_again(self, crashes: int = CRASHES) -> bool:
        return self.crashes < crashes and not self.was_cancelled


def past_of(client: SyncPrefectClient, run: FlowRun) -> Past:
    """The past of a run, asked of the API."""
    return _past([state.type for state in sorted(client.read_flow_run_states(run.id), key=_time)])


def _past(types: list[StateType]) -> Past:
    crashes = sum(now is StateType.CRASHED and before is not StateType.CRASHED for before, now in zip([None, *types], types, strict=False))
    since = len(types) - types[::-1].index(StateType.SCHEDULED) if StateType.SCHEDULED in types else 0
    return Past(crashes, StateType.CANCELLING in types[since:])


def _time(state: State) -> float:
    return state.timestamp.timestamp() if state.timestamp else 0.0
