"""Asking a server that may be busy, slow or away: further tries with growing pauses, and a pause for everybody when it says that it is too much."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import TypeVar

__all__ = ["NotNowError", "Patience", "retry_after"]

LONGEST = 60.0
"""Seconds between two tries, unless the server names a longer time."""
MOST = 600.0
"""Seconds that a server's own "retry-after" is followed at most."""
T = TypeVar("T")


@dataclass
class NotNowError(Exception):
    """A try that failed in a way that another one may not."""

    why: str
    after: float | None = None
    """Seconds that the server asks to wait."""
    for_all: bool = False
    """Whether every question should wait: the server is asked too often."""
    is_away: bool = False
    """Whether there was nobody to answer at all."""

    def __str__(self) -> str:
        return self.why


class Patience:
    """Tries again, `retries` times at most, `wait` seconds before the second try and twice as long before each further one (a random part of it off).

    One for all threads that ask the same server. `sleep` and `clock` can be replaced.
    """

    def __init__(self, retries: int, wait: float, sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic):
        self.retries, self.wait = retries, wait
        self._sleep, self._clock = sleep, clock
        self._lock, self._not_before = Lock(), 0.0

    def ask(self, once: Callable[[], T]) -> T:
        """What `once` returns. Raises the last NotNowError once there are no tries left; anything else that `once` raises at once."""
        for attempt in range(self.retries + 1):
            self._hold_back()
            try:
                return once()
            except NotNowError as error:
                if attempt == self.retries:
                    raise
                self._pause(error, attempt)
        raise AssertionError("unreachable")

    def _pause(self, error: NotNowError, attempt: int) -> None:
        own = min(LONGEST, self.wait * 2**attempt) * random.uniform(0.5, 1)
        pause = own if error.after is None else min(max(error.after, 0.0), MOST)
        if error.for_all:
            with self._lock:
                self._not_before = max(self._not_before, self._clock() + pause)
        else:
            self._sleep(pause)

    def _hold_back(self) -> None:
        while (left := self._left()) > 0:
            self._sleep(left)

    def _left(self) -> float:
        with self._lock:
            return self._not_before - self._clock()


def retry_after(value: str | None) -> float | None:
    """Seconds from an HTTP header "retry-after", which holds seconds or a date; None where there is none that makes sense."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
