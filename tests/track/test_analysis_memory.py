"""Memory of the analysis: whatever the number of tokens, and so little per feature and checkpoint that a run with 65,536 features at 30 checkpoints fits."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from stagediff.track.likeness import BUDGET_BYTES, ENTRY_BYTES

MIB = 1 << 20
LARGE = 65_536 * 30
"""Features x checkpoints of the paper's run."""


@pytest.fixture(scope="module")
def made_up() -> ModuleType:
    """benchmarks/track_memory.py: chains of any size that were written, not trained."""
    spec = importlib.util.spec_from_file_location("track_memory", Path(__file__).parents[2] / "benchmarks" / "track_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peaks(made_up: ModuleType, folder: Path, names: tuple[str, ...], features: int, checkpoints: int, **options) -> dict[str, float]:
    """Step -> MiB of a chain of this size."""
    folder.mkdir()
    chain = made_up.MadeUpChain(folder, features, checkpoints, **options)
    specs = chain.specs()
    return {name: made_up.measured(chain.store, specs[name], folder)["peak_mib"] for name in names}


@pytest.mark.slow
def test_memory_of_kinds_does_not_grow_with_the_tokens(made_up, tmp_path):
    """64 MiB of reference activations more."""
    few, many = (peaks(made_up, tmp_path / str(rows), ("kinds",), 256, 3, width=128, rows=rows)["kinds"] for rows in (256, 16_640))
    assert many - few < 25, (few, many)


@pytest.mark.slow
def test_tables_of_a_large_run_fit_into_memory(made_up, tmp_path):
    """Per cell (feature x checkpoint), from two sizes. Of what a cell takes in `kinds`, its examples that wait for their vectors are bounded by a budget."""
    names = ("kinds", "drift", "phases")
    small, large = (peaks(made_up, tmp_path / str(n), names, n, 4, width=8, rows=64) for n in (2048, 16_384))
    waiting = {"kinds": ENTRY_BYTES * made_up.TOP / MIB}
    for name in names:
        per_cell = (large[name] - small[name]) / (4 * (16_384 - 2048)) - waiting.get(name, 0.0)
        budget = BUDGET_BYTES / MIB if name in waiting else 0.0
        assert small[name] + budget + per_cell * LARGE < 4 * 1024, (name, per_cell, small, large)
