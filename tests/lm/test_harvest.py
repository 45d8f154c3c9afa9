"""Harvest: what is stored is what the model computes; resuming, workers and damaged models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm import harvest, hooks, sources
from stagediff.lm.spec import HarvestSpec, HookPoint
from stagediff.store.shards import as_bf16

ROWS, CONTEXT = 44, 12


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 97, (ROWS, CONTEXT)).astype(np.int32)


def spec_for(folder: Path, tokens: Any, **changes: Any) -> HarvestSpec:
    settings = {"rows": ROWS, "hook": HookPoint(layer=2), "batch_rows": 4, "shard_rows": 8, **changes}
    return HarvestSpec(model=sources.resolve_model(name=str(folder)), tokens=tokens, **settings)


def files(store: Any, ref: Any) -> dict[str, str]:
    return {f.path: f.crc32c for f in store.artifact(ref).manifest.files if f.path != "spec.json"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "site", "skip"), [("gpt_neox", "resid_pre", (0,)), ("gemma3", "mlp_out", ()), ("gpt2", "resid_post", (0, 5, 11))]
)
def test_stored_vectors_are_the_models_own(
    save_tiny: Any, tiny: Any, store: Any, put_rows: Any, ids: Any, family: str, site: str, skip: Any, precision: str
) -> None:
    spec = spec_for(save_tiny(family), put_rows(ids), hook=HookPoint(layer=2, site=site), skip_positions=skip, precision=precision)
    artifact = store.artifact(steps.run(spec, store))
    stored = as_bf16(artifact.array("data").read_rows(0, ROWS * (CONTEXT - len(skip))))
    model = tiny(family)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    kept = [p for p in range(CONTEXT) if p not in skip]
    batches = [hooks.read(model, spec.hook, torch.from_numpy(ids[i : i + 4]).long())[:, kept] for i in range(0, ROWS, 4)]
    want = torch.cat(batches).to(torch.bfloat16).reshape(-1, 32)
    if precision == "bf16":  # `.to` rounds rotary frequencies too, loading does not: equal up to that
        torch.testing.assert_close(stored, want, rtol=0.1, atol=0.05 * float(want.abs().max()))
    else:
        assert torch.equal(stored, want)
    norms = stored.double().norm(dim=1)
    figures = artifact.manifest.figures
    assert figures["tokens"] == len(want)
    assert figures["d"] == 32
    assert figures["mean_norm"] == pytest.approx(float(norms.mean()), rel=1e-5)
    assert figures["max_norm"] == pytest.approx(float(norms.max()), rel=1e-5)
    assert artifact.manifest.notes["harvest"]["tokens_per_second"] > 0


def test_a_harvest_that_died_goes_on_at_the_missing_shards_with_the_same_bytes(
    save_tiny: Any, store: Any, put_rows: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(save_tiny("llama"), put_rows(ids))
    whole = files(store, steps.run(spec, store))
    store.remove(spec.ref)
    real, calls = harvest.forward_shard, []

    def dies_at_the_fourth(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(harvest, "forward_shard", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        steps.run(spec, store)
    assert not store.artifact(spec.ref).is_complete
    calls.clear()
    monkeypatch.setattr(harvest, "forward_shard", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert files(store, steps.run(spec, store)) == whole
    assert len(calls) == 3  # of six shards, three were there


def test_several_workers_share_a_harvest_and_the_last_one_commits(save_tiny: Any, store: Any, put_rows: Any, ids: Any) -> None:
    spec = spec_for(save_tiny("gpt_neox"), put_rows(ids))
    whole = files(store, steps.run(spec, store))
    figures = store.artifact(spec.ref).manifest.figures
    store.remove(spec.ref)
    for part in (2, 0):
        steps.run(spec, store, part=(part, 3))
        assert not store.artifact(spec.ref).is_complete
    steps.run(spec, store, part=(1, 3))
    assert files(store, spec.ref) == whole
    assert store.artifact(spec.ref).manifest.figures == figures


def test_a_complete_harvest_loads_no_model(save_tiny: Any, store: Any, put_rows: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(save_tiny("gpt_neox"), put_rows(ids))
    steps.run(spec, store)
    monkeypatch.setattr(harvest, "load_model", lambda *a, **k: pytest.fail("loaded"))
    steps.run(spec, store)


def test_nan_is_told_with_row_and_layer(save_tiny: Any, store: Any, put_rows: Any, ids: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("gpt_neox")
    ids[ids == 90] = 1
    ids[21, 7] = 90
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][90] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinity at the embedding on token row 21"):
        steps.run(spec_for(folder, put_rows(ids)), store)

    folder = save_tiny("gpt_neox", "second")
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    spec = spec_for(folder, put_rows(ids), hook=HookPoint(layer=3))
    with pytest.raises(UserError, match="NaN or infinity at the output of layer 1 on token row 0"):
        steps.run(spec, store)
    assert not store.artifact(spec.ref).is_complete


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": ROWS + 1}, "asks for 45 token rows.*holds 44"),
        ({"hook": HookPoint(layer=9)}, "layers 0 to 3"),
        ({"skip_positions": (12,)}, "positions 0 to 11"),
        ({"shard_rows": 6}, "no multiple of batch_rows"),
    ],
)
def test_mistakes_are_told_before_any_work(
    save_tiny: Any, store: Any, put_rows: Any, ids: Any, changes: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest, "load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says):
        steps.run(spec_for(save_tiny("gpt_neox"), put_rows(ids), **changes), store)


def test_token_ids_of_another_tokenizer_are_refused(save_tiny: Any, store: Any, put_rows: Any, ids: Any) -> None:
    ids[3, 3] = 97
    with pytest.raises(UserError, match="token id 97.*ids 0 to 96"):
        steps.run(spec_for(save_tiny("gpt_neox"), put_rows(ids)), store)


def test_a_mix_is_not_harvested(save_tiny: Any, store: Any, put_rows: Any, put_mix: Any, ids: Any) -> None:
    mix = put_mix(put_rows(ids), put_rows(ids[:4], is_new=True), ROWS, [1, 2])
    with pytest.raises(UserError, match="Plain token rows are harvested"):
        steps.run(spec_for(save_tiny("gpt_neox"), mix), store)


def test_a_fault_of_the_writer_thread_reaches_the_caller(
    save_tiny: Any, store: Any, put_rows: Any, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagediff.store.arrays import ArrayWriter

    def full(self: Any, shard: int, block: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ArrayWriter, "write_shard", full)
    with pytest.raises(OSError, match="Input/output error"):
        steps.run(spec_for(save_tiny("gpt_neox"), put_rows(ids)), store)


@pytest.mark.parametrize(("shard", "d"), [(127 * 512, 1024), (127 * 64, 128), (2047 * 8, 4096), (7, 64), (1, 9_000_000)])
def test_chunks_divide_shards_and_stay_within_8_mib(shard: int, d: int) -> None:
    rows = harvest.chunk_rows(shard, d)
    assert shard % rows == 0
    assert rows == 1 or rows * d * 2 <= 8 << 20
    assert rows == shard or rows * d * 2 > 1 << 20  # none of these needs tiny chunks
