"""What a run's states say of its crashes: how many there were, and whether the last one was said of an earlier start."""

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelling, Crashed, Pending, Running, Scheduled

from flows.crashes import _as_it_was, _past


def history(text: str) -> list[State]:
    """Scheduled, pending, running, cancelling; engine's, worker's, janitor's, automation's crash; other crash."""
    made = {
        "S": Scheduled, "P": Pending, "R": Running, "C": Cancelling,
        "e": lambda: Crashed(message="Execution was aborted by a termination signal."),
        "w": lambda: Crashed(message="Process exited with status code: 143."),
        "j": lambda: Crashed(message="janitor: no heartbeat for 300 seconds: its machine is presumed gone"),
        "a": lambda: Crashed(message="No heartbeat for two minutes: its machine is presumed gone."),
        "o": lambda: Crashed(message="another cluster's words"),
    }  # fmt: skip
    return [made[letter]() for letter in text]


@pytest.mark.parametrize(
    ("states", "crashes", "overwritten"),
    [
        ("SPR", 0, None),
        ("SPRw", 1, None),
        ("SPRe", 1, None),
        ("SPRew", 1, None),  # both said of one start
        ("SPReSPRw", 1, "R"),
        ("SPRaSPRw", 1, "R"),
        ("SPRjSPw", 1, "P"),
        ("SPReSw", 1, "S"),
        ("SPReSPRwR", 1, None),  # taken back
        ("SPReSPRwRw", 2, None),  # and then it did crash
        ("SPRwSPRw", 2, None),
        ("SPRoSPRo", 2, None),
        ("SPReSPRo", 1, "R"),
        ("SPReSPReSPRw", 2, "R"),
        ("SPReSPReSPRwRw", 2, "R"),
        ("SPReSPReSPRwRwRw", 3, None),
        ("SPRewSPRw", 2, None),
    ],
)
def test_a_workers_word_that_an_earlier_start_has_outstanding_is_taken_for_that_starts(states, crashes, overwritten):
    made = history(states)
    past = _past(made)
    assert past.crashes == crashes
    assert past.overwritten is (made[-2] if overwritten else None)
    if overwritten:
        again = _as_it_was(past.overwritten)
        assert again.type == made[-2].type
        assert "late report" in again.message


def test_a_run_that_was_being_cancelled_is_so_until_it_is_scheduled_again():
    assert _past(history("SPRCe")).was_cancelled
    assert not _past(history("SPRCeS")).was_cancelled
