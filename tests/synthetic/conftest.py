"""A world of two dozen features in 16 dimensions: enough of every role, and quick."""

import pytest
import torch

from stagediff.store import Store
from stagediff.synthetic.spec import Rung, TrackWorld
from stagediff.synthetic.world import Planted

RUNG = Rung(noise=0.05, superposition=2.0, rotation=3.0, jitter=1.0, width=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_world() -> TrackWorld:
    return TrackWorld(seed=3, rung=RUNG, d=16, checkpoints=12, growth=4.0, context=16, segment=8)


@pytest.fixture(scope="session")
def planted(tiny_world) -> Planted:
    return Planted(tiny_world)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))
