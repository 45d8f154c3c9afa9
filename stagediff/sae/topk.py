"""TopK: the k largest pre-activations of every token, after ReLU (Gao et al. 2024). No sparsity term; dead features are kept up by AuxK."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import Context, Gradient

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["activate", "gradient"]


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]: pre where it is among its row's k largest and positive, else 0; exactly k are looked at."""
    values, indices = pre.topk(sae.config.k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, indices, values.relu_())


def gradient(p: dict[str, Tensor], x: Tensor, context: Context) -> Gradient:
    """Loss and gradients on a scaled batch x [B, d] in master type, by plain torch. (A training keeps its weights by rows: `sparse.engine.Engine`.)"""
    from stagediff.sae.sparse.engine import gradient
    from stagediff.sae.sparse.reference import Reference
    from stagediff.sae.sparse.weights import Weights

    return gradient(Weights(p, context.compute), context.config, Reference(), x, context.dead, focus=context.focus)
