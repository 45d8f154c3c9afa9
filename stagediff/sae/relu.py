"""ReLU with a decoder-norm-weighted L1 term (Anthropic, April 2024 update).

L = ||x - x_hat||^2 + lambda sum_i f_i ||W_dec_i||. Because the penalty sees f_i ||W_dec_i||, shrinking f and growing the decoder gains
nothing, and decoder norms are left free.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import (
    Context,
    Gradient,
    column_sums,
    encode,
    keep_active,
    parallel_removed,
    reconstruct,
    to_activations,
    to_encoder,
)

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["activate", "gradient"]


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]."""
    return pre.relu()


def gradient(p: dict[str, Tensor], x: Tensor, context: Context) -> Gradient:
    """Loss and gradients on a scaled batch x [B, d] in master type."""
    n, weight = len(x), context.sparsity
    forward = encode(p, x, context)
    f = forward.pre.relu_()
    error, squared = reconstruct(p, x, forward, f, context.total)
    counts, weighted = context.weighted(error)
    scaled = (weighted * (2 / n)).to(context.compute)

    norms = p["W_dec"].norm(dim=1).clamp_min(1e-12)  # [F]
    mass = column_sums(f, x.dtype) / n  # [F] mean activation
    sparsity = context.total(mass @ norms)

    W_dec = torch.mm(f.t(), scaled).to(x.dtype)
    pressed = mass if counts is None else column_sums(f, x.dtype, counts) / n
    W_dec.addcmul_((weight * pressed / norms)[:, None], p["W_dec"])
    if context.config.decoder_norm == "unit":
        parallel_removed(W_dec, p["W_dec"])
    g_f = to_activations(scaled, forward.W_dec, norms * (weight / n), counts)
    gradients = to_encoder(p, context, forward, weighted, keep_active(g_f, f))
    return Gradient(squared + weight * sparsity, squared, sparsity, f, mass > 0, gradients | {"W_dec": W_dec})
