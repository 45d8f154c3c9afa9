"""relu and jumprelu over their active features: the same step as the dense algebra's, taken where it is sparse enough.

That the dense algebra is right is the business of test_gradients.py (autograd in float64)."""

import pytest
import torch
from torch import Tensor

from stagediff.sae.dictionary import ARCHITECTURES, resolved
from stagediff.sae.gradients import Context
from stagediff.sae.initial import fresh, measure
from stagediff.sae.sparse import thresholded
from stagediff.sae.sparse.cpu import NumbaKernels
from stagediff.sae.sparse.kernels import KERNELS, choose_for_thresholds
from stagediff.sae.sparse.pairs import Pairs
from stagediff.sae.sparse.reference import Reference
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

CPU = torch.device("cpu")
SETS = [Reference, NumbaKernels]
BOTH = ["relu", "jumprelu"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "F"), [(5, 33), (130, 100), (3, 1024), (1, 7)])
def test_what_passes_the_floor_is_found(kernels, dtype, n, F):
    pre = torch.randn(n, F, generator=torch.Generator().manual_seed(F)).to(dtype)
    floor = torch.randn(F, generator=torch.Generator().manual_seed(1)).abs()
    pre[0] = -1.0
    pre[-1, 0] = floor[0] = 0.25  # equal is not above
    pre[-1, F - 1] = 50.0
    counts, feature, value = kernels().above(pre, floor, n * F)
    expected = [(t, f, float(pre[t, f])) for t in range(n) for f in range(F) if float(pre[t, f]) > float(floor[f])]
    assert counts.tolist() == [sum(t == row for t, _, _ in expected) for row in range(n)]
    assert feature is not None
    assert value is not None
    assert list(zip(feature.tolist(), value.tolist(), strict=True)) == [(f, v) for _, f, v in expected]
    assert kernels().above(pre, floor, len(expected) - 1)[1] is None


def parameters(architecture: str, d: int, F: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    W_dec = torch.randn(F, d, generator=g, dtype=dtype) / d**0.5
    found = {
        "W_enc": W_dec.t() + 0.1 * torch.randn(d, F, generator=g, dtype=dtype),
        "b_enc": 0.3 * torch.randn(F, generator=g, dtype=dtype) - 0.5,
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(d, generator=g, dtype=dtype),
    }
    found["b_enc"][3] = -100.0  # never fires
    if architecture == "jumprelu":
        found["log_threshold"] = torch.randn(F, generator=g, dtype=dtype) * 0.3 - 1.5
    return found


def batch(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("focus", [None, lambda squares: squares.square() / 100])
@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("architecture", BOTH)
def test_pairs_give_the_dense_steps_gradients(architecture, norm, subtract, kernels, focus, monkeypatch):
    """In fp32 to rounding; plain torch in float64 to 1e-12."""
    monkeypatch.setattr(thresholded, "SPARSE_BELOW", 1.0)
    d, F, n, weight = 12, 70, 400, 0.7
    for dtype, tolerance in ((torch.float32, 2e-5), *(((torch.float64, 1e-12),) if kernels is Reference else ())):
        options = {"bandwidth": 0.3} if architecture == "jumprelu" else {}
        config = resolved(DictionaryConfig(architecture=architecture, features=F, decoder_norm=norm, subtract_b_dec=subtract, **options), d)
        start = parameters(architecture, d, F, dtype)
        if norm == "unit":
            start["W_dec"] /= start["W_dec"].norm(dim=1, keepdim=True)
        x = batch(n, d, dtype)
        with torch.no_grad():
            expected = ARCHITECTURES[architecture].gradient(start, x, Context(config, weight, dtype, focus=focus))
            engine = thresholded.Engine({k: v.clone() for k, v in start.items()}, config, Budget(tokens=1), dtype, kernels(), focus=focus)
            found = engine.gradient(x, weight, None)
        assert isinstance(found.f, Pairs)
        assert set(found.gradients) == set(expected.gradients)
        for name, there in expected.gradients.items():
            here = found.gradients[name]
            assert here.shape == there.shape
            assert float((here - there).abs().max()) <= tolerance * float(there.abs().max()), name
            assert float(there.abs().max()) > 0, name
        for name in ("loss", "error", "sparsity", "l0"):
            assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=max(tolerance, 1e-9)), name
        assert torch.equal(found.fired, expected.fired)
        assert not found.fired.all()


@pytest.mark.parametrize("dense_from", [0, 300])
@pytest.mark.parametrize("architecture", BOTH)
def test_a_batch_with_too_many_is_the_dense_algebras(architecture, dense_from):
    """From the first tokens on, or only after those by which it is judged."""
    d, F, n = 12, 320, 600
    config = resolved(DictionaryConfig(architecture=architecture, features=F), d)
    start = parameters(architecture, d, F)
    start["b_enc"] -= 1.0
    x = 0.1 * batch(n, d)
    x[dense_from:] *= 100
    with torch.no_grad():
        expected = ARCHITECTURES[architecture].gradient(start, x, Context(config, 0.5, torch.float32))
        engine = thresholded.Engine({k: v.clone() for k, v in start.items()}, config, Budget(tokens=1), torch.float32, NumbaKernels())
        found, few = engine.gradient(x, 0.5, None), engine.gradient(x[:dense_from], 0.5, None) if dense_from else None
    assert isinstance(found.f, Tensor)
    assert few is None or isinstance(few.f, Pairs)
    for name, there in expected.gradients.items():
        assert float((found.gradients[name] - there).abs().max()) <= 1e-6 * float(there.abs().max()), name


def trained(architecture: str, data, steps: int, is_sparse: bool, compute=torch.bfloat16, n: int = 64) -> tuple[Trainer, Tensor, int]:
    more = {"l1": 0.5} if architecture == "jumprelu" else {"l1": 6.0}
    config = DictionaryConfig(architecture=architecture, features=512, **more)
    options = {"kernels": NumbaKernels()} if is_sparse else {"gradient": ARCHITECTURES[architecture].gradient}
    trainer = Trainer(fresh(config, *measure(data), 0), Budget(tokens=steps * n, batch=n, lr=2e-3), steps, True, compute, **options)
    x, outcomes = data.x.float(), []
    for i in range(steps):
        outcomes.append(trainer.train_on(x[torch.arange(i * n, i * n + n) % len(x)]))
    return trainer, torch.stack([o.loss for o in outcomes]), sum(isinstance(o.f, Pairs) for o in outcomes)


@pytest.mark.parametrize("architecture", BOTH)
def test_five_hundred_steps_follow_the_dense_algebra(architecture, planted, reader):
    torch.set_num_threads(1)
    data = reader(planted(10_000, 24, 64, scale=20.0)[0], 5000)
    _, expected, _ = trained(architecture, data, 500, False)
    _, found, sparse = trained(architecture, data, 500, True)
    assert 100 < sparse < 500, "it begins dense and becomes sparse"
    for first in range(0, 500, 50):
        here, there = found[first : first + 50].mean(), expected[first : first + 50].mean()
        assert float(here) == pytest.approx(float(there), rel=0.02), first


@pytest.mark.parametrize("architecture", BOTH)
def test_threads_repetition_and_a_restart_change_no_byte(architecture, planted, reader):
    data = reader(planted(10_000, 24, 64, scale=20.0)[0], 1000)
    states = []
    for threads in (1, 4, 4):
        torch.set_num_threads(threads)
        trainer, _, sparse = trained(architecture, data, 300, True)
        states.append({name: value.clone(memory_format=torch.contiguous_format) for name, value in trainer.state().items()})
        assert sparse
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    again, _, _ = trained(architecture, data, 1, True)
    again.restore(300, states[0])
    for one in (trainer, again):
        one.steps = 400
        for i in range(5):
            outcome = one.train_on(data.x[i * 64 : i * 64 + 64])
            assert isinstance(outcome.f, Pairs)
    assert all(torch.equal(value, again.state()[name]) for name, value in trainer.state().items())
    assert set(again.optimiser_state()) == set(trained(architecture, data, 1, False)[0].optimiser_state())


def test_it_is_for_cpus_with_compiled_kernels(monkeypatch):
    monkeypatch.delenv(KERNELS, raising=False)
    assert isinstance(choose_for_thresholds(CPU, torch.bfloat16), NumbaKernels)
    assert choose_for_thresholds(torch.device("meta"), torch.bfloat16) is None
    assert choose_for_thresholds(CPU, torch.float64) is None
    monkeypatch.setenv(KERNELS, "reference")
    assert choose_for_thresholds(CPU, torch.bfloat16) is None
