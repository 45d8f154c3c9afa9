"""What a crashed run's past says about starting it again: how often it has crashed, whether it was being cancelled, and whether this start crashed at all.

Prefect's own count of starts rises when a run begins to run. One that crashes before that (a job that is refused, a Python that is not there) has
never started, however often it is scheduled; so crashes are counted in the history of its states. And a cancelled job's engine, which only sees a
signal, reports a crash first; its worker reports the cancelling once the job is gone, or never, where the worker is gone too.

One crash may be reported twice: by the engine that gets a signal, or by whoever misses the heartbeat, and by the worker, once it sees that its process or
job is over. On Slurm that may be minutes later, on an overloaded server seconds. A run that was started again in between is then marked as crashed while
it runs, and no report says which start it means. So reports are counted: where an earlier start's crash was not the worker's word, the worker's next
word is taken for that one's, however late it comes, and the state that it took the place of is set again. Should this be wrong (no second report
ever came, and it is this start that has crashed), nothing beats the run's heart any more, and the janitor finds it.
"""

import logging
from typing import NamedTuple

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry

__all__ = ["CRASHES", "JANITOR", "Past", "past_of", "take_back"]

log = logging.getLogger("stagediff")

CRASHES = 3
"""How often a run may crash before nothing but a person starts it again."""
JANITOR = "janitor: "
"""How the messages of the janitor's states begin."""
NOT_THE_WORKERS = ("Execution was ", "No heartbeat for ", JANITOR)
"""How the messages of crashes begin that the worker may report once more: the engine's, those of infra/automations, the janitor's."""


class Past(NamedTuple):
    crashes: int
    """How often it went over from another state to Crashed; late reports are not counted."""
    was_cancelled: bool
    """Somebody has asked for its cancelling since it was last scheduled."""
    overwritten: State | None = None
    """Where its crash is the late report of an earlier start's: the state that it took the place of. That start is on its way all the same."""

    def may_run_again(self, crashes: int = CRASHES) -> bool:
        return self.crashes < crashes and not self.was_cancelled


def past_of(client: SyncPrefectClient, run: FlowRun) -> Past:
    """The past of a run, asked of the API."""
    return _past(sorted(client.read_flow_run_states(run.id), key=_time))


def take_back(client: SyncPrefectClient, run: FlowRun, past: Past) -> bool:
    """Sets the state again that a late report has taken the place of, unless the run has moved on since it was read. False where there is no such report."""
    if past.overwritten is None:
        return False
    now = client.read_flow_run(run.id)
    if now.state is not None and run.state is not None and now.state.id == run.state.id:
        log.info("%s: the crash that was reported is an earlier start's; it goes on (%s)", run.name, past.overwritten.name)
        client.set_flow_run_state(run.id, _as_it_was(past.overwritten), force=True)
    return True


def _as_it_was(overwritten: State) -> State:
    message = "the late report of an earlier start's crash had taken this state's place"
    if overwritten.is_scheduled():
        return AwaitingRetry(message=message)
    return State(type=overwritten.type, name=overwritten.name, message=message)


def _past(states: list[State]) -> Past:
    """The past that a run's states tell, the oldest first."""
    crashes, was_cancelled = 0, False
    owed, owed_now = 0, False  # the worker's words on earlier starts that have not come; whether one is to come on this start
    before, overwritten = None, None
    for state in states:
        overwritten = None
        if state.is_scheduled():
            was_cancelled, owed, owed_now = False, owed + owed_now, False
        elif state.is_cancelling():
            was_cancelled = True
        elif state.is_crashed():
            is_news = before is None or not before.is_crashed()
            if (state.message or "").startswith(NOT_THE_WORKERS):
                owed_now = True
                crashes += is_news
            elif owed:
                owed -= 1
                overwritten = before if is_news else None
            else:
                owed_now = False
                crashes += is_news
        before = state
    return Past(crashes, was_cancelled, overwritten)


def _time(state: State) -> float:
    return state.timestamp.timestamp() if state.timestamp else 0.0
