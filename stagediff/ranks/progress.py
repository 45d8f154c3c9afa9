"""A rank's progress reaches who launched it: marked lines on its standard output, which the launching side takes out and shows in its own way."""

import json
import time
from contextlib import ExitStack
from typing import Any

from stagediff.progress import Progress, Task

__all__ = ["Teller", "Told"]

MARK = "@progress "
EVERY = 2.0
"""Seconds between two words of one task; its end is always told."""


class Teller:
    """A rank's listener for `Progress`: prints how its tasks stand."""

    def __init__(self, rank: int):
        self._rank = rank
        self._last: dict[str, float] = {}

    def __call__(self, task: Task) -> None:
        now = time.monotonic()
        if now - self._last.get(task.name, 0.0) < EVERY and task.done < task.total:
            return
        self._last[task.name] = now
        name = f"{task.name} (rank {self._rank})" if self._rank else task.name
        word = {"name": name, "total": task.total, "unit": task.unit, "done": task.done, "note": task.note}
        print(MARK + json.dumps(word), flush=True)


class Told:
    """The launching side: hands marked lines to its own `Progress`. Use it in a `with` statement."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, Task] = {}
        self._open = ExitStack()

    def __enter__(self) -> "Told":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def take(self, line: str) -> bool:
        """Whether the line was a word of progress."""
        if not line.startswith(MARK):
            return False
        try:
            word: dict[str, Any] = json.loads(line.removeprefix(MARK))
        except ValueError:  # two ranks wrote at once: the next word sets it right
            return True
        name = word["name"]
        if name not in self._tasks:
            self._tasks[name] = self._open.enter_context(self._progress.task(name, word["total"], word["unit"]))
        task = self._tasks[name]
        task.advance(word["done"] - task.done, word["note"])
        return True
