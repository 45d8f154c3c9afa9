"""Shared fixtures of the track tests."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from stagediff.store import Store

if TYPE_CHECKING:
    from track import fake_tables


@pytest.fixture(scope="session")
def probe_chain() -> ModuleType:
    """`probe_chain.py`: ProbeChain, a small chain with given examples and reference vectors, and word_tokenizer."""
    return _beside("probe_chain")


@pytest.fixture(scope="session")
def encoded_chain() -> ModuleType:
    """`encoded_chain.py`: checkpoints with real activations, dictionaries and statistics on a ProbeChain's rows."""
    return _beside("encoded_chain")


@pytest.fixture(scope="session")
def bare_chain() -> ModuleType:
    """`bare_chain.py`: points of which only decoders and firings exist, and artifacts with given tables or figures."""
    return _beside("bare_chain")


@pytest.fixture(scope="session")
def reported_track(tmp_path_factory) -> "fake_tables.Reported":
    """A made-up run of 120 features at 7 checkpoints with its report's sections. Read only."""
    from track import fake_tables

    return fake_tables.report_of(fake_tables.write_track(Store(str(tmp_path_factory.mktemp("track") / "store")), 120, 7))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
