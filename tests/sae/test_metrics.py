"""Quality figures against plain float64 formulas."""

import numpy as np
import pytest
import torch

from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.metrics import Meter, evaluate
from stagediff.sae.spec import DictionaryConfig


def dictionary(d: int = 6, F: int = 20, architecture: str = "relu", scale: float = 0.5) -> SAE:
    g = torch.Generator().manual_seed(3)
    config = resolved(DictionaryConfig(architecture=architecture, features=F, k=3), d)
    b_enc = torch.randn(F, generator=g) - 0.5
    b_enc[4] = -1e6  # dead
    return SAE(torch.randn(d, F, generator=g), b_enc, torch.randn(F, d, generator=g), torch.randn(d, generator=g), config, scale)


def test_figures_equal_their_definitions():
    sae, x = dictionary(), 3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 10
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, n).double().numpy() for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    inner = x.double().numpy() * 0.5
    f = np.maximum(inner @ W_enc + b_enc, 0)
    x_hat = (f @ W_dec + b_dec) / 0.5
    error = ((x_hat - x.double().numpy()) ** 2).sum()
    total = ((x.double().numpy() - x.double().numpy().mean(0)) ** 2).sum()
    quality = evaluate(sae, x.split(64))
    assert quality.explained_variance == pytest.approx(1 - error / total, rel=1e-4)
    assert quality.mse == pytest.approx(error / 500, rel=1e-5)
    assert quality.l0 == pytest.approx((f > 0).sum(1).mean())
    assert quality.dead == pytest.approx((~(f > 0).any(0)).mean())
    assert quality.dead > 0
    assert quality.tokens == 500


@pytest.mark.parametrize("size", [1, 7, 100, 500])
def test_figures_do_not_depend_on_how_the_data_are_cut(size):
    sae, x = dictionary(), torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert evaluate(sae, x.split(size)) == pytest.approx(evaluate(sae, x.split(500)), rel=1e-6)


def test_the_mean_predictor_explains_nothing_and_the_data_everything():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) + 1000
    for x_hat, expected in ((x.mean(0).expand_as(x), 0.0), (x, 1.0)):
        meter = Meter(2, 3)
        for part, hat in zip(x.split(30), x_hat.split(30), strict=True):
            meter.add(part, hat, torch.zeros(len(part), 2))
        assert meter.result().explained_variance == pytest.approx(expected, abs=1e-5)


def test_input_scale_and_decoder_norm_do_not_change_directions():
    sae = dictionary()
    assert torch.allclose(sae.directions().norm(dim=1), torch.ones(20))
    assert torch.allclose(sae.directions() * sae.decoder_norms()[:, None], sae.W_dec)
