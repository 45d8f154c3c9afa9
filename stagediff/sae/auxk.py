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
from stagediff.sae.sparse.weights import Weights

if TYPE_CHECKING:
    from stagediff.sae.spec import DictionaryConfig

__all__ = ["auxk"]


def auxk(
    config: "DictionaryConfig", weights: Weights, kernels: Kernels, inner: Tensor, error: Tensor, dead: Tensor
) -> tuple[Tensor, Extra]:
    """The term and its gradients.

    `inner` [B, d] in compute type is what the encoder sees, `error` is x_hat - x [B, d], `dead` holds the indices of at least one dead feature.
    """
    assert config.auxk
    weight, n, master = config.auxk_weight, len(error), error.dtype
    W_enc, W_dec = (weights.copy_of(name)[dead] for name in ("W_enc", "W_dec"))
    pre = torch.addmm(weights.rows["b_enc"][dead].to(inner.dtype), inner, W_enc.t())  # [B, dead]
    chosen, values = kernels.largest(pre, min(config.auxk, len(dead)))
    f = pre.new_zeros(n, len(dead) + 1).scatter_(1, chosen.long(), values.to(pre.dtype))[:, :-1]
    left = torch.mm(f, W_dec).to(master) + error  # e_hat - e
    scaled = (left * (2 * weight / n)).to(f.dtype)
    g_pre = keep_active(torch.mm(scaled, W_dec.t()), f)
    gradients = Extra(dead, torch.mm(g_pre.t(), inner).to(master), torch.mm(f.t(), scaled).to(master), column_sums(g_pre, master))
    return weight * left.square().sum() / n, gradients
