"""What the checks and the timings of sparse training on a GPU share: a dictionary at its start, and activations to train it on."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository is enough: nothing need be installed but PyTorch and Triton

from stagediff.sae.sparse.engine import Engine
from stagediff.sae.sparse.kernels import Kernels

BETAS = (0.9, 0.999)
Section = tuple[str, Callable[[], Iterator[dict[str, Any]]]]
"""Its name, and what yields its results."""


def config_of(architecture: str, k: int, auxk: int = 0) -> Any:
    return SimpleNamespace(
        architecture=architecture, k=k, subtract_b_dec=True, decoder_norm="unit", auxk=auxk, auxk_weight=1 / 32, dead_after=10_000_000
    )


def engine(
    d: int, F: int, k: int, compute: torch.dtype, kernels: Kernels, device: torch.device, architecture: str = "topk", auxk: int = 0
) -> Engine:
    """A dictionary at its start: random unit rows, tied."""
    g = torch.Generator(device=device).manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d, generator=g, device=device), dim=1)
    parameters = {
        "W_enc": W_dec.t().clone(),
        "b_enc": torch.zeros(F, device=device),
        "W_dec": W_dec,
        "b_dec": torch.zeros(d, device=device),
    }
    return Engine(parameters, config_of(architecture, k, auxk), SimpleNamespace(betas=BETAS, clip=1.0), compute, kernels)  # type: ignore[arg-type]


class Planted:
    """Activations [n, d] of norm about sqrt(d): sums of some of `features` directions with Zipf's frequencies, and a mean."""

    def __init__(self, d: int, features: int, active: int, device: torch.device, seed: int = 1):
        self._g = torch.Generator(device=device).manual_seed(seed)
        self._directions = torch.nn.functional.normalize(torch.randn(features, d, generator=self._g, device=device), dim=1)
        self._shares = torch.arange(1, features + 1, device=device).float().pow(-0.6)
        self._mean = 0.5 * torch.randn(d, generator=self._g, device=device) / d**0.5
        self._active, self._scale = active, (d / active) ** 0.5 / 1.6

    def batch(self, n: int) -> Tensor:
        index = torch.multinomial(self._shares, n * self._active, replacement=True, generator=self._g).view(n, self._active)
        weight = 0.5 + torch.randn(n, self._active, generator=self._g, device=index.device).abs()
        x = torch.nn.functional.embedding_bag(index, self._directions, per_sample_weights=weight, mode="sum")
        return (x + self._mean + 0.1 * torch.randn(x.shape, generator=self._g, device=index.device) / x.shape[1] ** 0.5) * self._scale


def trained(e: Engine, data: Planted, n: int, steps: int, lr: float = 1e-3) -> Tensor:
    """Trains; the error of each step as a share of the batch's variance [steps]."""
    shares = []
    for step in range(steps):
        x = data.batch(n)
        outcome = e.gradient(x, 0.0, None)
        e.update(outcome, lr * min(1.0, (step + 1) / 50), 0.0, {})
        shares.append(outcome.error / ((x - x.mean(0)).square().sum() / n))
    return torch.stack(shares)
