"""Shared fixtures."""

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.plan import Plan, execute
from stagediff.store import Store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: a file's tests go to one process, and so do all files that share the server of `deployed`."""
    for item in items:
        shared = "deployed" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("deployed" if shared else str(item.path)))


def pytest_sessionfinish() -> None:
    logging.raiseExceptions = False  # Prefect's temporary server ends after pytest has closed what it would log to


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """What a command that a test calls in this process does with signals ends with the test: later ones, and processes forked by them, would have it."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> tuple[Plan, Store]:
    """A tiny stage-wise run that is complete. Read only: tests that change it work on a copy."""
    store = Store(tmp_path_factory.mktemp("run") / "store")
    plan = make_plan(parse_config(tiny_config(store.root)), store)
    execute(plan, store, device="cpu")
    return plan, store
