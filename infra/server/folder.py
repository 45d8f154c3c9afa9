"""One server per folder: the lock that says so, and the end of what a killed one has left running there.

The lock is the kernel's and goes with its holder, however that dies. Whoever holds it is alone, so what still runs on the folder then is an orphan of a
server that was killed. Orphans are known by what they were started with and not by a number in a file, which may be another process' by now: Prefect's by
MARK in their environment, PostgreSQL by the data folder on its command line (it writes over its environment).
"""

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil

__all__ = ["MARK", "ServerError", "end_leftovers", "lock"]

MARK = "STAGEDIFF_SERVER_FOLDER"
"""Environment of everything that serves a folder, but of PostgreSQL: the folder."""
SIGNALS = {"prefect": signal.SIGTERM, "postgres": signal.SIGINT}
"""Who ends first, and by what: the database closes its files in order at SIGINT (fast shutdown)."""


class ServerError(RuntimeError):
    """Something does not start; the text says what to do."""


def lock(folder: Path) -> TextIO:
    """Takes the folder for this process, until the file that is returned is closed. Raises ServerError where another has it."""
    file = (folder / "lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        other = file.read().strip() or "unknown"
        file.close()
        raise ServerError(
            f"A server runs in {folder} already (process {other}). Use that one, stop it first, or give another folder and --port."
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def end_leftovers(folder: Path, data: Path, grace: float = 60.0) -> list[str]:
    """Ends what still runs on a folder whose lock is held here, and takes PostgreSQL's pid files away that another process' number has made void.

    Parameters
    ----------
    folder, data
        The server's folder, and PostgreSQL's data folder in it.
    grace
        Seconds that each kind of them has before it is killed.

    Returns
    -------
    What was ended, as "postgres 4711".
    """
    found: dict[str, list[psutil.Process]] = {name: [] for name in SIGNALS}
    for process in psutil.process_iter():
        if kind := _kind(process, folder, data):
            found[kind].append(process)
    for kind, number in SIGNALS.items():
        for process in found[kind]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, alive = psutil.wait_procs(found[kind], timeout=grace)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=grace)
    for file in (data / "postmaster.pid", *(folder / "socket").glob(".s.PGSQL.*.lock")):
        if _is_void(file):
            file.unlink(missing_ok=True)
    return [f"{kind} {process.pid}" for kind, processes in found.items() for process in processes]


def _kind(process: psutil.Process, folder: Path, data: Path) -> str | None:
    """Whose orphan a process is, of the folder's server; None for all others. A process of PostgreSQL that is not its first ends with that one."""
    with suppress(psutil.Error, OSError):
        line = process.cmdline()
        if Path(line[0] if line else "").name == "postgres" and "-D" in line[:-1]:
            return "postgres" if _same(line[line.index("-D") + 1], data) else None
        if _same(process.environ().get(MARK, ""), folder):
            return "prefect"
    return None


def _same(text: str, folder: Path) -> bool:
    return bool(text) and Path(text).resolve() == folder.resolve()


def _is_void(file: Path) -> bool:
    """Whether the process that a pid file names began after the file says that the database did: its number was used again.

    PostgreSQL itself takes such a process for a running server and does not start; a number that nobody has it sees through.
    """
    try:
        lines = file.read_text().splitlines()
        number, began = int(lines[0]), float(lines[2])
        return psutil.Process(number).create_time() > began + 5.0
    except (OSError, ValueError, IndexError, psutil.Error):
        return False
