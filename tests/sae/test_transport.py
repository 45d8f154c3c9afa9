"""Transport: the linear maps against least squares, the carried dictionary against its definition, and the finetune that begins with it."""

import math

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import HookPoint
from stagediff.sae import train
from stagediff.sae.batches import Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.initial import fresh, measure
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec
from stagediff.sae.trainer import Trainer
from stagediff.sae.transport import RIDGE, fit, moments, transport
from stagediff.spec import Ref
from stagediff.store import Store

D, F = 24, 40
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
WEIGHT_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
LATER = HookPoint(layer=5)
"""Stands for the next checkpoint: the same token rows, other activations."""


@pytest.fixture
def run(store, quiet):
    return lambda spec: store.artifact(steps.run(spec, store, device="cpu", progress=quiet))


def changed(x: torch.Tensor, seed: int = 0, strength: float = 0.3) -> torch.Tensor:
    """Another checkpoint's activations of the same tokens [n, d]: turned and stretched, shifted, and a part that is not linear."""
    g = torch.Generator().manual_seed(seed)
    map_ = torch.eye(D) + strength * torch.randn(D, D, generator=g) / math.sqrt(D) * 2
    return 1.7 * x @ map_ + 0.4 * torch.randn(D, generator=g) + 0.05 * torch.tanh(x @ torch.randn(D, D, generator=g))


def config_of(architecture: str = "relu", **more) -> DictionaryConfig:
    return DictionaryConfig(architecture=architecture, features=F, k=4, auxk=0 if "topk" in architecture else None, l1=1.0, **more)


def trained(x: torch.Tensor, reader, architecture: str = "relu", count: int = 200, **more) -> SAE:
    data = reader(x, 1000)
    budget = Budget(tokens=64 * count, batch=64, lr=2e-3)
    trainer = Trainer(fresh(config_of(architecture, **more), *measure(data), 0), budget, count, True, torch.float32)
    for batch in batches(data, Order(0, shard_sizes(data)), 64, 0, count):
        trainer.train_on(batch)
    return trainer.dictionary()


def put(store, data, sae: SAE) -> Ref:
    """Stores a dictionary as if it had been trained."""
    spec = TrainSpec(data=data, budget=Budget(tokens=64, batch=64), dictionary=sae.config)
    cfg, weights = to_bytes(sae)
    with store.write(spec) as w:
        w.write_bytes(CFG, cfg)
        w.write_bytes(WEIGHTS, weights)
        w.commit(figures={})
    return spec.ref


def finetune_of(data, start, count: int = 20, **more) -> FinetuneSpec:
    more = {"rescale": True, "compute": "fp32"} | more
    return FinetuneSpec(data=data, budget=Budget(tokens=64 * count, batch=64, lr=1e-3), start=start, **more)


def files(artifact) -> dict[str, tuple]:
    return {f.path: (f.bytes, f.crc32c) for f in artifact.manifest.files if f.path != "spec.json"}


# The maps


def test_the_maps_are_the_ridge_regressions_towards_the_identity(planted):
    """Against numpy's least squares on all tokens at once, the penalty laid under the data as d more rows."""
    x = planted(700, D, 32)[0]
    after = changed(x)
    s, t = 2.5, 0.8
    maps = fit(moments(zip(x.split(130), after.split(130), strict=True), s, t))
    y, z = x.double().numpy() * s, after.double().numpy() * t
    assert maps.mean.numpy() == pytest.approx(y.mean(0), rel=1e-10)
    assert maps.mean_after.numpy() == pytest.approx(z.mean(0), rel=1e-10)
    y, z = y - y.mean(0), z - z.mean(0)
    for one, other, added, explained in (
        (y, z, maps.forward, maps.explained_forward),
        (z, y, maps.backward, maps.explained_backward),
    ):
        weight = math.sqrt(RIDGE * np.square(one).sum() / D)
        expected = np.linalg.lstsq(np.vstack([one, weight * np.eye(D)]), np.vstack([other, weight * np.eye(D)]), rcond=None)[0]
        assert np.eye(D) + added.numpy() == pytest.approx(expected, abs=1e-9)
        assert explained == pytest.approx(1 - np.square(other - one @ expected).sum() / np.square(other).sum(), abs=1e-9)
        assert 0.5 < explained < 1


def test_means_far_from_zero_cost_no_digits(planted):
    x = planted(500, D, 32)[0].double()
    far = 1e6 * torch.ones(D, dtype=torch.float64)
    after = changed(x.float()).double()
    near, shifted = fit(moments([(x, after)], 1.0, 1.0)), fit(moments([(x + far, after - far)], 1.0, 1.0))
    assert torch.allclose(near.forward, shifted.forward, atol=1e-6)
    assert torch.allclose(near.backward, shifted.backward, atol=1e-6)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        moments([], 1.0, 1.0)


# The dictionary


@pytest.mark.parametrize("norm", ["free", "unit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_read_the_old_coordinates_and_write_the_new_ones(architecture, norm, planted, reader):
    """Pre-activations and reconstructions against the definition, token by token in float64; dead features are carried like others."""
    x = planted(1500, D, 32)[0]
    sae = trained(x, reader, architecture, decoder_norm=norm)
    sae.W_enc[:, 7] = 0
    sae.b_enc[7] = -5.0
    after, t = changed(x), 0.37
    maps = fit(moments([(x, after)], sae.input_scale, t))
    out = transport(sae, maps, t)
    assert out.input_scale == t

    A, B = (np.eye(D) + added.numpy() for added in (maps.forward, maps.backward))
    m, m_after = maps.mean.numpy(), maps.mean_after.numpy()
    old, new = ({n: getattr(s, n).double().numpy() for n in WEIGHT_NAMES} for s in (sae, out))
    grown = np.linalg.norm(old["W_dec"] @ A, axis=1) / np.linalg.norm(old["W_dec"], axis=1)
    if norm == "free":
        grown[:] = 1
    subtract = sae.config.subtract_b_dec
    for y in after[:50].double().numpy() * t:
        read = m + (y - m_after) @ B
        before = (read - subtract * old["b_dec"]) @ old["W_enc"] + old["b_enc"]
        assert (y - subtract * new["b_dec"]) @ new["W_enc"] + new["b_enc"] == pytest.approx(before * grown, abs=2e-4)
    f = np.random.default_rng(0).random((9, F))
    written = m_after + (f @ old["W_dec"] + old["b_dec"] - m) @ A
    assert (f * grown) @ new["W_dec"] + new["b_dec"] == pytest.approx(written, abs=2e-4)
    if norm == "unit":
        assert np.linalg.norm(new["W_dec"], axis=1) == pytest.approx(np.ones(F), abs=1e-5)
    if architecture == "jumprelu":
        assert out.threshold.numpy() == pytest.approx(sae.threshold.numpy() * grown, rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_change_that_is_linear_is_undone(architecture, planted, reader):
    """Without a ridge an exactly linear change leaves every code and the explained variance as they were (turned: norms stay)."""
    x = planted(1500, D, 32)[0]
    sae = trained(x, reader, architecture)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3))).Q
    after = x @ turn + 0.7
    out = transport(sae, fit(moments([(x, after)], sae.input_scale, sae.input_scale), ridge=0.0), sae.input_scale)
    f, f_after = sae.encode(x), out.encode(after)
    same = (f - f_after).abs().amax(1) < 1e-3
    assert same.double().mean() > 0.995, "ties of topk and values at a threshold may fall to the other side"
    x_hat, x_hat_after = sae.decode(f), out.decode(f_after)
    assert torch.allclose((x_hat @ turn + 0.7)[same], x_hat_after[same], atol=1e-3)
    assert torch.allclose(sae.directions() @ turn, out.directions(), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_did_not_change_leaves_every_bit(architecture, planted, reader):
    x = planted(1000, D, 32)[0].bfloat16()
    sae = trained(x.float(), reader, architecture, count=40)
    out = transport(sae, fit(moments(((b, b) for b in x.split(300)), sae.input_scale, sae.input_scale)), sae.input_scale)
    assert all(torch.equal(getattr(sae, name), getattr(out, name)) for name in WEIGHT_NAMES)
    if sae.threshold is not None:
        assert torch.equal(sae.threshold, out.threshold)


# The step


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_transported_finetune_begins_where_a_plain_one_has_to_get_to(architecture, store, run, stored, planted, reader):
    x = planted(4096, D, 32)[0]
    before, after = stored(store, x), stored(store, changed(x, strength=0.6), hook=LATER)
    start = put(store, before, trained(x, reader, architecture, count=600))
    plain, carried = (run(finetune_of(after, start, paired=p)) for p in (None, before))
    assert carried.manifest.figures["ev"] > plain.manifest.figures["ev"] + 0.05
    assert 0.8 < carried.manifest.figures["transport_forward"] < 1
    assert 0.8 < carried.manifest.figures["transport_backward"] < 1
    assert "transport_forward" not in plain.manifest.figures


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_a_frozen_checkpoint_the_recipe_is_the_one_without_transport(architecture, store, run, stored, planted, reader):
    """The retrain null: paired with itself a finetune gives the same bytes."""
    data = stored(store, planted(1024, D, 32)[0])
    start = run(TrainSpec(data=data, budget=Budget(tokens=64 * 50, batch=64, lr=2e-3), dictionary=config_of(architecture), compute="fp32"))
    plain, paired = (run(finetune_of(data, start.ref, paired=p)) for p in (None, data))
    assert files(plain) == files(paired)
    assert paired.manifest.figures["transport_forward"] == pytest.approx(1, abs=1e-9)


def test_the_maps_are_fitted_on_the_first_tokens_only(store, run, stored, planted, reader, monkeypatch):
    """A bounded number: what comes after them may differ without any effect, and what is among them may not."""
    monkeypatch.setattr(train, "MEASURED_TOKENS", 700)
    x = planted(2048, D, 32)[0]
    data = stored(store, changed(x), hook=LATER)
    start = put(store, data, trained(x, reader, count=50))
    made = []
    for layer, first_changed in ((6, 2048), (7, 700), (8, 699)):
        old = x.clone()
        old[first_changed:] = 0
        made.append(run(finetune_of(data, start, count=1, paired=stored(store, old, hook=HookPoint(layer=layer)))))
    assert files(made[0]) == files(made[1])
    assert files(made[0])[WEIGHTS] != files(made[2])[WEIGHTS]


def test_activations_of_other_rows_are_refused(store, run, stored, planted, reader):
    x = planted(1024, D, 32)[0]
    data = stored(store, x)
    start = put(store, data, trained(x, reader, count=5))
    for other in (stored(store, x, name="others"), stored(store, x, shard_rows=32), data.model_copy(update={"rows": 64})):
        with pytest.raises(UserError, match="not of the same token rows"):
            run(finetune_of(data, start, paired=other))


def test_a_carried_optimiser_is_refused(store, stored, planted):
    data = stored(store, planted(512, D, 32)[0])
    with pytest.raises(ValueError, match="cannot carry its optimiser"):
        finetune_of(data, Ref("dictionaries/" + 20 * "a"), paired=data, optimiser="carried")


def test_the_pair_counts_for_the_key_and_is_named_as_upstream(store, stored, planted):
    x = planted(512, D, 32)[0]
    data, before = stored(store, x, hook=LATER), stored(store, x)
    start = Ref("dictionaries/" + 20 * "a")
    plain, paired = finetune_of(data, start), finetune_of(data, start, paired=before)
    assert plain.key != paired.key
    assert before.base in paired.refs()
    assert before.base not in plain.refs()


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_a_transported_finetune_that_died_goes_on_bit_by_bit(
    architecture, store, run, stored, planted, reader, tmp_path, quiet, monkeypatch
):
    """Killed while the maps are fitted, before the first checkpoint and after: the same bytes and figures."""

    def spec_in(where: Store) -> FinetuneSpec:
        x = planted(1536, D, 32)[0]
        before, after = stored(where, x), stored(where, changed(x), hook=LATER)
        start = put(where, before, trained(x, reader, architecture, count=40))
        return finetune_of(after, start, 120, paired=before, revive="resample", revive_tokens=500, anchor=0.5, checkpoint_tokens=64 * 25)

    spec = spec_in(store)
    whole = run(spec)
    other = Store(str(tmp_path / "other"))
    assert spec_in(other) == spec
    step, fitted, events = Trainer.train_on, train.fit, []

    def dying_step(self, batch):
        events.append("step")
        if events.count("step") in (6, 40, 75):
            raise KeyboardInterrupt
        return step(self, batch)

    def dying_fit(m):
        events.append("fit")
        if events.count("fit") == 1:
            raise KeyboardInterrupt
        return fitted(m)

    monkeypatch.setattr(Trainer, "train_on", dying_step)
    monkeypatch.setattr(train, "fit", dying_fit)
    deaths = 0
    while not other.artifact(spec.ref).is_complete:
        try:
            steps.run(spec, other, device="cpu", progress=quiet)
        except KeyboardInterrupt:
            deaths += 1
        assert deaths < 10
    assert deaths == 4
    assert events.count("fit") == 3, "in the first run, which died there, the second, which died in step 6, and the third"
    assert files(other.artifact(spec.ref)) == files(whole)
    assert other.artifact(spec.ref).manifest.figures == whole.manifest.figures
