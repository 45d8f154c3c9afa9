"""How good a dictionary is on activations: explained variance, L0, dead share, decoder norms. One streaming pass, bounded memory.

Explained variance is 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2 over the whole of what was read: numerator and denominator are added up
separately, and the mean is that of all tokens, not of a batch (the mean of per-batch ratios is another number).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE

__all__ = ["Meter", "Quality", "evaluate", "explained_variance"]


class Quality(NamedTuple):
    """A dictionary's figures over some tokens."""

    explained_variance: float
    mse: float
    """Mean over tokens of ||x - x_hat||^2, summed over d, in raw units."""
    l0: float
    """Mean number of active features per token."""
    dead: float
    """Share of features that never fired on these tokens."""
    tokens: int


class Meter:
    """Adds up batches on the dictionary's device; nothing is moved to the host before `result`."""

    def __init__(self, features: int, d: int, device: str | torch.device = "cpu"):
        self._moments = torch.zeros(d, dtype=torch.float64, device=device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # ||x - shift||^2, ||x - x_hat||^2, active
        self._fired = torch.zeros(features, dtype=torch.bool, device=device)
        self._shift: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor, x_hat: Tensor, f: Tensor) -> None:
        """A batch: inputs and reconstructions [n, d], activations [n, F]."""
        x = x.float()
        if self._shift is None:  # sums around a point near the mean keep their digits
            self._shift = x.mean(0)
        centred = x - self._shift
        self._moments += centred.sum(0, dtype=torch.float64)
        active = f > 0
        parts = centred.square().sum(dtype=torch.float64), (x - x_hat).square().sum(dtype=torch.float64), active.sum()
        self._sums += torch.stack([part.to(self._sums) for part in parts])
        self._fired |= active.any(0)
        self._tokens += len(x)

    def result(self) -> Quality:
        if not self._tokens:
            raise ValueError("no tokens were added")
        n = self._tokens
        total, error, active = self._sums.tolist()
        total -= float(self._moments.square().sum()) / n
        dead = 1 - float(self._fired.double().mean())
        return Quality(explained_variance(error, total), error / n, active / n, dead, n)


def evaluate(sae: SAE, batches: Iterable[Tensor]) -> Quality:
    """The figures of `sae` over batches [n, d] in raw units."""
    meter = Meter(sae.features, sae.d, sae.W_dec.device)
    for x in batches:
        f = sae.encode(x)
        meter.add(x, sae.decode(f), f)
        del f  # or it lay beside the next batch's
    return meter.result()


def explained_variance(error: float, total: float) -> float:
    """1 - error / total; 0 where there is no variance to explain."""
    return 1 - error / total if total > 0 else 0.0
