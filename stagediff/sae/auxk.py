"""AuxK: dead features are asked to reconstruct what the living ones leave over (Gao et al. 2024, section A.2).

L_aux = weight * 1/B sum_b ||e_b - e_hat_b||^2 with the residual e = x - x_hat taken as a constant, and e_hat = f_aux W_dec from each
token's `auxk` largest dead pre-activations, without b_dec (the residual holds it already). Dense over the dead features: `auxk` is many times k,
so that products over all of them take less time than gathering rows for each token.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import column_sums, keep_active
from stagediff.sae.sparse.kernels import Extra, Kernels
from stagediff.sae.sparse.weights import MATRICES, Weights

if TYPE_CHECKING:
    from stagediff.sae.sharded import Shards
    from stagediff.sae.spec import DictionaryConfig

__all__ = ["auxk"]


def auxk(
    config: "DictionaryConfig",
    weights: Weights,
    kernels: Kernels,
    inner: Tensor,
    error: Tensor,
    dead: Tensor,
    shards: "Shards | None" = None,
) -> tuple[Tensor, Extra]:
    """The term and its gradients.

    `inner` [B, d] in compute type is what the encoder sees, `error` is x_hat - x [B, d], `dead` holds the indices of at least one dead feature
    (`shards`, the ranks among which features are split: at one of them).
    """
    assert config.auxk
    weight, n, master, count = config.auxk_weight, len(error), error.dtype, len(dead)
    # Products whose width is a multiple of 64 are several times as fast on a GPU. What is added has pre-activation 0 and is never active.
    width = (count // 64 + 1) * 64
    W_enc, W_dec = (inner.new_zeros(width, weights.rows[name].shape[1]) for name in MATRICES)
    b_enc = inner.new_zeros(width)
    W_enc[:count], W_dec[:count], b_enc[:count] = (
        weights.copy_of("W_enc")[dead],
        weights.copy_of("W_dec")[dead],
        weights.rows["b_enc"][dead],
    )
    pre = torch.addmm(b_enc, inner, W_enc.t())  # [B, width]
    chosen, values = kernels.largest(pre, min(config.auxk, max(1, count)))
    if shards:
        chosen, values = shards.keep(chosen, values, config.auxk)
    f = torch.zeros_like(pre).scatter_(
        1, chosen.clamp_max_(count).long(), values.to(pre.dtype)
    )  # where there were too few: 0 in a spare column
    found = torch.mm(f, W_dec).to(master)
    left = (shards.total(found) if shards else found) + error  # e_hat - e
    scaled = (left * (2 * weight / n)).to(f.dtype)
    g_pre = keep_active(torch.mm(scaled, W_dec.t()), f)
    g_W_enc, g_W_dec, g_b_enc = torch.mm(g_pre.t(), inner), torch.mm(f.t(), scaled), column_sums(g_pre, master)
    gradients = Extra(dead, g_W_enc[:count].to(master), g_W_dec[:count].to(master), g_b_enc[:count])
    return weight * left.square().sum() / n, gradients
