"""Latent scaling's sums against its definition, token by token and latent by latent; and in cases whose answer is known."""

import pytest
import torch

from stagediff.evidence.rivals.scaling import LatentScaling
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.spec import DictionaryConfig

D, F, N = 5, 7, 60


def crosscoder(seed=0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, 2 * D, generator=g, dtype=torch.float64)
    config = resolved(DictionaryConfig(features=F), 2 * D)
    return SAE(W_dec.t().clone(), torch.zeros(F, dtype=torch.float64), W_dec, torch.randn(2 * D, generator=g, dtype=torch.float64), config)


def by_definition(sae, x, f) -> dict[str, list[float]]:
    """beta = d^T (Y^T f) / (||f||^2 ||d||^2) in loops."""
    found = {"nu": [], "nu_reconstruction": [], "nu_error": []}
    for i in range(F):
        d = sae.W_dec[i, D:]
        betas = {name: [] for name in found}
        for model in (slice(0, D), slice(D, 2 * D)):
            sums = dict.fromkeys(found, 0.0)
            for t in range(len(x)):
                whole = x[t, model] - sae.b_dec[model]
                explained = sum(f[t, j] * sae.W_dec[j, model] for j in range(F))
                left = whole - sum(f[t, j] * sae.W_dec[j, model] for j in range(F) if j != i)
                for name, y in (("nu", whole), ("nu_reconstruction", explained), ("nu_error", left)):
                    sums[name] += float(f[t, i] * (d @ y))
            for name in found:
                betas[name].append(sums[name] / float(f[:, i].square().sum() * d.square().sum()))
        for name, (base, finetuned) in betas.items():
            found[name].append(base / finetuned if finetuned > 0 else float("nan"))
    return found


def test_ratios_are_the_definitions():
    sae, g = crosscoder(), torch.Generator().manual_seed(1)
    x, f = torch.randn(N, 2 * D, generator=g, dtype=torch.float64), torch.rand(N, F, generator=g, dtype=torch.float64)
    scaling = LatentScaling(sae)
    for part in (slice(0, 25), slice(25, N)):
        scaling.add(x[part], f[part])
    ours = scaling.ratios()
    for name, values in by_definition(sae, x, f).items():
        torch.testing.assert_close(ours[name], torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_latent_the_base_model_uses_half_as_much_has_a_nu_of_a_half():
    sae = crosscoder()
    f = torch.zeros(N, F, dtype=torch.float64)
    f[:, 2] = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = sae.W_dec[2, D:]
    x = sae.b_dec + torch.cat([0.5 * f[:, 2:3] * d, f[:, 2:3] * d], 1)
    scaling = LatentScaling(sae)
    scaling.add(x, f)
    ratios = scaling.ratios()
    assert float(ratios["nu"][2]) == pytest.approx(0.5)
    assert float(ratios["nu_error"][2]) == pytest.approx(0.5)
    assert torch.isnan(ratios["nu"][[0, 1, 3, 4, 5, 6]]).all()  # never fired


def test_its_sums_can_be_stored():
    sae, g = crosscoder(), torch.Generator().manual_seed(1)
    x, f = torch.randn(N, 2 * D, generator=g, dtype=torch.float64), torch.rand(N, F, generator=g, dtype=torch.float64)
    first, second = LatentScaling(sae), LatentScaling(sae)
    first.add(x, f)
    second.load_state(first.state())
    for name, value in first.ratios().items():
        assert torch.equal(value.nan_to_num(-9), second.ratios()[name].nan_to_num(-9))
