"""Every architecture's hand-written gradients against autograd in float64, from losses written down independently."""

import pytest
import torch

from stagediff.sae.dictionary import ARCHITECTURES, resolved
from stagediff.sae.gradients import Context, Gradient
from stagediff.sae.sparse.pairs import Pairs
from stagediff.sae.spec import DictionaryConfig

B, D, F, K = 12, 6, 20, 4


def parameters(config: DictionaryConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    p = {"W_enc": normal(D, F), "b_enc": 0.3 * normal(F), "W_dec": normal(F, D), "b_dec": normal(D)}
    if config.decoder_norm == "unit":
        p["W_dec"] /= p["W_dec"].norm(dim=1, keepdim=True)
    if config.architecture == "jumprelu":
        p["log_threshold"] = 0.5 * normal(F) - 1
    return p


def batch(seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activations(outcome: Gradient) -> torch.Tensor:
    return outcome.f.dense(F) if isinstance(outcome.f, Pairs) else outcome.f


def pre_activations(p, x, config):
    return (x - p["b_dec"] if config.subtract_b_dec else x) @ p["W_enc"] + p["b_enc"]


def squared_errors(p, x, f):
    return ((f @ p["W_dec"] + p["b_dec"] - x) ** 2).sum(1)


# Each gives every token's loss [B], and what belongs to the batch.


def relu_loss(p, x, config, weight, dead):
    f = pre_activations(p, x, config).clamp_min(0)
    return squared_errors(p, x, f) + weight * (f * p["W_dec"].norm(dim=1)).sum(1), 0.0


def row_by_row(pre, k):
    chosen = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        for j in sorted(range(len(row)), key=lambda j: -row[j].item())[:k]:
            chosen[i, j] = 1
    return pre.clamp_min(0) * chosen


def aux_loss(p, x, f, pre, config, dead):
    """Gao et al.: the residual is a constant, and the auxiliary reconstruction has no b_dec."""
    if dead is None or not config.auxk:
        return 0.0
    residual = (x - (f @ p["W_dec"] + p["b_dec"])).detach()
    f_aux = row_by_row(pre[:, dead], min(config.auxk, len(dead)))
    return config.auxk_weight * ((residual - f_aux @ p["W_dec"][dead]) ** 2).sum(1).mean()


def topk_loss(p, x, config, weight, dead):
    pre = pre_activations(p, x, config)
    f = row_by_row(pre, config.k)
    return squared_errors(p, x, f), aux_loss(p, x, f, pre, config, dead)


def batchtopk_loss(p, x, config, weight, dead):
    pre = pre_activations(p, x, config)
    flat = sorted(pre.flatten().tolist(), reverse=True)
    f = pre.clamp_min(0) * (pre >= flat[config.k * len(x) - 1])
    return squared_errors(p, x, f), aux_loss(p, x, f, pre, config, dead)


class Jump(torch.autograd.Function):
    """z H(z - theta) with the paper's pseudo-derivative in theta."""

    @staticmethod
    def forward(ctx, z, theta, width):
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.width).abs() < 0.5).to(g)
        return g * (z > theta), -(theta / ctx.width * kernel * g).sum(0), None


class Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, theta, width):
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.width).abs() < 0.5).to(g)
        return None, -(kernel * g / ctx.width).sum(0), None


def jumprelu_loss(p, x, config, weight, dead):
    pre, theta = pre_activations(p, x, config), p["log_threshold"].exp()
    f = Jump.apply(pre, theta, config.bandwidth)
    return squared_errors(p, x, f) + weight * Heaviside.apply(pre, theta, config.bandwidth).sum(1), 0.0


LOSSES = {"relu": relu_loss, "topk": topk_loss, "batchtopk": batchtopk_loss, "jumprelu": jumprelu_loss}
CASES = [
    (name, norm, subtract, dead)
    for name in LOSSES
    for norm in ("free", "unit")
    for subtract in (True, False)
    for dead in ((None, [1, 5, 6, 7, 11, 13]) if name in ("topk", "batchtopk") else (None,))
]


@pytest.mark.parametrize("focus", [False, True])
@pytest.mark.parametrize(("name", "norm", "subtract", "dead"), CASES)
def test_gradients_equal_autograd_in_float64(name, norm, subtract, dead, focus):
    """With a focus the tokens' losses are weighted by a function of their errors, through which no gradient goes; reported is the plain mean."""
    auxk = 3 if "topk" in name else None
    config = DictionaryConfig(
        architecture=name, features=F, k=K, auxk=auxk, auxk_weight=0.4, bandwidth=0.7, decoder_norm=norm, subtract_b_dec=subtract
    )
    config = resolved(config, D)
    p, x, weight = parameters(config), batch(), 0.37
    dead = None if dead is None else torch.tensor(dead)
    plain = ARCHITECTURES[name].gradient(p, x, Context(config, weight, torch.float64, dead))
    counts = torch.ones(B, dtype=torch.float64)
    if focus:
        counts = squared_errors(p, x, activations(plain)).pow(1.5)
    outcome = ARCHITECTURES[name].gradient(p, x, Context(config, weight, torch.float64, dead, focus=(lambda s: s**1.5) if focus else None))

    q = {key: value.clone().requires_grad_() for key, value in p.items()}
    tokens, of_batch = LOSSES[name](q, x, config, weight, dead)
    ((counts * tokens).mean() + of_batch).backward()
    assert torch.allclose(outcome.loss, (tokens.mean() + of_batch).detach(), rtol=1e-12)
    assert set(outcome.gradients) == set(q)
    for key, value in q.items():
        expected = value.grad
        if key == "W_dec" and norm == "unit":  # only directions are learned
            expected = expected - (expected * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
        assert expected.abs().max() > 0, key
        assert torch.allclose(outcome.gradients[key], expected, rtol=1e-10, atol=1e-12), key


@pytest.mark.parametrize("name", LOSSES)
def test_every_term_of_the_loss_reaches_the_weights(name):
    """An autograd function that drops an incoming gradient passes a test of one term alone: take each term's weight to 0 and compare."""
    auxk = 3 if "topk" in name else None
    config = resolved(DictionaryConfig(architecture=name, features=F, k=K, auxk=auxk, bandwidth=0.7), D)
    p, x = parameters(config), batch()
    dead = torch.tensor([0, 3, 8]) if config.auxk else None
    both = ARCHITECTURES[name].gradient(p, x, Context(config, 0.5, torch.float64, dead)).gradients
    error_only = ARCHITECTURES[name].gradient(p, x, Context(config, 0.0, torch.float64, None)).gradients
    changed = {key for key in both if not torch.allclose(both[key], error_only[key])}
    expected = {
        "relu": {"W_enc", "b_enc", "W_dec"} - ({"W_dec"} if config.decoder_norm == "unit" else set()),
        "topk": {"W_enc", "b_enc", "W_dec", "b_dec"},
        "batchtopk": {"W_enc", "b_enc", "W_dec", "b_dec"},
        "jumprelu": {"log_threshold"},
    }
    assert changed == expected[name]


@pytest.mark.parametrize("name", LOSSES)
def test_reported_figures_are_those_of_the_batch(name):
    config = resolved(DictionaryConfig(architecture=name, features=F, k=K), D)
    p, x = parameters(config), batch()
    outcome = ARCHITECTURES[name].gradient(p, x, Context(config, 0.25, torch.float64))
    f = activations(outcome)
    assert torch.allclose(outcome.l0, (f > 0).double().sum(1).mean().to(outcome.l0))
    assert torch.allclose(outcome.error, squared_errors(p, x, f).mean())
    assert torch.equal(outcome.fired, (f > 0).any(0))
    expected = {"relu": (f * p["W_dec"].norm(dim=1)).sum(1).mean(), "jumprelu": (f > 0).double().sum(1).mean()}
    assert torch.allclose(outcome.sparsity, expected.get(name, torch.zeros((), dtype=torch.float64)))


def test_topk_keeps_exactly_k_where_values_tie():
    config = resolved(DictionaryConfig(architecture="topk", features=F, k=K), D)
    p = parameters(config)
    p["W_enc"][:] = 0
    p["b_enc"][:] = 1.0  # all pre-activations are equal
    f = activations(ARCHITECTURES["topk"].gradient(p, batch(), Context(config, 0.0, torch.float64)))
    assert (f > 0).sum(1).tolist() == [K] * B


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_gradients_point_where_fp32_ones_do(name):
    config = resolved(DictionaryConfig(architecture=name, features=256, k=8, bandwidth=0.5), 64)
    g = torch.Generator().manual_seed(0)
    W_dec = torch.randn(256, 64, generator=g)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    p = {"W_enc": W_dec.t().contiguous(), "b_enc": torch.zeros(256), "W_dec": W_dec, "b_dec": torch.zeros(64)}
    if name == "jumprelu":
        p["log_threshold"] = torch.full((256,), 0.5).log()
    x = torch.randn(512, 64, generator=g)
    grads = [ARCHITECTURES[name].gradient(p, x, Context(config, 1.0, t)).gradients for t in (torch.bfloat16, torch.float32)]
    for key in grads[1]:
        assert grads[0][key].dtype == torch.float32, "master gradients must not be bf16"
        cosine = torch.nn.functional.cosine_similarity(grads[0][key].flatten(), grads[1][key].flatten(), dim=0)
        assert cosine > (0.95 if key == "log_threshold" else 0.985), (key, float(cosine))
