"""One command and everything that it starts: its lines as they come, and an end that leaves nothing behind.

torchrun gives every rank a session of its own, so a process group does not hold them together. The tree is ended from its root (torchrun
passes SIGTERM on), and who does not follow is killed one by one. Should this process be killed outright, the kernel tells the root
(PR_SET_PDEATHSIG, `die_with_parent`), and every rank hears of the root's death the same way; other systems than Linux lack that.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["PARENT", "Ended", "die_with_parent", "run_tree"]

PARENT = "STAGEDIFF_PARENT"
"""Environment variable: the process whose death a child shall share."""
TAIL = 20
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """A command's end."""

    code: int
    """As subprocess gives it: negative for a signal."""
    tail: list[str]
    """Its last lines."""

    @property
    def how(self) -> str:
        return f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


def run_tree(command: Sequence[str], say: Callable[[str], Any], *, env: Mapping[str, str] | None = None, grace: float = 20.0) -> Ended:
    """Runs a command to its end and hands each of its lines to `say`.

    To be called in the main thread: there an exception raised by a signal handler (Prefect's cancel, SIGTERM) arrives, and ends the whole
    tree: SIGTERM to the root, and SIGKILL to what is left after `grace` seconds.
    """
    full = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), PARENT: str(os.getpid())}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=full, start_new_session=True
    )
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())
            tail.append(line.rstrip())
        return Ended(process.wait(), list(tail))
    except BaseException:
        _end(process, grace)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _end(process: "subprocess.Popen[str]", grace: float) -> None:
    import psutil

    tree = []
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(grace)
    except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
        pass
    for member in tree:
        try:
            member.kill()  # compares the start time first: a reused id is not taken for it
        except psutil.NoSuchProcess:
            continue
    process.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=grace)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """From now on this process gets that signal when the one that started it dies; at once where it is dead already."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), number)
