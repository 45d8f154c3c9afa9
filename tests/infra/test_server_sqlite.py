"""`infra.server.sqlite`: transactions wait for each other, and a statement that failed leaves nothing behind on which the event loop could wait."""

import asyncio
import gc
import sqlite3
import time
from contextlib import closing

import aiosqlite
import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from infra.server import sqlite as server

WAIT = 5.0
"""Seconds for which a request waits for the write lock."""


async def collecting(file) -> float:
    """Seconds that a garbage collection stops the event loop: a connection once failed at the lock, and waits for it now."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}", connect_args={"timeout": 0.05})
    with closing(sqlite3.connect(file, isolation_level=None)) as holder:
        holder.execute("PRAGMA journal_mode=WAL")
        holder.execute("BEGIN IMMEDIATE")
        async with engine.connect() as connection:
            with pytest.raises(OperationalError, match="locked"):
                await connection.exec_driver_sql("BEGIN IMMEDIATE")
            await connection.exec_driver_sql(f"PRAGMA busy_timeout={WAIT * 1000:.0f}")
            waiting = asyncio.create_task(connection.exec_driver_sql("BEGIN IMMEDIATE"))
            await asyncio.sleep(0.2)
            before = time.monotonic()
            gc.collect()
            taken = time.monotonic() - before
            holder.execute("ROLLBACK")
            await asyncio.wait([waiting])  # with the lock, or without it where the collection took all its time
            waiting.exception()
    await engine.dispose()
    return taken


async def adding(file) -> int:
    """Two transactions that read a number and write it back raised, at the same time, as Prefect begins them; returns the number."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}", connect_args={"timeout": 5, "isolation_level": None})
    with closing(sqlite3.connect(file, isolation_level=None)) as plain:
        plain.executescript("PRAGMA journal_mode=WAL; CREATE TABLE t (n); INSERT INTO t VALUES (0)")

        async def add() -> None:
            async with engine.connect() as connection:
                await connection.exec_driver_sql("BEGIN DEFERRED")
                (n,) = (await connection.exec_driver_sql("SELECT n FROM t")).one()
                await asyncio.sleep(0.2)
                await connection.exec_driver_sql(f"UPDATE t SET n = {n + 1}")
                await connection.exec_driver_sql("COMMIT")

        await asyncio.gather(add(), add())
        await engine.dispose()
        return plain.execute("SELECT n FROM t").fetchone()[0]


@pytest.fixture
def no_collection_in_between():
    gc.collect()
    gc.freeze()  # what other tests left alive would make the measured collection take seconds
    gc.disable()
    yield
    gc.unfreeze()
    gc.enable()


def test_a_collection_does_not_wait_for_the_lock_that_another_request_waits_for(tmp_path, monkeypatch, no_collection_in_between):
    monkeypatch.setattr(aiosqlite.Cursor, "_execute", aiosqlite.Cursor._execute)  # put back at the end
    without = asyncio.run(collecting(tmp_path / "without.db"))
    server.mend()
    mended = asyncio.run(collecting(tmp_path / "mended.db"))
    assert mended < WAIT / 2 < without, "if the driver has mended it itself, infra/server/sqlite.py can go"


def test_transactions_that_read_and_then_write_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(aiosqlite.Cursor, "_execute", aiosqlite.Cursor._execute)
    with pytest.raises(OperationalError, match="locked"):
        asyncio.run(adding(tmp_path / "without.db"))
    server.mend()
    assert asyncio.run(adding(tmp_path / "mended.db")) == 2


def test_options_that_would_start_other_processes_are_refused():
    for option in ("--background", "-b", "--workers=2"):
        with pytest.raises(SystemExit, match=option):
            server.main([option])
