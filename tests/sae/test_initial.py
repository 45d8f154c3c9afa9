"""The start: scale, mean, tied weights."""

import math

import pytest
import torch

from stagediff.errors import UserError
from stagediff.sae.initial import fresh, measure
from stagediff.sae.spec import DictionaryConfig


def test_scaled_inputs_have_mean_norm_sqrt_d(planted, reader):
    x, _ = planted(6_000, 24, 32, scale=123.0)
    data = reader(x, 1000)
    scale, mean = measure(data)
    assert float((data.x.double() * scale).norm(dim=1).mean()) == pytest.approx(math.sqrt(24), rel=1e-9)
    assert torch.allclose(mean, data.x.double().mean(0))


def test_only_the_first_shards_are_measured(planted, reader):
    x, _ = planted(6_000, 24, 32)
    data = reader(x, 1000)
    scale, mean = measure(data, tokens=1500)
    assert data.reads == [0, 1]
    assert torch.allclose(mean, data.x[:1500].double().mean(0))
    assert scale == pytest.approx(math.sqrt(24) / float(data.x[:1500].double().norm(dim=1).mean()))


@pytest.mark.parametrize("x", [torch.zeros(50, 4), torch.full((50, 4), float("nan")), torch.zeros(0, 4)])
def test_data_without_a_scale_is_refused(x, reader):
    with pytest.raises(UserError, match="trained on"):
        measure(reader(x, 10))


@pytest.mark.parametrize(("architecture", "norm"), [("relu", 0.1), ("topk", 1.0), ("batchtopk", 1.0), ("jumprelu", 1.0)])
def test_weights_are_tied_random_directions(architecture, norm):
    sae = fresh(DictionaryConfig(architecture=architecture, features=4000, k=3), 2.0, torch.ones(16), seed=4)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert torch.allclose(sae.decoder_norms(), torch.full((4000,), norm))
    unit = sae.directions()
    assert unit.mean(0).abs().max() < 0.03, "directions on all sides: normal, not uniform on [0, 1]"
    assert torch.allclose(sae.b_dec, torch.full((16,), 2.0)), "the mean, in scaled units"
    assert torch.allclose((unit.T @ unit) / 4000, torch.eye(16) / 16, atol=0.01)
    other = fresh(DictionaryConfig(architecture=architecture, features=4000, k=3), 2.0, torch.ones(16), seed=5)
    assert not torch.equal(sae.W_dec, other.W_dec)


def test_the_start_is_the_same_function_whether_b_dec_is_subtracted_or_not():
    mean, x = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.randn(30, 16)
    one, other = (fresh(DictionaryConfig(features=64, subtract_b_dec=s), 1.5, mean, 0) for s in (True, False))
    assert torch.allclose(one.encode(x), other.encode(x), atol=1e-5)


def test_widths_and_k_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="k is 33"):
        DictionaryConfig(architecture="topk", features=32, k=33)
    DictionaryConfig(architecture="relu", features=16, k=32)
    with pytest.raises(ValueError, match="architecture"):
        DictionaryConfig(architecture="gated")
    with pytest.raises(ValueError, match="features"):
        DictionaryConfig(features=0)
