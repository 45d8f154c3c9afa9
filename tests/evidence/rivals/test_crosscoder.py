"""The crosscoder's loss and gradients against autograd in float64, its start, its scales, and what it learns from planted activations."""

import json

import pytest
import torch

from stagediff import steps
from stagediff.errors import UserError
from stagediff.evidence.rivals.crosscoder import for_raw_units, from_raw_units, gradient, measure_apart, start, tie
from stagediff.evidence.rivals.readers import Differences, SideBySide
from stagediff.evidence.rivals.spec import CrosscoderSpec, DifferenceSpec, LatentsSpec
from stagediff.lm.activations import ActivationReader
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.gradients import Context
from stagediff.sae.spec import Budget, DictionaryConfig

D, F, N, SHARED = 6, 11, 40, 4


def parameters(seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (2 * D, F), "b_enc": (F,), "W_dec": (F, 2 * D), "b_dec": (2 * D,)}
    p = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    tie(p["W_dec"], SHARED)
    return p


def reference(p, x, weight, shared_weight) -> torch.Tensor:
    """Every token's loss [N] written out, with the shared rows as one parameter."""
    one = p["one"]
    W_dec = torch.cat([torch.cat([one, one], 1), p["W_dec"][SHARED:]])
    f = (x @ p["W_enc"] + p["b_enc"]).relu()
    error = (f @ W_dec + p["b_dec"] - x).square().sum(1)
    cost = W_dec[:, :D].norm(dim=1) + W_dec[:, D:].norm(dim=1)
    weights = torch.ones(F, dtype=torch.float64)
    weights[:SHARED] = shared_weight
    return error + weight * (f * (weights * cost)).sum(1)


@pytest.mark.parametrize("counts", [None, torch.linspace(0, 2, N, dtype=torch.float64)])
@pytest.mark.parametrize("shared_weight", [0.2, 1.0])
def test_loss_and_gradients_are_autograds(shared_weight, counts):
    """`counts`: what each token counts, where there is a focus."""
    x = torch.randn(N, 2 * D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = parameters()
    config = resolved(DictionaryConfig(features=F), 2 * D)
    focus = None if counts is None else lambda squares: counts
    ours = gradient(p, x, Context(config, 0.7, torch.float64, focus=focus), SHARED, shared_weight)
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()} | {"one": p["W_dec"][:SHARED, :D].clone().requires_grad_()}
    tokens = reference(leaves, x, 0.7, shared_weight)
    (tokens if counts is None else counts * tokens).mean().backward()
    torch.testing.assert_close(ours.loss, tokens.mean().detach(), rtol=1e-12, atol=0)
    for name in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(ours.gradients[name], leaves[name].grad, rtol=1e-9, atol=1e-11)
    W_dec = ours.gradients["W_dec"]
    torch.testing.assert_close(W_dec[SHARED:], leaves["W_dec"].grad[SHARED:], rtol=1e-9, atol=1e-11)
    for half in (W_dec[:SHARED, :D], W_dec[:SHARED, D:]):
        torch.testing.assert_close(half, leaves["one"].grad, rtol=1e-9, atol=1e-11)


def test_a_latent_of_one_model_costs_half_of_one_of_both():
    p = {name: torch.zeros_like(value) for name, value in parameters().items()}
    p["b_enc"][SHARED:] = 1.0
    config = resolved(DictionaryConfig(features=F), 2 * D)
    p["W_dec"][SHARED, 0] = p["W_dec"][SHARED + 1, 0] = p["W_dec"][SHARED + 1, D] = 1.0
    outcome = gradient(p, torch.zeros(N, 2 * D, dtype=torch.float64), Context(config, 1.0, torch.float64), SHARED, 1.0)
    assert float(outcome.sparsity) == pytest.approx(3.0)


def test_both_models_begin_with_one_direction_and_reconstruct_the_mean_alike():
    scale, mean = torch.linspace(1, 2, 2 * D), torch.randn(2 * D, dtype=torch.float64)
    sae = start(DictionaryConfig(features=F), scale, mean, 3)
    assert torch.equal(sae.W_dec[:, :D], sae.W_dec[:, D:])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((F,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    torch.testing.assert_close(sae.encode((mean * scale.double())[None].float()), torch.zeros(1, F), atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_folded_scales_leave_activations_as_they_are(architecture):
    scale = torch.cat([torch.full((D,), 2.0), torch.full((D,), 0.5)])
    sae = start(DictionaryConfig(architecture=architecture, features=F, k=3), scale, torch.randn(2 * D, dtype=torch.float64), 0)
    x = torch.randn(N, 2 * D)
    raw = for_raw_units(sae, scale)
    f = sae.encode(x * scale)
    torch.testing.assert_close(raw.encode(x), f)
    torch.testing.assert_close(raw.decode(f) * scale, sae.decode(f))
    again = from_raw_units(raw, scale)
    assert torch.equal(again.W_dec, sae.W_dec)  # powers of two: exact
    assert torch.equal(again.W_enc, sae.W_enc)


def test_two_models_side_by_side_and_their_difference(store, paired):
    of = paired(store)
    both, difference = SideBySide(store, of.base, of.finetuned), Differences(store, of.base, of.finetuned)
    one, other = (ActivationReader(store, data) for data in (of.base, of.finetuned))
    x, y = one.read_shard(0), other.read_shard(0)
    assert torch.equal(both.read_shard(0), torch.cat([x, y], 1))
    assert torch.equal(difference.read_shard(0), (y.double() - x.double()).bfloat16())
    assert (both.d, difference.d, both.shard_tokens(0)) == (2 * of.d, of.d, len(x))
    scale, mean = measure_apart(both)
    everything = torch.cat([both.read_shard(i) for i in range(both.n_shards)]).double()
    for half in (slice(0, of.d), slice(of.d, 2 * of.d)):
        assert float(scale[half][0]) == pytest.approx(of.d**0.5 / float(everything[:, half].norm(dim=1).mean()), rel=1e-6)
    torch.testing.assert_close(mean, everything.mean(0))


def test_activations_of_other_rows_are_refused(store, paired):
    of, other = paired(store), paired(store, seed=1)
    with pytest.raises(UserError, match="not of the same token rows"):
        SideBySide(store, of.base, other.finetuned)


def spec_of(kind, of, **changes):
    budget = Budget(tokens=64 * 600, batch=64, lr=5e-3)
    common = {"base": of.base, "finetuned": of.finetuned, "budget": budget, "compute": "fp32", "checkpoint_tokens": 64 * 400, **changes}
    if kind == "difference":
        return DifferenceSpec(dictionary=DictionaryConfig(features=16, l1=0.5), **common)
    if kind == "l1":
        return CrosscoderSpec(dictionary=DictionaryConfig(features=40, l1=0.5), shared=0.5, shared_l1=0.2, **common)
    return CrosscoderSpec(dictionary=DictionaryConfig(architecture="batchtopk", features=40, k=3), **common)


def latents_of(store, spec, of, quiet):
    held = LatentsSpec(dictionary=spec.ref, base=of.base, finetuned=of.finetuned)
    return store.artifact(steps.run(held, store, device="cpu", progress=quiet)).read_table("latents.parquet")


@pytest.mark.parametrize("kind", ["l1", "batchtopk"])
def test_a_direction_of_the_finetuned_model_alone_is_found_first(kind, store, paired, quiet):
    of = paired(store)
    spec = spec_of(kind, of)
    made = store.artifact(steps.run(spec, store, device="cpu", progress=quiet))
    latents = latents_of(store, spec, of, quiet)
    sae = SAE.load(made)
    alive = latents[latents.alive]
    first = int(alive.sort_values("relative_base_norm").feature.iloc[0])
    assert float(torch.nn.functional.normalize(sae.W_dec[first, of.d :], dim=0) @ of.own.float()) > 0.9
    assert latents.new_top[first] > 0.9
    assert abs(latents.nu_error[first]) < 0.1
    assert latents.nu[first] < 0.2
    assert alive.relative_base_norm.median() == pytest.approx(0.5, abs=0.02)
    assert alive.nu.median() == pytest.approx(1.0, abs=0.05)
    if kind == "l1":
        scales = made.read_json("scales.json")
        ratio = scales["base"] / scales["finetuned"]
        torch.testing.assert_close(sae.W_dec[:20, : of.d] * ratio, sae.W_dec[:20, of.d :], rtol=1e-5, atol=1e-7)
        assert (latents.relative_base_norm[:20] - 0.5).abs().max() < 1e-6


def test_the_difference_saes_strongest_latent_is_what_the_finetune_added(store, paired, quiet):
    of = paired(store)
    spec = spec_of("difference", of)
    made = store.artifact(steps.run(spec, store, device="cpu", progress=quiet))
    latents = latents_of(store, spec, of, quiet)
    first = int(latents[latents.alive].sort_values("energy_low").feature.iloc[0])
    assert float(SAE.load(made).directions()[first] @ of.own.float()) > 0.95
    assert latents.new_top[first] == 1.0
    assert json.loads(made.read_bytes("cfg.json"))["metadata"]["activations"] == "finetuned minus base"


def test_two_models_that_are_one_have_no_difference_to_learn(store, paired, quiet):
    of = paired(store)
    spec = spec_of("difference", of, finetuned=of.base)
    with pytest.raises(UserError, match="do not differ anywhere"):
        steps.run(spec, store, device="cpu", progress=quiet)


def test_an_architecture_that_no_crosscoder_has_is_refused(store, paired, quiet):
    of = paired(store)
    spec = spec_of("l1", of).model_copy(update={"dictionary": DictionaryConfig(architecture="topk", features=16, k=2)})
    with pytest.raises(UserError, match="relu or batchtopk"):
        steps.run(spec, store, device="cpu", progress=quiet)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["l1", "batchtopk", "difference"])
def test_a_training_that_is_continued_gives_the_same_bytes(kind, tmp_path, paired, quiet, monkeypatch):
    from stagediff.sae.trainer import Trainer
    from stagediff.store import Store

    undisturbed, killed = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    of = paired(undisturbed)
    paired(killed)
    spec = spec_of(kind, of, budget=Budget(tokens=64 * 60, batch=64, lr=3e-3), checkpoint_tokens=64 * 20)
    steps.run(spec, undisturbed, device="cpu", progress=quiet)
    whole = Trainer.train_on

    def dies(self, x):
        if self.step == 47:
            raise KilledError
        return whole(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_on", dies)
        with pytest.raises(KilledError):
            steps.run(spec, killed, device="cpu", progress=quiet)
    begun = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_on", lambda self, x: begun.append(self.step) or whole(self, x))
        steps.run(spec, killed, device="cpu", progress=quiet)
    assert begun[0] == 40
    bytes_of = [{f.path: f.crc32c for f in s.artifact(spec.ref).manifest.files} for s in (undisturbed, killed)]
    assert bytes_of[0] == bytes_of[1]
