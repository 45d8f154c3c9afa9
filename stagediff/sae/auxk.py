"""AuxK: dead features are asked to reconstruct what the living ones leave over (Gao et al. 2024, section A.2).

L_aux = weight * 1/B sum_b ||e_b - e_hat_b||^2 with the residual e = x - x_hat taken as a constant, and e_hat = f_aux W_dec from each
token's `auxk` largest dead pre-activations, without b_dec (the residual holds it already).
"""

import torch
from torch import Tensor

from stagediff.sae.gradients import Context, Forward, keep_active

__all__ = ["auxk"]


def auxk(context: Context, forward: Forward, error: Tensor, g_pre: Tensor, g_W_dec: Tensor) -> Tensor:
    """Adds the term's gradients to those of the pre-activations g_pre [B, F] and the decoder g_W_dec [F, d], in place; returns the term.

    `error` is x_hat - x [B, d]; `context.dead` holds the indices of at least one dead feature.
    """
    dead = context.dead
    assert dead is not None
    assert context.config.auxk
    weight, n = context.config.auxk_weight, len(error)
    pre = forward.pre[:, dead]  # [B, dead]
    values, indices = pre.topk(min(context.config.auxk, len(dead)), dim=-1, sorted=False)
    f = torch.zeros_like(pre).scatter_(-1, indices, values.relu_())
    W_dec = forward.W_dec[dead]
    left = torch.mm(f, W_dec).to(error.dtype) + error  # e_hat - e
    scaled = (left * (2 * weight / n)).to(f.dtype)
    g_W_dec.index_add_(0, dead, torch.mm(f.t(), scaled).to(g_W_dec.dtype))
    g_pre.index_add_(1, dead, keep_active(torch.mm(scaled, W_dec.t()), f))
    return weight * left.square().sum() / n
