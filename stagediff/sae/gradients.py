"""The algebra of dense activations (relu, jumprelu): one pass forward, the squared error, and the way back to the weights, written out by hand.

L = 1/B sum_b ||x_hat_b - x_b||^2 + sparsity. Matrix products run in the parameters' compute type (bf16 on request), everything of size
[B, d], [F, d] or smaller in the master type (fp32). Autograd is not used: it would keep [B, F] tensors that are not needed and cast more
than once. Exactness is tested against autograd in float64. Ten d F floating-point operations per token: two forward, three for weights and
activations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stagediff.sae.sparse.pairs import Pairs

if TYPE_CHECKING:
    from stagediff.sae.spec import DictionaryConfig

__all__ = [
    "Context",
    "Forward",
    "Gradient",
    "clip_factor",
    "column_sums",
    "encode",
    "keep_active",
    "parallel_removed",
    "reconstruct",
    "to_activations",
    "to_encoder",
]


def alone(value: Tensor) -> Tensor:
    """The sum over ranks where one has all features."""
    return value


class Context(NamedTuple):
    """What a step's gradient depends on besides parameters and batch."""

    config: "DictionaryConfig"
    """With every default resolved."""
    sparsity: float
    """Weight of the sparsity term at this step (after its warm-up)."""
    compute: torch.dtype
    """Type of the matrix products."""
    dead: Tensor | None = None
    """Indices of dead features (AuxK); None: there are none."""
    total: Callable[[Tensor], Tensor] = alone
    """The sum over the ranks among which features are split (`sae.sharded`)."""
    copies: Mapping[str, Tensor] = MappingProxyType({})
    """W_enc, W_dec in compute type, where they are at hand."""
    focus: Callable[[Tensor], Tensor] | None = None
    """Weights [B] of the batch's tokens from their squared errors [B] (`sae.focus`); None: all are 1."""

    def weighted(self, error: Tensor) -> tuple[Tensor | None, Tensor]:
        """What each token counts, as a column [B, 1] (None: all count 1), and the error [B, d] times that."""
        if self.focus is None:
            return None, error
        counts = self.focus(error.square().sum(1))[:, None]
        return counts, error * counts


class Gradient(NamedTuple):
    """One step's outcome. Means are per token, the error summed over d, in scaled units."""

    loss: Tensor
    """error + sparsity term + AuxK: what is minimised, but that here all tokens count alike, whatever the focus."""
    error: Tensor
    """1/B sum_b ||x_hat_b - x_b||^2."""
    sparsity: Tensor
    """The sparsity term without its weight: sum_i f_i ||W_dec_i|| (relu), L0 (jumprelu), 0 for the others."""
    f: Tensor | Pairs
    """Activations [B, F], or the active ones alone."""
    fired: Tensor
    """[F] bool: fired in this batch."""
    gradients: dict[str, Tensor]
    """By parameter name, in the master type."""
    threshold: Tensor | None = None
    """batchtopk: the smallest activation that was kept."""
    squares: Tensor | None = None
    """Sum of the squares of all gradients, where it was at hand."""

    @property
    def l0(self) -> Tensor:
        """Active features per token."""
        return self.f.l0 if isinstance(self.f, Pairs) else (self.f > 0).sum() / len(self.f)


@dataclass
class Forward:
    """The pass up to the pre-activations, and the weights in compute type."""

    inner: Tensor
    """[B, d] what the encoder sees."""
    pre: Tensor
    """[B, F] pre-activations."""
    W_enc: Tensor
    """[d, F]"""
    W_dec: Tensor
    """[F, d]"""


def encode(p: dict[str, Tensor], x: Tensor, context: Context) -> Forward:
    """Pre-activations of the scaled batch x [B, d] (master type) under parameters p."""
    t = context.compute
    inner = (x - p["b_dec"] if context.config.subtract_b_dec else x).to(t)
    W_enc, W_dec = (context.copies.get(name, p[name]).to(t) for name in ("W_enc", "W_dec"))
    return Forward(inner, torch.addmm(p["b_enc"].to(t), inner, W_enc), W_enc, W_dec)


def reconstruct(
    p: dict[str, Tensor], x: Tensor, forward: Forward, f: Tensor, total: Callable[[Tensor], Tensor] = alone
) -> tuple[Tensor, Tensor]:
    """The error x_hat - x [B, d] in master type, and its mean squared norm per token."""
    error = total(torch.mm(f, forward.W_dec).to(x.dtype))
    error += p["b_dec"]
    error -= x
    return error, error.square().sum() / len(x)


def column_sums(values: Tensor, master: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """Sums over the batch [F] of values [B, F], by weights [B, 1]. As a product: `sum(dtype=fp32)` would first copy all of them to fp32."""
    row = values.new_ones(1, len(values)) if weight is None else weight.t().to(values.dtype)
    return torch.mm(row, values)[0].to(master)


def to_activations(scaled: Tensor, W_dec: Tensor, row: Tensor, counts: Tensor | None) -> Tensor:
    """Gradients of activations [B, F] from the scaled error [B, d], and a penalty's `row` [F] of every token times what that counts [B, 1]."""
    if counts is None:  # the same row for every token: it rides in the product as its bias
        return torch.addmm(row.to(scaled.dtype), scaled, W_dec.t())
    return torch.mm(scaled, W_dec.t()).addcmul_(counts.to(scaled.dtype), row.to(scaled.dtype))


def keep_active(gradient: Tensor, f: Tensor) -> Tensor:
    """Sets `gradient` [B, F] to 0 where f is 0, in place, and returns it."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, f, 0, grad_input=gradient)


def to_encoder(p: dict[str, Tensor], context: Context, forward: Forward, error: Tensor, g_pre: Tensor) -> dict[str, Tensor]:
    """Gradients of W_enc, b_enc, b_dec from those of the pre-activations g_pre [B, F] and the (weighted) error [B, d]."""
    master = error.dtype
    b_enc = column_sums(g_pre, master)
    b_dec = error.sum(0) * (2 / len(error))
    if context.config.subtract_b_dec:
        b_dec -= context.total(p["W_enc"] @ b_enc)
    return {"W_enc": torch.mm(forward.inner.t(), g_pre).to(master), "b_enc": b_enc, "b_dec": b_dec}


def parallel_removed(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """The decoder's gradient without its part along each unit row: with unit norms only directions are learned. In place."""
    return gradient.sub_((gradient * W_dec).sum(1, keepdim=True) * W_dec)


def clip_factor(gradients: dict[str, Tensor], largest: float, squares: Tensor | None = None) -> Tensor:
    """What to multiply all gradients with so that their common norm is at most `largest`. No host sync. `squares`: the sum of their squares."""
    norm = torch.stack([g.norm() for g in gradients.values()]).norm() if squares is None else squares.sqrt()
    return (largest / (norm + 1e-6)).clamp(max=1.0)
