"""Progress of long work: rich bars in a terminal, plain lines through `logging` elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

__all__ = ["Progress", "Task"]

log = logging.getLogger("stagediff")


class Task:
    """One counted piece of work. `advance(n)` moves it; `note` shows a few words beside it (tokens/s, loss)."""

    def __init__(self, owner: "Progress", name: str, total: float, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.note = ""
        self._owner, self._start, self._logged = owner, time.monotonic(), time.monotonic()
        self._bars = _screen.bars if owner.interactive else None
        self._bar = self._bars.add_task(name, total=total, rate="", note="") if self._bars else None

    def advance(self, n: float = 1, note: str | None = None) -> None:
        self.done += n
        if note is not None:
            self.note = note
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = f"{self.done / seconds:,.0f} {self.unit}/s"
        if self._owner.listener is not None:
            self._owner.listener(self)
        if self._bars is not None:
            self._bars.update(self._bar, completed=self.done, rate=rate, note=self.note)
        elif time.monotonic() - self._logged > self._owner.log_every:
            self._logged = time.monotonic()
            log.info(
                "%s: %.0f %% of %s %s, %s %s",
                self.name,
                100 * self.done / max(self.total, 1e-9),
                f"{self.total:,.0f}",
                self.unit,
                rate,
                self.note,
            )

    @property
    def rate(self) -> float:
        """Units per second so far."""
        return self.done / max(time.monotonic() - self._start, 1e-9)


class Progress:
    """Shows what runs. `interactive=None` means: bars when standard error is a terminal.

    `listener` is told of every advance besides (it must be quick): how progress reaches a user interface that this library does not know.
    """

    def __init__(self, interactive: bool | None = None, log_every: float = 10.0, listener: Callable[[Task], None] | None = None):
        self.interactive = sys.stderr.isatty() if interactive is None else interactive
        self.log_every = log_every
        self.listener = listener

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Around one step: opens the bars, logs start, end and duration."""
        start = time.monotonic()
        log.info("%s: started", name)
        with self.shown():
            yield
        log.info("%s: done in %.1f s", name, time.monotonic() - start)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Opens the bars, in a terminal. Steps side by side have theirs below each other."""
        with _screen.used() if self.interactive else nullcontext():
            yield

    @contextmanager
    def task(self, name: str, total: float, unit: str = "items", done: float = 0) -> Iterator[Task]:
        """A counted piece of work within a step; `done` of it was finished by an earlier run (it does not count for the rate)."""
        task = Task(self, name, total - done, unit)
        try:
            yield task
        finally:
            if task._bars is not None:
                task._bars.remove_task(task._bar)


class _Screen:
    """The terminal, of which there is one, with the bars of all that run now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self.bars: Any = None
        """rich.progress.Progress while a step runs in a terminal."""

    @contextmanager
    def used(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self.bars = self._opened()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self.bars.stop()
                    self.bars = None

    @staticmethod
    def _opened() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bars = Bars(*columns, console=Console(stderr=True), transient=True)
        bars.start()
        return bars


_screen = _Screen()
