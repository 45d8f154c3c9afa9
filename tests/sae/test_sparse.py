"""The sparse step: exact selection, each set of kernels against plain torch, and what a training on top of them promises.

That plain torch is right is the business of test_gradients.py (autograd in float64)."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import resolved
from stagediff.sae.initial import fresh, measure
from stagediff.sae.sparse import kernels as choice
from stagediff.sae.sparse.cpu import NumbaKernels
from stagediff.sae.sparse.cpu_bits import jitted
from stagediff.sae.sparse.engine import Engine
from stagediff.sae.sparse.kernels import KERNELS, Kernels, choose
from stagediff.sae.sparse.reference import Reference
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

CPU = torch.device("cpu")
TYPES = [torch.bfloat16, torch.float32]
SETS = [Reference, NumbaKernels]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def awkward(n: int, F: int, dtype: torch.dtype) -> Tensor:
    """Pre-activations with many ties; a row that ties altogether, one with no positive value, one with a single one."""
    pre = torch.randn(n, F, generator=torch.Generator().manual_seed(F)).to(dtype)
    pre[0] = 1.0
    pre[1] = -1.0
    pre[2] = -0.0
    pre[2, 5] = 0.5
    pre[3] = (pre[3] * 2).round() / 2
    return pre


def expected_pairs(values: Tensor, k: int) -> dict[int, float]:
    """Index -> value of the k largest positive of a vector, equal ones by index."""
    order = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:k]
    return {i: values[i].item() for i in order if values[i] > 0}


SIZES = [(6, 100, 7), (5, 33, 3), (5, 1000, 16), (4, 2048, 5), (5, 40, 40), (4, 700, 200)]


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "F", "k"), SIZES)
def test_the_k_largest_of_each_row_are_found_exactly(kernels, dtype, n, F, k):
    pre = awkward(n, F, dtype)
    feature, value = kernels().largest(pre, k)
    assert (feature.shape, feature.dtype, value.dtype) == ((n, k), torch.int32, torch.float32)
    for row, f, v in zip(pre, feature.tolist(), value.tolist(), strict=True):
        expected = expected_pairs(row, k)
        assert dict(zip(f[: len(expected)], v, strict=False)) == expected
        assert f[len(expected) :] == [F] * (k - len(expected)), "empty slots come last"
        assert not any(v[len(expected) :])


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "F", "k"), SIZES)
def test_the_k_b_largest_of_a_batch_are_found_exactly(kernels, dtype, n, F, k):
    pre = awkward(n, F, dtype)
    count = n * k
    pairs, smallest = kernels().largest_of_all(pre, count)
    expected = expected_pairs(pre.flatten(), count)
    used = pairs.value > 0
    found = {int(t) * F + int(f): float(v) for t, f, v in zip(pairs.token[used], pairs.feature[used], pairs.value[used], strict=True)}
    assert found == expected
    assert len(pairs.value) == count
    assert (pairs.feature[~used] == F).all()
    assert float(smallest) == (min(expected.values()) if len(expected) == count else 0.0)
    for token in range(n):
        of_token = pairs.token[int(pairs.start[token]) : int(pairs.start[token + 1])]
        assert (of_token == token).all()
        assert len(of_token) == sum(i // F == token for i in expected)


def parameters(d: int, F: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    return {
        "W_enc": W_dec.t().clone(),
        "b_enc": 0.1 * torch.randn(F, generator=g),
        "W_dec": W_dec,
        "b_dec": 0.1 * torch.randn(d, generator=g),
    }


def engine(architecture: str, kernels: Kernels, compute: torch.dtype, d: int, F: int, k: int, focus=None, **more) -> Engine:
    config = resolved(DictionaryConfig(architecture=architecture, features=F, k=k, **more), d)
    return Engine(parameters(d, F), config, Budget(tokens=1), compute, kernels, focus=focus)


def batch(d: int, n: int, seed: int = 1) -> Tensor:
    """With a direction that all tokens share, so that some features fire on most of them."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += d**0.5
    return x


def apart(here: Tensor, there: Tensor) -> float:
    return float((here - there).norm() / there.norm().clamp_min(1e-30))


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize(("auxk", "focus"), [(0, None), (6, None), (6, lambda squares: squares / squares.mean())])
@pytest.mark.parametrize("compute", TYPES)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_compiled_kernels_do_what_plain_torch_does(architecture, compute, auxk, focus, decoder_norm):
    """Gradients, their norm and two updates with clip and anchor: to rounding (bf16: that of rows read in bf16)."""
    d, F, k, n = 36, 300, 7, 130
    dead = torch.tensor([0, 5, 7, 100, 299]) if auxk else None
    tolerance = 1e-5 if compute == torch.float32 else 1e-2
    options = {"auxk": auxk, "auxk_weight": 0.3, "decoder_norm": decoder_norm}
    engines = [engine(architecture, kernels(), compute, d, F, k, focus, **options) for kernels in SETS]
    homes = [{name: value.clone() for name, value in e.parameters.items()} for e in engines]
    with torch.no_grad():
        found = [e.gradient(batch(d, n), 0.0, dead) for e in engines]
        for name, expected in found[0].gradients.items():
            assert apart(found[1].gradients[name], expected) < tolerance, name
            assert found[1].gradients[name].shape == engines[1].parameters[name].shape
        assert torch.equal(found[0].fired, found[1].fired)
        assert torch.equal(found[0].f.dense(F), found[1].f.dense(F))
        assert torch.bincount(found[0].f.feature[found[0].f.value > 0]).max() > n / 2, "some features are hot"
        for name in ("loss", "error", "squares", "l0"):
            assert apart(getattr(found[1], name), getattr(found[0], name)) < tolerance, name
        total = sum(g.square().sum() for g in found[1].gradients.values())
        assert float(found[1].squares) == pytest.approx(float(total), rel=1e-4)
        for e, outcome, home in zip(engines, found, homes, strict=True):
            e.update(outcome, 1e-3, 0.1, home)
            e.update(e.gradient(batch(d, n, 2), 0.0, dead), 1e-3, 0.1, home)
    for name, expected in engines[0].parameters.items():
        assert apart(engines[1].parameters[name], expected) < tolerance, name
    for name, expected in engines[0].state().items():
        assert apart(engines[1].state()[name], expected) < 5 * tolerance, name
    for e in engines:
        for name in ("W_enc", "W_dec"):
            assert torch.equal(e.weights.copy_of(name), e.weights.rows[name].to(compute)), "rounded as torch rounds"


def test_the_kernels_adam_is_torchs():
    """Three steps with given gradients, no clip."""
    e = engine("topk", NumbaKernels(), torch.float32, 20, 30, 3, decoder_norm="free")
    mine = {name: value.clone().requires_grad_() for name, value in e.parameters.items()}
    adam = torch.optim.Adam(mine.values(), lr=1e-2, betas=Budget(tokens=1).betas, eps=1e-8)
    with torch.no_grad():
        for seed in range(3):
            outcome = e.gradient(batch(20, 50, seed), 0.0, None)
            for name, value in mine.items():
                value.grad = outcome.gradients[name].clone()
            adam.step()
            e.update(outcome._replace(squares=torch.tensor(0.0)), 1e-2, 0.0, {})
    for name, value in mine.items():
        assert apart(e.parameters[name], value.detach()) < 1e-5, name


@pytest.mark.parametrize("kernels", SETS)
def test_gradients_are_clipped_by_their_common_norm(kernels):
    """Adam's first moments after one step are (1 - beta1) times the clipped gradients."""
    e = engine("topk", kernels(), torch.float32, 20, 30, 3)
    with torch.no_grad():
        outcome = e.gradient(50 * batch(20, 64), 0.0, None)
        norm = torch.cat([g.flatten() for g in outcome.gradients.values()]).norm()
        assert norm > 5
        e.update(outcome, 1e-3, 0.0, {})
    moments = torch.cat([value.flatten() for name, value in e.state().items() if name.endswith("exp_avg")])
    assert float(moments.norm()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_where_nothing_is_positive_nothing_is_active_and_nothing_is_learned(kernels, architecture):
    e = engine(architecture, kernels(), torch.float32, 16, 40, 4)
    e.parameters["b_enc"].fill_(-1e6)
    with torch.no_grad():
        outcome = e.gradient(batch(16, 20), 0.0, None)
    assert float(outcome.l0) == 0
    assert not outcome.fired.any()
    assert not any(outcome.gradients[name].any() for name in ("W_enc", "W_dec", "b_enc"))
    assert outcome.gradients["b_dec"].any()


@pytest.mark.parametrize("kernels", SETS)
def test_weights_that_someone_else_changes_are_seen_by_the_next_step(kernels):
    """The product reads copies in bf16: they must not be older than the weights."""
    e = engine("topk", kernels(), torch.bfloat16, 16, 40, 4)
    x = batch(16, 64)
    with torch.no_grad():
        outcome = e.gradient(x, 0.0, None)
        e.update(outcome, 1e-3, 0.0, {})
        hot = int(torch.bincount(outcome.f.feature).argmax())
        assert e.gradient(x, 0.0, None).fired[hot]
        e.parameters["W_enc"][:, hot] = 0
        e.parameters["b_enc"][hot] = 0
        assert not e.gradient(x, 0.0, None).fired[hot]


def trained(kernels: Kernels, data, architecture: str, compute: torch.dtype, steps: int, n: int = 256, **more) -> tuple[Trainer, Tensor]:
    config = DictionaryConfig(architecture=architecture, features=96, k=4, auxk=8, dead_after=2048, **more)
    trainer = Trainer(fresh(config, *measure(data), 0), Budget(tokens=steps * n, batch=n, lr=2e-3), steps, True, compute, kernels=kernels)
    x = data.x.float()
    return trainer, torch.stack([trainer.train_on(x[torch.arange(i * n, i * n + n) % len(x)]).error for i in range(steps)])


@pytest.mark.parametrize("compute", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.integration)])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_five_hundred_steps_follow_the_reference(architecture, compute, planted, reader):
    """AuxK takes part. Rounding changes which of two near-equal features is taken, so single steps differ by percents; the level does not."""
    torch.set_num_threads(1)  # so small a step takes longer with two
    data = reader(planted(10_000, 24, 64, scale=20.0)[0], 5000)
    (_, expected), (_, found) = (trained(kernels(), data, architecture, compute, 500, 64) for kernels in SETS)
    assert expected[-50:].mean() < 0.3 * expected[:5].mean(), "it has learned"
    for first in range(0, 500, 50):
        here, there = found[first : first + 50].mean(), expected[first : first + 50].mean()
        assert float(here) == pytest.approx(float(there), rel=0.03), first


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_threads_and_repetition_change_no_byte(architecture, planted, reader):
    data = reader(planted(4_000, 24, 64, scale=20.0)[0], 1000)
    states = []
    for threads in (1, 2, 8, 8):
        torch.set_num_threads(threads)
        trainer, errors = trained(NumbaKernels(), data, architecture, torch.bfloat16, 30)
        states.append(trainer.state() | {"errors": errors})
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


@pytest.mark.parametrize("kernels", SETS)
@pytest.mark.parametrize("compute", TYPES)
def test_a_training_put_back_goes_on_to_the_same_bytes(kernels, compute, planted, reader):
    data = reader(planted(2_000, 24, 64, scale=20.0)[0], 1000)
    whole, _ = trained(kernels(), data, "topk", compute, 20)
    again = Trainer(whole.dictionary(), whole.budget, 40, True, compute, anchor=0.5, kernels=kernels())
    for i in range(10):
        again.train_on(data.x[i * 64 : i * 64 + 64])
    state = {name: value.clone(memory_format=torch.contiguous_format) for name, value in again.state().items()}
    assert state["W_enc"].shape == state["adam.W_enc.exp_avg"].shape == state["home.W_enc"].shape == (24, 96)
    other = Trainer(whole.dictionary(), whole.budget, 40, True, compute, anchor=0.5, kernels=kernels())
    other.restore(10, state)
    for i in range(10, 20):
        for trainer in (again, other):
            trainer.train_on(data.x[i * 64 : i * 64 + 64])
    assert all(torch.equal(value, other.state()[name]) for name, value in again.state().items())


def test_a_dictionary_in_training_is_told_in_its_usual_layout(planted, reader):
    data = reader(planted(500, 24, 64)[0], 500)
    trainer, _ = trained(choose(CPU, torch.bfloat16), data, "topk", torch.bfloat16, 3)
    sae = trainer.dictionary()
    assert sae.W_enc.shape == (24, 96)
    assert sae.W_enc.is_contiguous()
    assert torch.equal(sae.W_enc, trainer.parameters["W_enc"])
    before = sae.W_enc.clone()
    trainer.train_on(data.x[:64])
    assert torch.equal(sae.W_enc, before), "a copy"


@pytest.mark.parametrize("kernels", SETS)
def test_weights_that_are_not_finite_are_seen_although_the_loss_is(kernels, planted, reader):
    """A processor's own NaN (inf - inf) has its sign bit set: no positive pre-activation, so its feature is silent."""
    trainer, _ = trained(kernels(), reader(planted(500, 24, 64)[0], 500), "topk", torch.bfloat16, 3)
    assert trainer.is_finite()
    trainer.parameters["W_enc"][:, 7] = -torch.tensor(float("nan"))
    trainer.train_on(planted(64, 24, 64)[0])
    assert not trainer.is_finite()


# Who computes it


def test_numba_is_taken_on_a_cpu_and_plain_torch_in_double_precision(monkeypatch):
    monkeypatch.delenv(KERNELS, raising=False)
    assert choose(CPU, torch.bfloat16).name == choose(CPU, torch.float32).name == "numba"
    assert choose(CPU, torch.float64).name == "reference"


def test_what_does_not_work_falls_back_with_one_line_of_warning(monkeypatch, caplog):
    def broken(self):
        raise RuntimeError("no such instruction")

    monkeypatch.delenv(KERNELS, raising=False)
    monkeypatch.setattr(NumbaKernels, "__init__", broken)
    with caplog.at_level(logging.WARNING, "stagediff"):
        assert choose(CPU, torch.bfloat16).name == "reference"
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert "\n" not in line
    assert "falls back to plain torch" in line
    assert "no such instruction" in line


WITHOUT_NUMBA = """
import logging, sys
sys.modules["numba"] = None
import torch
from stagediff.sae.initial import fresh
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer
logging.basicConfig(format="%(message)s")
config = DictionaryConfig(architecture=sys.argv[1], features=64, **({"k": 4} if sys.argv[1] == "topk" else {}))
trainer = Trainer(fresh(config, 1.0, torch.zeros(16), 0), Budget(tokens=32, batch=32), 1, True, torch.float32)
print(float(trainer.train_on(torch.randn(32, 16)).loss) > 0)
"""


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
def test_every_kind_trains_where_numba_is_missing(architecture):
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, architecture], capture_output=True, text=True)
    assert done.stdout.split() == ["True"], done.stderr
    assert [line for line in done.stderr.splitlines() if "falls back" in line] == done.stderr.splitlines()
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    monkeypatch.setattr("stagediff.sae.sparse.cpu_bits._said", False)
    with caplog.at_level(logging.WARNING, "stagediff"):
        double, triple = (jitted(function) for function in (lambda x: 2 * x, lambda x: 3 * x))
    assert (double(2), triple(2)) == (4, 6)
    assert len(caplog.records) == 1
    assert "NUMBA_CACHE_DIR" in caplog.records[0].getMessage()


def test_the_environment_says_which_kernels_and_a_wrong_word_is_refused(monkeypatch):
    monkeypatch.setenv(KERNELS, "reference")
    assert choose(CPU, torch.bfloat16).name == "reference"
    monkeypatch.setenv(KERNELS, "numba")
    assert choose(CPU, torch.bfloat16).name == "numba"
    monkeypatch.setenv(KERNELS, "fast")
    with pytest.raises(UserError, match="STAGEDIFF_KERNELS is 'fast'.*reference, numba or triton"):
        choose(CPU, torch.bfloat16)
    monkeypatch.setenv(KERNELS, "triton")
    with pytest.raises(UserError, match="runs on cpu, which takes numba or reference"):
        choose(CPU, torch.bfloat16)
    assert choice.KERNELS == "STAGEDIFF_KERNELS"
