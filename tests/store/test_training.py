"""Training checkpoints: exact states, the newest kept, damage found."""

import logging

import pytest
import torch
from toystep import ToySpec

from stagediff.store import Store
from stagediff.store.names import TRAINING


def names(store: Store) -> list[str]:
    return sorted(store.objects.entries(f"{ToySpec().ref}/{TRAINING}"))


def as_bytes(tensor: torch.Tensor) -> bytes:
    """NaNs compare as bits."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_state_comes_back_bit_by_bit(root):
    base = torch.randn(6, 4)
    tensors = {
        "weights": base,
        "tied": base,
        "transposed": base.T,
        "half": torch.randn(3).bfloat16(),
        "step": torch.tensor(7),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "empty": torch.zeros(0, 3),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    with Store(root).write(ToySpec()) as writer:
        assert writer.training.latest() is None
        writer.training.save(10, tensors, {"position": 5, "list": [1, 2], "text": "ü"})
    with Store(root).write(ToySpec()) as writer:
        latest = writer.training.latest()
    assert latest is not None
    step, back, meta = latest
    assert (step, meta) == (10, {"position": 5, "list": [1, 2], "text": "ü"})
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert as_bytes(back[name]) == as_bytes(tensor)


def test_only_the_newest_is_kept_and_none_after_the_commit(root):
    store = Store(root)
    with store.write(ToySpec()) as writer:
        for step in (5, 10, 1_000_000_000):
            writer.training.save(step, {"a": torch.full((2,), float(step))}, {})
            assert len(names(store)) == 1
        assert writer.training.latest()[0] == 1_000_000_000
        writer.commit(figures={})
    assert names(store) == []


def test_a_loaded_state_outlives_its_file(root):
    with Store(root).write(ToySpec()) as writer:
        writer.training.save(1, {"a": torch.arange(1000)}, {})
        _, tensors, _ = writer.training.latest()
        writer.training.save(2, {"a": torch.zeros(1000)}, {})
        assert torch.equal(tensors["a"], torch.arange(1000))


@pytest.mark.parametrize("position", [3, 50, -1, "cut"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(root, caplog, position):
    store = Store(root)
    with store.write(ToySpec()) as writer:
        writer.training.save(1, {"a": torch.ones(100)}, {"at": 1})
        key = f"{ToySpec().ref}/{TRAINING}/{names(store)[0]}"
        first = store.objects.get(key)
        writer.training.save(2, {"a": torch.zeros(100)}, {"at": 2})
        newest = f"{ToySpec().ref}/{TRAINING}/{names(store)[0]}"
        body = bytearray(store.objects.get(newest))
        if position == "cut":
            body = body[:-1]
        else:
            body[position] ^= 4
        store.objects.put(newest, bytes(body))
        store.objects.put(key, first)  # as after a kill between putting the new one and deleting the old one
        with caplog.at_level(logging.WARNING):
            step, tensors, meta = writer.training.latest()
        assert "damaged" in caplog.text
        assert (step, meta) == (1, {"at": 1})
        assert torch.equal(tensors["a"], torch.ones(100))


def test_the_same_state_gives_the_same_bytes(tmp_path):
    bodies = []
    for folder in ("one", "two"):
        store = Store(tmp_path / folder)
        with store.write(ToySpec()) as writer:
            writer.training.save(1, {name: torch.ones(3) for name in "cab"}, {"z": 1, "a": {"y": 2}})
            bodies.append(store.objects.get(f"{ToySpec().ref}/{TRAINING}/{names(store)[0]}"))
    assert bodies[0] == bodies[1]
