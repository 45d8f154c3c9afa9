"""BatchTopK: the k B largest pre-activations of a whole batch, so that tokens may use more or fewer features (Bussmann et al. 2024).

At inference a token must not depend on its batch: a feature is active above one threshold, the running mean of the smallest activation
kept in training (as in dictionary_learning and SAELens).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import Context, Gradient, encode
from stagediff.sae.topk import gradient_of_selected

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["THRESHOLD_RATE", "activate", "followed", "gradient", "kth_largest"]

THRESHOLD_RATE = 0.01
"""Weight of a new batch in the running mean (SAELens' value)."""


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]: above the threshold learned in training."""
    assert sae.threshold is not None
    return pre.relu() * (pre > sae.threshold)


def gradient(p: dict[str, Tensor], x: Tensor, context: Context) -> Gradient:
    """Loss and gradients on a scaled batch x [B, d] in master type."""
    forward = encode(p, x, context)
    positive = forward.pre.relu()
    smallest = kth_largest(positive, context.config.k * len(x))
    f = torch.where(positive >= smallest, positive, 0)
    return gradient_of_selected(p, x, context, forward, f)._replace(threshold=smallest.to(x.dtype))


def followed(threshold: Tensor, smallest: Tensor) -> Tensor:
    """The running mean after another batch. A negative threshold means: none seen yet."""
    return torch.where(threshold < 0, smallest, threshold + THRESHOLD_RATE * (smallest - threshold))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of non-negative values, as a scalar tensor. Values that equal it are all kept by the caller.

    bf16 on the CPU: non-negative bf16 numbers sort like their bit patterns, of which there are 32,768, so a histogram of them gives the
    answer exactly and about ten times faster than torch.topk over the flattened batch.
    """
    if values.device.type == "cpu" and values.dtype == torch.bfloat16:
        bits = values.view(torch.int16).flatten().to(torch.int32).clamp_min_(0)  # -0.0 is a negative pattern
        at_least = torch.bincount(bits, minlength=1 << 15).flip(0).cumsum(0).flip(0)  # how many values are >= each pattern
        return ((at_least >= k).sum() - 1).clamp_min(0).to(torch.int16).view(torch.bfloat16)
    return values.flatten().topk(k, sorted=False).values.amin()
