"""BatchTopK: the k B largest pre-activations of a whole batch, so that tokens may use more or fewer features (Bussmann et al. 2024).

At inference a token must not depend on its batch: a feature is active above one threshold, the running mean of the smallest activation
kept in training (as in dictionary_learning and SAELens).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.topk import gradient

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE

__all__ = ["THRESHOLD_RATE", "activate", "followed", "gradient"]

THRESHOLD_RATE = 0.01
"""Weight of a new batch in the running mean (SAELens' value)."""


def activate(pre: Tensor, sae: "SAE") -> Tensor:
    """Activations [n, F] from pre-activations [n, F]: above the threshold learned in training."""
    assert sae.threshold is not None
    return pre.relu() * (pre > sae.threshold)


def followed(threshold: Tensor, smallest: Tensor) -> Tensor:
    """The running mean after another batch. A negative threshold means: none seen yet."""
    return torch.where(threshold < 0, smallest, threshold + THRESHOLD_RATE * (smallest - threshold))
