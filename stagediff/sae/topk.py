"""TopK: the k largest pre-activations of every token, after ReLU (Gao et al. 2024). No sparsity term; dead features are kept up by AuxK."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.auxk import auxk
from stagediff.sae.gradients import Context, Forward, Gradient, encode, keep_active, parallel_removed, reconstruct, to_encoder

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["activate", "gradient", "gradient_of_selected"]


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]."""
    return _largest(pre, sae.config.k)


def gradient(p: dict[str, Tensor], x: Tensor, context: Context) -> Gradient:
    """Loss and gradients on a scaled batch x [B, d] in master type."""
    forward = encode(p, x, context)
    return gradient_of_selected(p, x, context, forward, _largest(forward.pre, context.config.k))


def gradient_of_selected(p: dict[str, Tensor], x: Tensor, context: Context, forward: Forward, f: Tensor) -> Gradient:
    """The rest of the step once the active features are chosen: f [B, F] holds the chosen pre-activations, 0 elsewhere."""
    n = len(x)
    error, squared = reconstruct(p, x, forward, f)
    scaled = (error * (2 / n)).to(context.compute)
    W_dec = torch.mm(f.t(), scaled).to(x.dtype)
    g_pre = keep_active(torch.mm(scaled, forward.W_dec.t()), f)
    loss = squared
    if context.dead is not None and context.config.auxk:
        loss = loss + auxk(context, forward, error, g_pre, W_dec)
    if context.config.decoder_norm == "unit":
        parallel_removed(W_dec, p["W_dec"])
    gradients = to_encoder(p, context, forward, error, g_pre)
    return Gradient(loss, squared, torch.zeros_like(squared), f, f.amax(0) > 0, gradients | {"W_dec": W_dec})


def _largest(pre: Tensor, k: int) -> Tensor:
    """pre where it is among its row's k largest and positive, else 0. Exactly k are looked at: ties (common in bf16) are not all kept."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu_())
