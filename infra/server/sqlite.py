"""Prefect server on SQLite, for one person on this machine: `prefect server start` with what stalls it under load mended.

    python -m infra.server.sqlite [--host 127.0.0.1] [--port 4200]

Two things, found with Prefect 3.8.8, SQLAlchemy 2.0.58 and aiosqlite 0.22.1; a server on PostgreSQL has neither.

A transaction that reads and then writes fails at once ("database is locked") where another one has written in between: Prefect begins most of them
DEFERRED. The server answers 503, clients ask again some times, and a worker that has given up calls its run crashed. Here they begin IMMEDIATE: they wait
for each other.

A statement that fails leaves its cursor open, in a cycle with the error's traceback: `AsyncAdapt_aiosqlite_cursor.execute` closes it only where it
succeeds. Python's garbage collector meets it later, on the server's event loop, and resets its statement (sqlite3_reset). That waits for the connection,
which another request may be using by then to wait for the write lock; and who has the lock can't commit, for the event loop stands. So nothing at all
is answered until SQLite gives up, after the 60 seconds that Prefect sets (PRAGMA busy_timeout). Here a cursor is closed where its statement fails, by
the thread that runs it.

Unless the environment says otherwise, slots' leases are kept in files, so that none is lost when the server is started anew.
"""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import aiosqlite

__all__ = ["main", "mend"]

LEASES = "prefect.server.concurrency.lease_storage.filesystem"


def mend() -> None:
    """From now on aiosqlite begins no transaction DEFERRED, and closes a cursor whose statement fails, in the connection's own thread."""
    aiosqlite.Cursor._execute = _execute  # type: ignore


async def _execute(self: Any, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """In place of `aiosqlite.Cursor._execute`: runs the function on the connection's thread."""
    if args[:1] == ("BEGIN DEFERRED",):
        args = ("BEGIN IMMEDIATE", *args[1:])

    def in_its_thread() -> Any:
        try:
            return function(*args, **options)
        except BaseException:
            self._cursor.close()
            raise

    return await self._conn._execute(in_its_thread)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the server in this process until it is told to stop, with the options of `prefect server start`."""
    given = list(sys.argv[1:] if argv is None else argv)
    if refused := [word for word in given if word in ("--background", "-b") or word.startswith("--workers")]:
        sys.exit(
            f"{refused[0]} would start other processes, which lack what this one mends. Leave it out, or: nohup python -m infra.server.sqlite &"
        )
    os.environ.setdefault("PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", LEASES)  # before Prefect is imported: it reads them once
    mend()
    sys.argv = ["prefect", "server", "start", *given]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
