"""Two models' activations of the same tokens, as one stream: side by side (crosscoder), or one minus the other (difference SAE).

Both have the interface of `lm.activations.ActivationReader`, so that training batches come from `sae.batches` in the same order as every stage's.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader

if TYPE_CHECKING:
    import numpy as np

    from stagediff.lm.spec import ActivationData
    from stagediff.store import Store

__all__ = ["Differences", "SideBySide"]


class _Two:
    """Base and finetuned, shard by shard; raises UserError where they are not of the same rows."""

    def __init__(self, store: "Store", base: "ActivationData", finetuned: "ActivationData", device: str = "cpu"):
        self.base, self.finetuned = (ActivationReader(store, data, device) for data in (base, finetuned))
        if not self.base.is_paired_with(self.finetuned):
            raise UserError(
                f"The activations {base.base} (base model) and {finetuned.base} (finetuned model) are not of the same token rows, positions and width, so "
                "they cannot be compared token by token. Harvest both models on the same rows with the same shard size."
            )

    @property
    def n_tokens(self) -> int:
        return self.base.n_tokens

    @property
    def n_shards(self) -> int:
        return self.base.n_shards

    @property
    def tokens_per_row(self) -> int:
        return self.base.tokens_per_row

    def shard_tokens(self, i: int) -> int:
        return self.base.shard_tokens(i)

    def locate(self, i: int) -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
        return self.base.locate(i)


class SideBySide(_Two):
    """[n, 2 d]: the base model's d numbers, then the finetuned model's."""

    @property
    def d(self) -> int:
        return 2 * self.base.d

    def read_shard(self, i: int) -> Tensor:
        return torch.cat([self.base.read_shard(i), self.finetuned.read_shard(i)], 1)


class Differences(_Two):
    """[n, d]: finetuned minus base, rounded to bf16 once."""

    @property
    def d(self) -> int:
        return self.base.d

    def read_shard(self, i: int) -> Tensor:
        return (self.finetuned.read_shard(i).float() - self.base.read_shard(i).float()).bfloat16()
