"""The Triton kernels against plain torch, in Triton's interpreter: what they compute, on a machine without a GPU.

Skipped where Triton is not installed: it comes with PyTorch's CUDA builds, not with its CPU builds (there `pip install triton` brings it).
How fast they are, that they compile, and that they give the same bytes twice is checked on a GPU by benchmarks/gpu_train.py."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed; PyTorch's CPU builds come without it (pip install triton)", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU: run benchmarks/gpu_train.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from stagediff.sae.dictionary import resolved
from stagediff.sae.sparse.engine import Engine
from stagediff.sae.sparse.gpu import TritonKernels
from stagediff.sae.sparse.reference import Reference
from stagediff.sae.spec import Budget, DictionaryConfig

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels() -> TritonKernels:
    found = TritonKernels(CPU)
    try:
        Engine(parameters(4, 8), config(8, 2), Budget(tokens=1), torch.float32, found).gradient(torch.randn(2, 4), 0.0, None)
    except Exception as error:
        if "0-dimensional arrays" in str(error):  # Triton 3.6 with NumPy 2.4
            pytest.skip(f"this Triton's interpreter does not work with this NumPy: {error}")
        raise
    return found


def parameters(d: int, F: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g), dim=1)
    return {"W_enc": W_dec.t().clone(), "b_enc": 0.1 * torch.randn(F, generator=g), "W_dec": W_dec, "b_dec": torch.zeros(d)}


def config(F: int, k: int, architecture: str = "topk", **more) -> DictionaryConfig:
    return resolved(DictionaryConfig(architecture=architecture, features=F, k=k, **more), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "F", "k"), [(4, 100, 7), (3, 96, 3), (4, 700, 5), (3, 40, 40)])
def test_the_largest_are_those_of_plain_torch(kernels, dtype, n, F, k):
    pre = torch.randn(n, F, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre[0] = 1.0
    pre[1] = -1.0
    pre[1, 3] = 2.0
    pre[2] = (pre[2] * 2).round() / 2
    found = []
    for ks in (kernels, Reference()):
        feature, value = ks.largest(pre, k)
        order = feature.argsort(dim=1)
        found.append((feature.gather(1, order), value.gather(1, order), *ks.largest_of_all(pre, n * k)[0]))
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_gradients_and_update_are_those_of_plain_torch(kernels, architecture, compute):
    """With AuxK, an anchor, and a feature with more pairs than one program adds up. The interpreter cuts bf16 off instead of rounding."""
    d, F, k, n = 12, 20, 4, 90
    dead = torch.tensor([3, 4, 10, 19])
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    x[:, 0] += 4
    engines, outcomes = [], []
    for ks in (kernels, Reference()):
        e = Engine(parameters(d, F), config(F, k, architecture, auxk=3, auxk_weight=0.3), Budget(tokens=1), compute, ks)
        home = {name: value.clone() for name, value in e.parameters.items()}
        with torch.no_grad():
            outcome = e.gradient(x, 0.0, dead)
            e.update(outcome, 1e-2, 0.1, home)
        engines.append(e)
        outcomes.append(outcome)
    here, there = outcomes
    assert torch.bincount(there.f.feature).max() > 64
    tolerance = 1e-5 if compute == torch.float32 else 2e-2
    assert torch.equal(here.fired, there.fired)
    pairs = [(here.gradients[name], there.gradients[name]) for name in there.gradients]
    pairs += [(engines[0].parameters[name], value) for name, value in engines[1].parameters.items()]
    pairs += [(engines[0].state()[name], value) for name, value in engines[1].state().items()]
    pairs += [(here.loss, there.loss), (here.squares, there.squares)]
    for a, b in pairs:
        assert float((a - b).norm() / b.norm()) < tolerance
