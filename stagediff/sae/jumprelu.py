"""JumpReLU: a learned threshold per feature and an L0 term, trained through a straight-through kernel (Rajamanoharan et al. 2024).

f = z H(z - theta), L = ||x - x_hat||^2 + lambda ||f||_0. theta gets no gradient from either term by calculus; the paper's pseudo-derivatives
with a rectangle kernel K of width epsilon are: df/dtheta = -theta/epsilon K((z - theta)/epsilon), dH/dtheta = -1/epsilon K((z - theta)/epsilon).
theta is kept positive by learning its logarithm.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import Context, Gradient, column_sums, encode, parallel_removed, reconstruct, to_encoder

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["activate", "gradient"]


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]: the pre-activation itself where it exceeds its threshold."""
    assert sae.threshold is not None
    return pre.relu() * (pre > sae.threshold)


def gradient(p: dict[str, Tensor], x: Tensor, context: Context) -> Gradient:
    """Loss and gradients on a scaled batch x [B, d] in master type; p holds `log_threshold` [F] besides the weights."""
    n, weight, width = len(x), context.sparsity, context.config.bandwidth
    forward = encode(p, x, context)
    threshold = p["log_threshold"].exp()
    over = forward.pre - threshold.to(context.compute)  # [B, F]
    f = torch.ops.aten.threshold_backward(forward.pre, over, 0)  # pre where over > 0, else 0
    error, squared = reconstruct(p, x, forward, f, context.total)
    counts, weighted = context.weighted(error)
    scaled = (weighted * (2 / n)).to(context.compute)
    W_dec = torch.mm(f.t(), scaled).to(x.dtype)
    if context.config.decoder_norm == "unit":
        parallel_removed(W_dec, p["W_dec"])

    g_f = torch.mm(scaled, forward.W_dec.t())  # [B, F]
    near = (over.abs() < width / 2).to(context.compute)
    count = column_sums(near, x.dtype, counts)
    g_threshold = -(threshold * column_sums(near * g_f, x.dtype) + (weight / n) * count) / width

    active = (over > 0).to(context.compute)
    fired = column_sums(active, x.dtype)
    sparsity = context.total(fired.sum() / n)
    gradients = to_encoder(p, context, forward, weighted, g_f.mul_(active))
    gradients |= {"W_dec": W_dec, "log_threshold": g_threshold * threshold}
    return Gradient(squared + weight * sparsity, squared, sparsity, f, fired > 0, gradients)
