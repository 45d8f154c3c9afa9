"""Activations that are not stored: what is read has the stored ones' bits, and only the rows that are asked for go through the model."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm import sources, streamed
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint
from stagediff.store import State, Store

ROWS, NEW, CONTEXT = 45, 9, 10
SETTINGS = {"hook": HookPoint(layer=1), "precision": "fp32", "skip_positions": (0, 4), "batch_rows": 4, "shard_rows": 16}


@pytest.fixture
def specs(save_tiny: Any, put_rows: Any, put_mix: Any) -> tuple[HarvestSpec, HarvestSpec, Any]:
    rng = np.random.default_rng(0)
    model = sources.resolve_model(name=str(save_tiny("gpt_neox")))
    base, new = (put_rows(rng.integers(0, 97, (n, CONTEXT)).astype(np.int32), is_new=n == NEW) for n in (ROWS, NEW))
    mix = put_mix(base, new, ROWS, [0, 3, 8, 15, 16, 17, 33])
    return *(HarvestSpec(model=model, tokens=t, rows=n, **SETTINGS) for t, n in ((base, ROWS), (new, NEW))), mix


def unstored(spec: HarvestSpec) -> HarvestSpec:
    return spec.model_copy(update={"stored": False})


def test_what_is_read_has_the_stored_ones_bits(specs: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    base, new, mix = specs
    datas = [
        ActivationData(base=base.ref, rows=rows, mix=mix, new=new.ref, only=only)
        for rows, only in itertools.product((ROWS, 36, 17), ("all", "base", "new"))
    ]
    for spec in (base, new):
        steps.run(spec, store)
    expected = [read(store, data) for data in datas]
    for spec in (base, new):
        store.remove(spec.ref)
        assert unstored(spec).ref == spec.ref, "where values come from is no part of the key"
        steps.run(unstored(spec), store)
        assert store.artifact(spec.ref).state is State.EVICTED
        assert not store.artifact(spec.ref).names("data")
    for data, there in zip(datas, expected, strict=True):
        assert torch.equal(read(store, data), there)

    seen: list[int] = []
    forward = streamed.vectors
    monkeypatch.setattr(streamed, "vectors", lambda loaded, spec, ids, *more: seen.append(len(ids)) or forward(loaded, spec, ids, *more))
    array = ActivationReader(store, ActivationData(base=base.ref, rows=ROWS))._array
    assert array.read_rows(5 * 8 + 3, 6 * 8).shape == (5, 32)
    assert seen == [4], "the batch that holds them, and no other"


def read(store: Store, data: ActivationData) -> torch.Tensor:
    reader = ActivationReader(store, data)
    return torch.cat([reader.read_shard(i) for i in range(reader.n_shards)])


def test_the_step_looks_at_the_first_shard(specs: Any, store: Store, save_tiny: Any) -> None:
    base, _, _ = specs
    steps.run(base, store)
    whole = store.artifact(base.ref).manifest.figures
    store.remove(base.ref)
    steps.run(unstored(base), store)
    figures = store.artifact(base.ref).manifest.figures
    assert (figures["tokens"], figures["d"], figures["measured_tokens"]) == (whole["tokens"], whole["d"], 16 * 8)
    assert figures["mean_norm"] == pytest.approx(whole["mean_norm"], rel=0.1)
    small = sources.resolve_model(name=str(save_tiny("gpt2", vocab_size=50)))
    with pytest.raises(UserError, match="does not know|knows ids"):
        steps.run(unstored(base.model_copy(update={"model": small})), store)


def test_bytes_that_nobody_stored_are_told_apart(specs: Any, store: Store) -> None:
    """What trained on rows that were drawn anew, and came out otherwise, is known to be stale: even beyond the shard that is looked at."""
    base, _, _ = specs
    steps.run(unstored(base), store)
    before = store.bytes_of([base.ref])
    steps.run(unstored(base), store, force=True)
    assert store.bytes_of([base.ref]) == before
    manifest = store.artifact(base.ref).manifest
    assert (manifest.same_bytes, manifest.figures["measured_tokens"]) == (True, 16 * 8)

    ids = store.artifact(base.tokens).array("rows").read_rows(0, ROWS).copy()
    ids[-1] = (ids[-1] + 1) % 97
    rows = store.artifact(base.tokens)
    spec, table = rows.spec(), rows.read_table("rows.parquet")
    store.remove(base.tokens)
    with store.write(spec) as w:
        array = w.array("rows", shape=ids.shape, dtype="int32", chunk_rows=16, shard_rows=16)
        for i in array.pending():
            array.write_shard(i, ids[i * 16 : (i + 1) * 16])
        w.write_table("rows.parquet", table)
        w.commit(figures={})
    steps.run(unstored(base), store, force=True)
    assert store.bytes_of([base.ref]) != before
    assert store.artifact(base.ref).manifest.same_bytes is False


def test_it_is_done_for_those_who_read_it_so_and_for_no_other(specs: Any, store: Store) -> None:
    base, _, _ = specs
    steps.run(unstored(base), store)
    assert steps.is_done(unstored(base), store)
    assert not steps.is_done(base, store), "it is to be stored now"
    steps.run(base, store)
    assert store.artifact(base.ref).state is State.COMPLETE
    assert steps.is_done(unstored(base), store)


def test_shards_of_a_harvest_that_was_to_be_stored_do_not_stay(specs: Any, store: Store) -> None:
    base, _, _ = specs
    steps.run(base, store, part=(0, 3))
    assert store.objects.entries(f"{base.ref}/data")
    steps.run(unstored(base), store)
    assert not store.objects.entries(f"{base.ref}/data")
    assert store.artifact(base.ref).verify() == []


def test_every_shard_is_looked_at(specs: Any, store: Store, put_rows: Any) -> None:
    """A token that the model does not know, in a shard that the step did not see."""
    base, _, _ = specs
    ids = np.zeros((ROWS, CONTEXT), np.int32)
    ids[40, 3] = 97
    spec = base.model_copy(update={"tokens": put_rows(ids)})
    steps.run(unstored(spec), store)
    reader = ActivationReader(store, ActivationData(base=spec.ref, rows=ROWS))
    assert reader.read_shard(0).shape == (16 * 8, 32)
    with pytest.raises(UserError, match="token id 97"):
        reader.read_shard(2)


def test_evicted_activations_can_be_read_too(specs: Any, store: Store) -> None:
    base, _, _ = specs
    steps.run(base, store)
    data = ActivationData(base=base.ref, rows=ROWS)
    there = read(store, data)
    store.evict(base.ref)
    assert torch.equal(read(store, data), there)
