"""What following a training run asks of a finetune: a scale measured anew, a carried optimiser, an anchor, dead features resampled."""

import itertools
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save

from stagediff import steps
from stagediff.errors import UserError
from stagediff.sae import train
from stagediff.sae.batches import Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.initial import fresh, measure
from stagediff.sae.layout import CFG, OPTIMISER, WEIGHTS, to_bytes
from stagediff.sae.optimiser import Optimiser, pull
from stagediff.sae.revive import ENCODER_SHARE, REVIVED, REVIVED_COLUMNS, drawn, renewed, resample
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec
from stagediff.sae.trainer import Trainer
from stagediff.spec import Ref
from stagediff.store import Store

D, F = 24, 40
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
WEIGHT_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
DEAD = (3, 8, 21, 39)
PROCESS = """
import sys, torch
torch.set_num_threads(1)
from stagediff import steps
from stagediff.progress import Progress
from stagediff.sae.spec import FinetuneSpec
from stagediff.store import Store
steps.run(FinetuneSpec.model_validate_json(sys.argv[1]), Store(sys.argv[2]), device="cpu", progress=Progress(interactive=False))
"""


@pytest.fixture
def run(store, quiet):
    return lambda spec: store.artifact(steps.run(spec, store, device="cpu", progress=quiet))


def config_of(architecture: str = "relu", **more) -> DictionaryConfig:
    return DictionaryConfig(architecture=architecture, features=F, k=4, auxk=0 if "topk" in architecture else None, l1=1.0, **more)


def budget_of(steps: int, batch: int = 64, **more) -> Budget:
    return Budget(tokens=steps * batch, batch=batch, lr=2e-3, **more)


def train_of(data, architecture: str = "relu", steps: int = 200, **more) -> TrainSpec:
    return TrainSpec(data=data, budget=budget_of(steps), dictionary=config_of(architecture), compute="fp32", **more)


def finetune_of(data, start, steps: int = 30, **more) -> FinetuneSpec:
    return FinetuneSpec(data=data, budget=budget_of(steps), start=start, compute="fp32", **more)


def put(store, data, sae: SAE, optimiser: dict | None = None) -> Ref:
    """Stores a dictionary as if it had been trained."""
    spec = TrainSpec(data=data, budget=budget_of(1), dictionary=sae.config, keep_optimiser=optimiser is not None)
    cfg, weights = to_bytes(sae)
    with store.write(spec) as w:
        w.write_bytes(CFG, cfg)
        w.write_bytes(WEIGHTS, weights)
        if optimiser is not None:
            w.write_bytes(OPTIMISER, save({name: value.contiguous() for name, value in optimiser.items()}))
        w.commit(figures={})
    return spec.ref


def training(x, reader, architecture: str = "relu", steps: int = 300) -> Trainer:
    data = reader(x, 1000)
    trainer = Trainer(fresh(config_of(architecture), *measure(data), 0), budget_of(steps), steps, True, torch.float32)
    for batch in batches(data, Order(0, shard_sizes(data)), 64, 0, steps):
        trainer.train_on(batch)
    return trainer


def trained(*args, **more) -> SAE:
    return training(*args, **more).dictionary()


def killed(sae: SAE, features=DEAD) -> SAE:
    """A copy in which these features never fire."""
    out = sae.copy()
    out.W_enc[:, list(features)] = 0
    out.b_enc[list(features)] = -100.0
    return out


def fires_late(sae: SAE, stream: torch.Tensor, after: int) -> int:
    """Biases one feature so that it fires on some of these inputs [n, d], but on none of the first `after`. Returns which."""
    pre = stream.float() * sae.input_scale @ sae.W_enc
    early, whole = pre[:after].amax(0), pre.amax(0)
    feature = int((whole - early).argmax())
    assert whole[feature] > early[feature] + 0.01
    sae.b_enc[feature] = -(early[feature] + whole[feature]) / 2
    return feature


def files(artifact) -> dict[str, tuple]:
    return {f.path: (f.bytes, f.crc32c) for f in artifact.manifest.files if f.path != "spec.json"}


def distance(one: SAE, other: SAE) -> float:
    return math.sqrt(sum(float((getattr(one, n) - getattr(other, n)).double().square().sum()) for n in WEIGHT_NAMES))


# Keys


def test_every_setting_counts_for_the_key(store, stored, planted):
    data, start = stored(store, planted(512, D, 32)[0]), Ref("dictionaries/" + 20 * "a")
    settings = (
        ("rescale", True),
        ("optimiser", "carried"),
        ("anchor", 0.5),
        ("revive", "resample"),
        ("revive_at", (0.0, 0.5)),
        ("revive_tokens", 9),
        ("keep_optimiser", True),
    )
    keys = {finetune_of(data, start).key, *(finetune_of(data, start, **{name: value}).key for name, value in settings)}
    assert len(keys) == len(settings) + 1
    assert train_of(data).key != train_of(data, keep_optimiser=True).key


# The scale


def test_data_times_a_power_of_two_give_the_same_dictionary_when_rescaled(store, run, stored, planted):
    """Then bf16 and every product scale without rounding: the weights in scaled units agree in every bit, and the explained variance."""
    x, _ = planted(2048, D, 32)
    start = run(train_of(stored(store, x), steps=100)).ref
    one, eight = (run(finetune_of(stored(store, f * x, name=f"x{f}"), start, rescale=True)) for f in (1, 8))
    a, b = SAE.load(one), SAE.load(eight)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in WEIGHT_NAMES)
    assert a.input_scale == 8 * b.input_scale
    assert one.manifest.figures["ev"] == eight.manifest.figures["ev"]


def test_data_seven_times_as_long_give_the_same_directions_when_rescaled(store, run, stored, planted):
    x, _ = planted(2048, D, 32)
    start = run(train_of(stored(store, x), steps=400))
    data = {f: stored(store, f * x, name=f"x{f}") for f in (1, 7)}
    made = {f: run(finetune_of(data[f], start.ref, rescale=True, steps=100)) for f in (1, 7)}
    one, seven = (SAE.load(made[f]) for f in (1, 7))
    ev = {f: made[f].manifest.figures["ev"] for f in (1, 7)}
    assert (one.directions() * seven.directions()).sum(1).min() > 0.9999
    assert (SAE.load(start).directions() * seven.directions()).sum(1).min() < 0.999, "they did move"
    assert ev[1] > 0.5
    assert ev[7] == pytest.approx(ev[1], abs=1e-3)
    expected = math.sqrt(D) / float((7 * x).bfloat16().double().norm(dim=1).mean())
    assert seven.input_scale == pytest.approx(expected, rel=1e-9)
    assert made[7].manifest.figures["input_scale"] == seven.input_scale
    assert made[7].read_json(CFG)["metadata"]["stagediff"]["input_scale"] == seven.input_scale
    kept = run(finetune_of(data[7], start.ref, steps=100))
    assert kept.manifest.figures["input_scale"] == SAE.load(start).input_scale
    assert abs(kept.manifest.figures["ev"] - ev[1]) > 0.01, "what the scale is for"


def test_a_dictionary_without_a_scale_cannot_be_rescaled(store, run, stored, planted):
    x, _ = planted(512, D, 32)
    data = stored(store, x)
    start = put(store, data, fresh(config_of(), 1.0, torch.zeros(D), 0))
    with pytest.raises(UserError, match=r"measured anew \(rescale\).*made elsewhere"):
        run(finetune_of(data, start, rescale=True))


# The optimiser


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_carried_on_are_steps_of_one_training(architecture, planted, reader):
    x, _ = planted(64 * 40, D, 32)
    config = config_of(architecture, l1_warmup=0.0)
    start, constant = fresh(config, *measure(reader(x, 500)), 0), budget_of(40, warmup=0.0, decay=0.0)
    parts = x.split(64)

    whole = Trainer(start, constant, 40, True, torch.float32)
    first = Trainer(start, constant, 20, True, torch.float32)
    for batch in parts:
        whole.train_on(batch)
    for batch in parts[:20]:
        first.train_on(batch)
    second, forgetful = (Trainer(first.dictionary(), constant, 20, False, torch.float32) for _ in range(2))
    given = {name: value.clone() for name, value in first.optimiser_state().items()}
    second.carry(given)
    for batch in parts[20:]:
        second.train_on(batch)
        forgetful.train_on(batch)
    if architecture == "jumprelu":  # thresholds pass through exp and log
        assert distance(whole.dictionary(), second.dictionary()) < 1e-5
    else:
        assert all(torch.equal(value, second.parameters[name]) for name, value in whole.parameters.items())
        assert all(torch.equal(value, second.optimiser_state()[name]) for name, value in whole.optimiser_state().items())
    assert distance(whole.dictionary(), forgetful.dictionary()) > 1e-2
    assert all(torch.equal(value, first.optimiser_state()[name]) for name, value in given.items()), "what was handed over is left alone"


def test_a_stored_optimiser_is_carried_on_by_the_next_step(store, run, stored, planted):
    """The data are one batch, so that every epoch is the same step up to the order of a sum."""
    data = stored(store, planted(64, D, 32)[0])
    flat = {"warmup": 0.0, "decay": 0.0}
    dictionary = config_of(l1_warmup=0.0)
    begin = {"data": data, "dictionary": dictionary, "compute": "fp32"}
    whole = SAE.load(run(TrainSpec(budget=budget_of(40, **flat), **begin)))
    first = run(TrainSpec(budget=budget_of(20, **flat), keep_optimiser=True, **begin))
    assert OPTIMISER in first.names()
    then = {"data": data, "budget": budget_of(20, **flat), "start": first.ref, "compute": "fp32"}
    carried, new = (run(FinetuneSpec(optimiser=o, **then)) for o in ("carried", "fresh"))
    assert OPTIMISER not in carried.names(), "kept only where asked for"
    assert distance(whole, SAE.load(carried)) < 1e-4
    assert distance(whole, SAE.load(new)) > 1e-2


def test_a_start_without_optimiser_state_is_refused(store, run, stored, planted):
    data = stored(store, planted(512, D, 32)[0])
    start = run(train_of(data, steps=5)).ref
    with pytest.raises(UserError, match="none was stored with it.*keep_optimiser: true"):
        run(finetune_of(data, start, optimiser="carried"))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_revived_features_lose_their_moments_and_no_others(architecture, planted, reader):
    x, _ = planted(640, D, 32)
    start = fresh(config_of(architecture), *measure(reader(x, 500)), 0)
    before = Trainer(start, budget_of(10), 10, True, torch.float32)
    for batch in x.split(64):
        before.train_on(batch)
    given = before.optimiser_state()
    after = Trainer(start, budget_of(10), 10, False, torch.float32)
    after.carry(given)
    after.renew(start, torch.tensor([2, 5]))
    rest = [i for i in range(F) if i not in (2, 5)]
    for name, value in after.optimiser_state().items():
        if name.endswith(".step") or ".b_dec." in name:
            assert torch.equal(value, given[name])
            continue
        new, old = (t.T if "W_enc" in name else t for t in (value, given[name]))
        assert not new[[2, 5]].any()
        assert torch.equal(new[rest], old[rest])
        assert old[rest].any()


# The anchor


def test_the_pull_is_the_implicit_step_of_the_penalty():
    g = torch.Generator().manual_seed(0)
    W, home = torch.randn(5, 7, generator=g, dtype=torch.float64), torch.randn(5, 7, generator=g, dtype=torch.float64)
    for anchor, lr in itertools.product((1e-3, 1.0, 50.0), (1e-4, 0.1)):
        V = W.clone()
        pull({"W": V}, {"W": home}, anchor, lr)
        V.requires_grad_()
        (anchor * (V - home).square().sum() + (V - W).square().sum() / (2 * lr)).backward()
        assert V.grad.abs().max() < 1e-9 / lr, "V is where the penalty and the distance to W balance"


def test_a_weight_that_is_driven_one_way_rests_at_the_inverse_of_twice_the_anchor():
    """Adam under a constant gradient moves by lr a step: W_t = (W_(t-1) - lr) / (1 + 2 lr a), which tends to -1 / (2 a)."""
    lr, anchor, home = 0.05, 2.0, torch.full((3,), 7.0)
    p = {"W": home.clone()}
    optimiser = Optimiser(p, budget_of(1))
    expected = 0.0
    for _ in range(200):
        optimiser.step({"W": torch.tensor([1e-2, 1.0, 300.0])}, lr)
        pull(p, {"W": home}, anchor, lr)
        expected = (expected - lr) / (1 + 2 * lr * anchor)
        assert p["W"].tolist() == pytest.approx([7 + expected] * 3, abs=1e-5)
    assert expected == pytest.approx(-1 / (2 * anchor), rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_anchor_holds_the_dictionary_back_and_a_large_one_pins_it(architecture, store, run, stored, planted, reader):
    x, _ = planted(1024, D, 32)
    data = stored(store, x)
    start = put(store, data, trained(x, reader, architecture))
    before = SAE.load(store.artifact(start))
    other = stored(store, planted(1024, D, 32, seed=5)[0], name="other")
    moved = [distance(before, SAE.load(run(finetune_of(other, start, anchor=a)))) for a in (0.0, 30.0, 1e3, 1e12)]
    assert moved[0] > 2 * moved[1] > 20 * moved[2] > 0.001
    assert moved[3] < 1e-5
    if architecture == "jumprelu":
        pinned = SAE.load(run(finetune_of(other, start, anchor=1e12)))
        assert torch.allclose(pinned.threshold, before.threshold, rtol=1e-6)


# Revival


def test_inputs_are_drawn_by_the_square_of_their_loss_one_after_the_other():
    losses = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    p = (losses.square() / losses.square().sum()).numpy()
    tries, pairs = 6000, np.zeros((4, 4))
    for seed in range(tries):
        first, second = drawn(losses, torch.arange(4), 2, seed).tolist()
        pairs[first, second] += 1
    expected = np.array([[p[i] * p[j] / (1 - p[i]) if i != j else 0 for j in range(4)] for i in range(4)])
    assert np.abs(pairs / tries - expected).max() < 4 * math.sqrt(0.25 / tries)
    assert not pairs[expected == 0].any()


def test_copies_of_an_input_are_drawn_once_and_perfect_inputs_never():
    prints = torch.tensor([7, 7, 7, 1, 2, 7, 3])
    losses = torch.tensor([5.0, 5, 5, 1, 1, 5, 0], dtype=torch.float64)
    for seed in range(30):
        tokens = drawn(losses, prints, 10, seed)
        assert sorted(prints[tokens].tolist()) == [1, 2, 7], "as many as there are"
        assert torch.equal(tokens[:2], drawn(losses, prints, 2, seed))


@pytest.mark.parametrize("norm", ["free", "unit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_weights_follow_the_rule(architecture, norm, planted, reader):
    x, _ = planted(1500, D, 32)
    sae = trained(x, reader, architecture, steps=50)
    sae.config = sae.config.model_copy(update={"decoder_norm": norm})
    if norm == "free":
        sae.W_dec *= torch.linspace(0.5, 2.0, F)[:, None]
    residuals, features = torch.randn(len(DEAD), D, generator=torch.Generator().manual_seed(1)), torch.tensor(DEAD)
    alive = torch.ones(F, dtype=torch.bool)
    alive[[*DEAD, 5]] = False  # 5 is dead, but nothing was left to draw for it
    out = renewed(sae, features, residuals, alive)

    live = alive.numpy()
    W_enc, W_dec, b_dec = (getattr(sae, n).double().numpy() for n in ("W_enc", "W_dec", "b_dec"))
    unit = residuals.double().numpy() / np.linalg.norm(residuals.double().numpy(), axis=1, keepdims=True)
    encoder = np.linalg.norm(W_enc, axis=0)[live].mean() * ENCODER_SHARE
    decoder = 1 if norm == "unit" else np.linalg.norm(W_dec, axis=1)[live].mean()
    assert out.W_dec[features].numpy() == pytest.approx(decoder * unit, abs=1e-6)
    assert out.W_enc[:, features].T.numpy() == pytest.approx(encoder * unit, abs=1e-6)
    bias = 0 if sae.config.subtract_b_dec else -encoder * unit @ b_dec
    assert out.b_enc[features].numpy() == pytest.approx(np.broadcast_to(bias, len(DEAD)), abs=1e-5)
    if architecture == "jumprelu":
        assert out.threshold[features].tolist() == pytest.approx([ENCODER_SHARE * float(sae.threshold[alive].median())] * len(DEAD))
    for name in (*WEIGHT_NAMES, "threshold"):
        old, new = getattr(sae, name), getattr(out, name)
        if old is None or name == "b_dec" or (name == "threshold" and architecture == "batchtopk"):
            assert old is new is None or torch.equal(old, new)
            continue
        rest = [i for i in range(F) if i not in DEAD]
        assert torch.equal(new.T[rest] if name == "W_enc" else new[rest], old.T[rest] if name == "W_enc" else old[rest])


def test_a_bias_of_zero_means_the_same_whether_b_dec_is_subtracted_or_not():
    g = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(D, generator=g)
    x = mean + torch.randn(50, D, generator=g)  # around the mean, as data are: half of them fire
    some, residuals = torch.tensor([1, 2]), torch.randn(2, D, generator=g)
    pair = [fresh(config_of(subtract_b_dec=s), 1.5, mean, 0) for s in (True, False)]
    one, other = (renewed(sae, some, residuals, torch.ones(F, dtype=torch.bool)).encode(x)[:, some] for sae in pair)
    assert one.any()
    assert torch.allclose(one, other, atol=1e-5)


def test_dead_features_start_from_residuals_that_are_recorded(planted, reader):
    x, _ = planted(1500, D, 32)
    sae = killed(trained(x, reader))
    stream = x.bfloat16().split(130)
    late = fires_late(sae, x.bfloat16(), 1000)
    found = {n: resample(sae, lambda n=n: (s[: max(0, n - 130 * i)] for i, s in enumerate(stream)), 0) for n in (1000, 1500)}
    assert found[1000][1].feature.tolist() == sorted([*DEAD, late])
    assert found[1500][1].feature.tolist() == list(DEAD), "only features that fire nowhere"
    out, table = found[1500]
    assert set(table.columns) == set(REVIVED_COLUMNS)
    for row in table.itertuples():
        token = stream[row.token // 130][row.token % 130].float()
        residual = (token - sae.decode(sae.encode(token[None]))[0]).double()
        assert row.token_loss == pytest.approx(float(residual.norm()) ** 2 * sae.input_scale**2, rel=1e-4)
        assert float(torch.nn.functional.cosine_similarity(residual, out.W_dec[row.feature].double(), dim=0)) == pytest.approx(1, abs=1e-5)
    assert table.token.is_unique
    again = resample(sae, lambda: iter(stream), 0)[1]
    other = resample(sae, lambda: iter(stream), 1)[1]
    assert again.token.tolist() == table.token.tolist() != other.token.tolist()


def test_a_dictionary_that_never_fires_is_renewed_as_a_whole(planted, reader):
    x, _ = planted(600, D, 32)
    sae = killed(trained(x, reader, steps=20), range(F))
    sae.W_enc[0, :] = 0.5
    out, table = resample(sae, lambda: iter([x.bfloat16()]), 0)
    assert table.feature.tolist() == list(range(F))
    assert all(torch.isfinite(getattr(out, name)).all() for name in WEIGHT_NAMES)
    assert out.W_enc.norm(dim=0).tolist() == pytest.approx([ENCODER_SHARE * 0.5] * F)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dead_features_come_alive_and_the_others_begin_where_they_were(architecture, store, run, stored, planted, reader, monkeypatch):
    x, _ = planted(4096, D, 32)
    data = stored(store, x)
    start = put(store, data, killed(trained(x, reader, architecture, steps=600)))
    before = SAE.load(store.artifact(start))
    begun = []

    class Seen(Trainer):
        def train_on(self, batch):
            if self.step == 0:
                begun.append(self.dictionary())
            return super().train_on(batch)

    monkeypatch.setattr(train, "Trainer", Seen)
    left, made = (run(finetune_of(data, start, steps=200, revive=r, revive_tokens=10**9)) for r in ("none", "resample"))
    assert REVIVED not in left.names()
    assert left.manifest.figures["revived"] == 0
    table = made.read_table(REVIVED)
    dead = table.feature.tolist()
    assert set(DEAD) <= set(dead)
    assert made.manifest.figures["revived"] == len(dead) < F / 2
    rest = [i for i in range(F) if i not in dead]
    at_start = begun[1]
    assert torch.equal(at_start.W_dec[rest], before.W_dec[rest])
    assert torch.equal(at_start.W_enc[:, rest], before.W_enc[:, rest])
    assert torch.equal(at_start.b_enc[rest], before.b_enc[rest])
    assert torch.equal(at_start.b_dec, before.b_dec)
    assert at_start.W_enc[:, dead].norm(dim=0).max() < 0.5 * before.W_enc[:, rest].norm(dim=0).mean()
    fires = {a.ref: (SAE.load(a).encode(x)[:, list(DEAD)] > 0).any(0) for a in (left, made)}
    assert not fires[left.ref].any()
    assert fires[made.ref].sum() >= len(DEAD) - 1
    assert made.manifest.figures["dead"] < left.manifest.figures["dead"]
    assert made.manifest.figures["ev"] > left.manifest.figures["ev"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_that_die_on_the_way_are_revived_on_the_way(architecture, store, run, stored, planted, reader, monkeypatch):
    """Killed before step 20, they are found before step 30 and not before step 0; what a revival does to all else is nothing."""
    x, _ = planted(2048, D, 32)
    data = stored(store, x)
    start = put(store, data, trained(x, reader, architecture, steps=400))
    step, seen = Trainer.train_on, {}

    def dies(self, batch):
        if self.step == 20:
            self.parameters["W_enc"][:, list(DEAD)] = 0
            self.parameters["b_enc"][list(DEAD)] = -100.0
        seen[self.step] = self.dictionary(), {n: v.clone() for n, v in self.optimiser_state().items()}
        outcome = step(self, batch)
        seen[f"after {self.step}"] = self.dictionary(), {n: v.clone() for n, v in self.optimiser_state().items()}
        return outcome

    monkeypatch.setattr(Trainer, "train_on", dies)
    made = run(finetune_of(data, start, steps=60, revive="resample", revive_at=(0.0, 0.5), revive_tokens=10**9))
    table = made.read_table(REVIVED)
    assert set(table.step) <= {0, 30}
    assert not set(DEAD) & set(table.feature[table.step == 0])
    later = table[table.step == 30]
    assert set(DEAD) <= set(later.feature)
    assert made.manifest.figures["revived"] == len(table)

    (before, moments), (after, moments_after) = seen["after 30"], seen[30]
    new = later.feature.tolist()
    rest = [i for i in range(F) if i not in new]
    for name in ("W_enc", "b_enc", "W_dec"):
        old, now = (getattr(s, name).T if name == "W_enc" else getattr(s, name) for s in (before, after))
        assert torch.equal(old[rest], now[rest])
        first, then = (
            m[f"adam.{name}.exp_avg_sq"].T if name == "W_enc" else m[f"adam.{name}.exp_avg_sq"] for m in (moments, moments_after)
        )
        assert torch.equal(first[rest], then[rest])
        assert not then[new].any()
    x16 = x.bfloat16()
    for row in later.itertuples():  # along the residual of the dictionary as it was then, at an input of the training order
        stream = torch.cat(list(batches(reader(x, 512), Order(0, (512,) * 4), 256, 0, 8)))
        token = stream[row.token].float()
        residual = token - before.decode(before.encode(token[None]))[0]
        cosine = torch.nn.functional.cosine_similarity(residual, after.W_dec[row.feature], dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)
    last = SAE.load(made)
    assert (last.encode(x16)[:, list(DEAD)] > 0).any(0).sum() >= len(DEAD) - 1


@pytest.mark.parametrize("at", [(), (0.5, 0.0), (0.2, 0.2), (1.0,), (-0.1,), (float("nan"),)])
def test_revivals_are_ascending_shares_of_the_steps(at, store, stored, planted):
    data = stored(store, planted(512, D, 32)[0])
    with pytest.raises(ValueError, match="expected ascending shares of the steps"):
        finetune_of(data, Ref("dictionaries/" + 20 * "a"), revive_at=at)


def test_an_anchor_draws_a_renewed_feature_to_its_new_weights(planted, reader):
    x, _ = planted(640, D, 32)
    start = trained(x, reader, steps=20)
    trainer = Trainer(start, budget_of(10), 10, False, torch.float32, anchor=1e9)
    other = start.copy()
    other.W_dec[4], other.W_enc[:, 4], other.b_enc[4] = 0.3, 0.2, 0.1
    other.W_dec[5] = 9.0
    trainer.renew(other, torch.tensor([4]))
    trainer.train_on(x[:64])
    made = trainer.dictionary()
    assert made.W_dec[4].tolist() == pytest.approx([0.3] * D, abs=1e-4)
    assert made.W_enc[:, 4].tolist() == pytest.approx([0.2] * D, abs=1e-4)
    assert torch.allclose(made.W_dec[5], start.W_dec[5], atol=1e-4), "features that are not named stay"


def test_where_nothing_is_dead_nothing_is_revived(store, run, stored, planted, reader):
    x, _ = planted(1024, D, 32)
    data = stored(store, x)
    start = put(store, data, fresh(config_of(), *measure(reader(x, 512)), 0))
    plain, revived = (run(finetune_of(data, start, steps=5, revive=r)) for r in ("none", "resample"))
    assert revived.manifest.figures["revived"] == len(revived.read_table(REVIVED)) == 0
    assert files(plain)[WEIGHTS] == files(revived)[WEIGHTS]


def test_revive_tokens_bound_what_is_looked_at(store, run, stored, planted, reader, monkeypatch):
    """A feature that fires in the order's later part only is dead to one who looks at the first part, whatever is held at once."""
    monkeypatch.setattr(train, "EVALUATED_VALUES", 100 * F)
    monkeypatch.setattr(train, "FEWEST_TOKENS", 1)
    x, _ = planted(2048, D, 32)
    data = stored(store, x)
    stream = torch.cat(list(batches(reader(x, 512), Order(0, (512,) * 4), 256, 0, 8)))
    sae = trained(x, reader, steps=100)
    late = fires_late(sae, stream, 600)
    first = int((sae.encode(stream)[:, late] > 0).nonzero()[0])
    assert first % 100, "the last batch is cut short"
    start = put(store, data, sae)
    for tokens, is_dead in ((first, True), (first + 1, False), (10**9, False)):
        table = run(finetune_of(data, start, steps=1, revive="resample", revive_tokens=tokens)).read_table(REVIVED)
        assert (late in table.feature.tolist()) == is_dead
        assert (table.token < min(tokens, len(x))).all()


# Kills


def everything(store, stored, planted, reader, architecture: str, steps: int, **more) -> FinetuneSpec:
    """All settings at once, from a start with dead features that kept its optimiser. Puts what it reads into the store."""
    x, _ = planted(1536, D, 32)
    trainer = training(x, reader, architecture, steps=40)
    start = put(store, stored(store, x), killed(trainer.dictionary()), trainer.optimiser_state())
    on = {"rescale": True, "optimiser": "carried", "keep_optimiser": True, "anchor": 0.5, "revive": "resample", "revive_tokens": 500}
    on["revive_at"] = (0.0, 0.5)
    return finetune_of(stored(store, 3 * x, name="other"), start, steps, **on, **more)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_finetune_with_everything_that_died_goes_on_bit_by_bit(
    architecture, store, run, stored, planted, reader, tmp_path, quiet, monkeypatch
):
    """Killed while it revives, before the first checkpoint and after: the same bytes, and nothing is revived once a checkpoint holds it."""
    spec = everything(store, stored, planted, reader, architecture, 120, checkpoint_tokens=64 * 25)
    whole = run(spec)
    assert {OPTIMISER, REVIVED, WEIGHTS} <= set(whole.names())
    assert whole.manifest.figures["revived"] >= len(DEAD)

    other = Store(str(tmp_path / "other"))
    assert everything(other, stored, planted, reader, architecture, 120, checkpoint_tokens=64 * 25) == spec
    step, revive, events = Trainer.train_on, train.resample, []

    def dying_step(self, batch):
        events.append(self.step)
        if len(events) in (6, 40, 75, 95):
            raise KeyboardInterrupt
        return step(self, batch)

    def dying_revival(sae, read, *rest):
        events.append("revive")
        if len(events) == 1:
            next(iter(read()))
            raise KeyboardInterrupt
        return revive(sae, read, *rest)

    monkeypatch.setattr(Trainer, "train_on", dying_step)
    monkeypatch.setattr(train, "resample", dying_revival)
    deaths = 0
    while not other.artifact(spec.ref).is_complete:
        try:
            steps.run(spec, other, device="cpu", progress=quiet)
        except KeyboardInterrupt:
            deaths += 1
        assert deaths < 10
    assert deaths == 5
    assert events.count("revive") == 5, (
        "in the first run, which died there, the second, which died in step 3, the third; half-way in two more"
    )
    assert files(other.artifact(spec.ref)) == files(whole)
    assert other.artifact(spec.ref).manifest.figures == whole.manifest.figures


@pytest.mark.slow
def test_a_killed_finetune_process_that_is_run_again_gives_the_same_bytes(tmp_path, stored, planted, reader, quiet):
    undisturbed, dying = (Store(str(tmp_path / name)) for name in "ab")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes: the number of threads belongs to the numerics class
    specs = [everything(s, stored, planted, reader, "relu", 800, checkpoint_tokens=64 * 50) for s in (undisturbed, dying)]
    spec = specs[0]
    assert spec == specs[1]
    steps.run(spec, undisturbed, device="cpu", progress=quiet)
    torch.set_num_threads(threads)

    command = [sys.executable, "-c", PROCESS, spec.model_dump_json(), dying.root]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "b" / spec.ref
    while process.poll() is None and not any("training" in p.parts for p in folder.rglob("*.safetensors")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not dying.artifact(spec.ref).is_complete, "it died on the way"
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert files(dying.artifact(spec.ref)) == files(undisturbed.artifact(spec.ref))
    assert dying.artifact(spec.ref).verify() == []
    assert len(dying.artifact(spec.ref).manifest.writers) == 2


def test_a_checkpoint_written_before_revival_existed_is_continued(store, run, stored, planted, quiet, monkeypatch, tmp_path):
    """Its meta is empty."""
    from stagediff.store.training import TrainingCheckpoints

    x, _ = planted(512, D, 32)
    spec = train_of(stored(store, x), steps=40, checkpoint_tokens=64 * 10)
    whole = run(spec)
    other = Store(str(tmp_path / "other"))
    stored(other, x)
    saving, step = TrainingCheckpoints.save, Trainer.train_on

    def dies(self, batch):
        if self.step == 25:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(TrainingCheckpoints, "save", lambda self, step, tensors, meta: saving(self, step, tensors, {}))
    monkeypatch.setattr(Trainer, "train_on", dies)
    with pytest.raises(KeyboardInterrupt):
        steps.run(spec, other, device="cpu", progress=quiet)
    monkeypatch.setattr(Trainer, "train_on", step)
    steps.run(spec, other, device="cpu", progress=quiet)
    assert files(other.artifact(spec.ref)) == files(whole)
    assert other.artifact(spec.ref).manifest.figures["revived"] == 0


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_auxk_where_it_would_do_nothing_is_refused(architecture):
    with pytest.raises(ValueError, match=f"auxk is 8, but {architecture} has no AuxK"):
        DictionaryConfig(architecture=architecture, auxk=8)
    DictionaryConfig(architecture=architecture, auxk=0)
