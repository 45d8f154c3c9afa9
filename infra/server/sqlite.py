"""Prefect server on SQLite, for one person on this machine: `prefect server start` without a stall of its database driver.

    python -m infra.server.sqlite [--host 127.0.0.1] [--port 4200]

The stall: a statement that fails ("database is locked" is common) leaves its cursor open, in a cycle with the error's traceback: SQLAlchemy 2.0.58's
`AsyncAdapt_aiosqlite_cursor.execute` closes it only where it succeeds. Python's garbage collector meets it later, on the server's event loop, and
resets its statement (sqlite3_reset). That waits for the connection, which another request may be using by then to wait for the write lock; and who
has the lock can't commit, for the event loop stands. So nothing at all is answered until SQLite gives up, after the 60 seconds that Prefect 3.8.8 sets
(PRAGMA busy_timeout). Here a cursor is closed where its statement fails, by the thread that runs it. A server on PostgreSQL has no such thing.

Unless the environment says otherwise, slots' leases are kept in files, so that none is lost when the server is started anew, and no run is marked as
late: steps that wait for a GPU are not, and on SQLite each of the service's transactions fails that meets another one's (it reads first and writes
later), some twenty a second where a hundred steps wait.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import aiosqlite

__all__ = ["close_failed_cursors", "main"]

ENVIRONMENT = {
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
}


def close_failed_cursors() -> None:
    """From now on aiosqlite closes a cursor whose statement fails, in the connection's own thread."""
    aiosqlite.Cursor._execute = _execute  # type: ignore[method-assign]


async def _execute(self: Any, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """In place of `aiosqlite.Cursor._execute`: runs the function on the connection's thread."""

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
    for name, value in ENVIRONMENT.items():  # before Prefect is imported: it reads them once
        os.environ.setdefault(name, value)
    close_failed_cursors()
    from prefect.cli import app

    sys.argv = ["prefect", "server", "start", *given]
    app()


if __name__ == "__main__":
    main()
