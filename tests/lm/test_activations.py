"""Reading activations: the overlay gives what a harvest of the mixed rows would have given, and tells where each vector comes from."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm import sources
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint
from stagediff.store.shards import as_bf16

ROWS, NEW, CONTEXT, SHARD = 40, 9, 10, 8
REPLACED = [0, 3, 8, 15, 16, 17, 33]  # shard 3 (rows 24..31) has none


class World:
    """A base, new rows and a mix, harvested by one tiny model; and the mixed rows harvested outright, for comparison."""

    def __init__(self, save_tiny: Any, store: Any, put_rows: Any, put_mix: Any):
        rng = np.random.default_rng(0)
        self.store, self.put_mix = store, put_mix
        self.base_ids = rng.integers(0, 97, (ROWS, CONTEXT)).astype(np.int32)
        self.new_ids = rng.integers(0, 97, (NEW, CONTEXT)).astype(np.int32)
        self.mixed_ids = self.base_ids.copy()
        self.mixed_ids[REPLACED] = self.new_ids[: len(REPLACED)]
        self.model = sources.resolve_model(name=str(save_tiny("gpt_neox")))
        self.base_tokens, self.new_tokens = put_rows(self.base_ids), put_rows(self.new_ids, is_new=True)
        self.mix = put_mix(self.base_tokens, self.new_tokens, ROWS, REPLACED)
        self.base, self.new = self.harvest(self.base_tokens, ROWS), self.harvest(self.new_tokens, NEW)
        mixed = self.harvest(put_rows(self.mixed_ids), ROWS)
        self.mixed = as_bf16(store.artifact(mixed).array("data").read_rows(0, ROWS * (CONTEXT - 2))).reshape(ROWS, CONTEXT - 2, 32)

    def harvest(self, tokens: Any, rows: int, **changes: Any) -> Any:
        settings = {
            "hook": HookPoint(layer=1),
            "precision": "fp32",
            "skip_positions": (0, 4),
            "batch_rows": 1,
            "shard_rows": SHARD,
            **changes,
        }
        return steps.run(HarvestSpec(model=self.model, tokens=tokens, rows=rows, **settings), self.store)

    def data(self, **changes: Any) -> ActivationData:
        return ActivationData(**{"base": self.base, "rows": ROWS, "mix": self.mix, "new": self.new, **changes})


@pytest.fixture
def world(save_tiny: Any, store: Any, put_rows: Any, put_mix: Any) -> World:
    return World(save_tiny, store, put_rows, put_mix)


def read_all(reader: ActivationReader) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    shards = [reader.read_shard(i) for i in range(reader.n_shards)]
    places = [reader.locate(i) for i in range(reader.n_shards)]
    assert [len(s) for s in shards] == [len(p[0]) for p in places] == [reader.shard_tokens(i) for i in range(reader.n_shards)]
    return torch.cat(shards), *(np.concatenate([p[k] for p in places]) for k in range(3))


def test_a_mix_reads_as_if_its_rows_had_been_harvested(world: World) -> None:
    for rows, only in itertools.product((ROWS, 36, 17, 8), ("all", "base", "new")):
        reader = ActivationReader(world.store, world.data(rows=rows, only=only))
        vectors, row, position, is_new = read_all(reader)
        wanted = [r for r in range(rows) if only == "all" or (r in REPLACED) == (only == "new")]
        assert torch.equal(vectors, world.mixed[wanted].reshape(-1, 32))
        assert vectors.dtype == torch.bfloat16
        assert row.tolist() == np.repeat(wanted, 8).tolist()
        assert position.tolist() == [1, 2, 3, 5, 6, 7, 8, 9] * len(wanted)
        assert is_new.tolist() == np.repeat([r in REPLACED for r in wanted], 8).tolist()
        assert (row.dtype, position.dtype, is_new.dtype) == (np.int64, np.int16, np.bool_)
        assert (reader.n_rows, reader.n_tokens, reader.d, reader.tokens_per_row, reader.context) == (
            len(wanted),
            len(wanted) * 8,
            32,
            8,
            CONTEXT,
        )


def test_without_a_mix_the_base_is_read_as_it_is(world: World) -> None:
    reader = ActivationReader(world.store, world.data(mix=None, new=None))
    vectors, *_, is_new = read_all(reader)
    stored = world.store.artifact(world.base).array("data").read_rows(0, ROWS * 8)
    assert torch.equal(vectors, as_bf16(stored))
    assert not is_new.any()
    assert (reader.model.identity(), reader.hook) == (world.model.identity(), HookPoint(layer=1))


def test_token_ids_follow_the_overlay_in_any_order(world: World) -> None:
    reader = ActivationReader(world.store, world.data())
    rows = np.array([33, 5, 0, 39, 5, 16, 3])
    assert np.array_equal(reader.token_ids(rows), world.mixed_ids[rows])
    assert reader.token_ids(rows).dtype == np.int32
    assert reader.token_ids(np.array([], np.int64)).shape == (0, CONTEXT)
    with pytest.raises(IndexError):
        ActivationReader(world.store, world.data(rows=10)).token_ids(np.array([10]))


def test_a_shard_is_the_callers_own_memory(world: World) -> None:
    reader = ActivationReader(world.store, world.data())
    reader.read_shard(0).fill_(7.0)
    assert torch.equal(reader.read_shard(0), world.mixed[:SHARD].reshape(-1, 32))


def test_reading_touches_only_the_shards_and_new_rows_it_needs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagediff.store.shards import ArrayReader

    reads: list[tuple[int, int]] = []
    real = ArrayReader.read_rows
    monkeypatch.setattr(ArrayReader, "read_rows", lambda self, start, stop: reads.append((start, stop)) or real(self, start, stop))
    reader = ActivationReader(world.store, world.data())
    reads.clear()
    reader.read_shard(2)  # rows 16..23; 16 and 17 are new rows 4 and 5
    assert sorted(reads) == [(4 * 8, 6 * 8), (16 * 8, 24 * 8)]
    reads.clear()
    assert len(ActivationReader(world.store, world.data(only="new")).read_shard(3)) == 0
    assert reads == []


def test_parts_that_do_not_belong_together_are_refused(world: World, put_rows: Any) -> None:
    other_new = put_rows(world.new_ids[:8], is_new=True)
    cases = {
        "new activations are of": {"new": world.harvest(other_new, 8)},
        "new at resid_pre of layer 2": {"new": world.harvest(world.new_tokens, NEW, hook=HookPoint(layer=2))},
        "leaves out positions": {"new": world.harvest(world.new_tokens, NEW, skip_positions=(0,))},
        "new in bf16": {"new": world.harvest(world.new_tokens, NEW, precision="bf16")},
        "the mix replaces rows of": {"mix": world.put_mix(other_new, world.new_tokens, 8, [1])},
        "no activations of the new rows": {"new": None},
        "is no mix": {"mix": world.base_tokens},
        "holds activations of 3": {"new": world.harvest(world.new_tokens, 3)},
        "the mix covers 30 rows, 40 are asked for": {"mix": world.put_mix(world.base_tokens, world.new_tokens, 30, [1])},
    }
    for says, changes in cases.items():
        with pytest.raises(UserError) as error:
            ActivationReader(world.store, world.data(**{"rows": 8 if "replaces rows" in says else ROWS, **changes}))
        assert says in str(error.value)
    with pytest.raises(UserError, match="41 rows are asked of"):
        ActivationReader(world.store, world.data(rows=41))


def test_activations_of_another_model_are_refused(world: World, save_tiny: Any) -> None:
    world.model = sources.resolve_model(name=str(save_tiny("gpt_neox", "other", seed=5)))
    with pytest.raises(UserError, match="come from different models"):
        ActivationReader(world.store, world.data(new=world.harvest(world.new_tokens, NEW)))
