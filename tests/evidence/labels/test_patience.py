"""Trying again: how often, how long after, and together."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from stagediff.evidence.labels.patience import NotNowError, Patience, retry_after


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def patience(clock: Clock, retries: int = 3, wait: float = 2.0) -> Patience:
    return Patience(retries, wait, clock.sleep, lambda: clock.now)


def failing(*errors: Exception):
    left = list(errors)

    def once() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return once


def test_pauses_double_and_a_random_part_is_taken_off(clock):
    assert patience(clock).ask(failing(*[NotNowError("busy")] * 3)) == "done"
    for slept, most in zip(clock.slept, (2, 4, 8), strict=True):
        assert most / 2 <= slept <= most


def test_no_pause_is_longer_than_a_minute(clock):
    patience(clock, retries=12).ask(failing(*[NotNowError("busy")] * 12))
    assert max(clock.slept) <= 60


def test_the_last_failure_is_raised_when_no_try_is_left(clock):
    with pytest.raises(NotNowError, match="fourth"):
        patience(clock).ask(failing(*[NotNowError(w) for w in ("first", "second", "third", "fourth")]))
    assert len(clock.slept) == 3


def test_what_another_try_cannot_help_is_raised_at_once(clock):
    with pytest.raises(KeyError):
        patience(clock).ask(failing(KeyError("x")))
    assert clock.slept == []


def test_the_server_says_how_long(clock):
    patience(clock).ask(failing(NotNowError("busy", after=17.0)))
    assert clock.slept == [17.0]


def test_a_server_that_is_asked_too_often_is_left_alone_by_all(clock):
    both = patience(clock)
    both.ask(failing(NotNowError("too often", after=30.0, for_all=True)))
    began, clock.now = clock.now, clock.now - 10  # another thread comes ten seconds before that pause ends
    both.ask(lambda: "done")
    assert clock.now == pytest.approx(began)


def test_a_header_holds_seconds_or_a_date():
    assert retry_after("7") == 7.0
    assert retry_after("-3") == 0.0
    assert retry_after(None) is None
    assert retry_after("soon") is None
    assert 50 < retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
