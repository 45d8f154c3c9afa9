"""The active features of a batch: pairs of a token and a feature, in the order of tokens and in that of features."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["ByFeature", "Pairs"]


class Pairs(NamedTuple):
    """P slots for active features, P = k B, so that no shape depends on values and nothing waits for the device.

    topk: k slots for every token; batchtopk: as many for each token as it has. A slot is empty (feature F, value 0) where there were too few
    positive pre-activations; empty slots are the last of their token's (batchtopk: of all).
    """

    feature: Tensor
    """[P] int32, F: empty."""
    value: Tensor
    """[P] activations > 0 in master type, 0: empty."""
    token: Tensor
    """[P] int32."""
    start: Tensor
    """[B + 1] int32: token b's slots are those from start[b] to start[b + 1]."""

    @property
    def l0(self) -> Tensor:
        """Active features per token."""
        return (self.value > 0).sum() / (len(self.start) - 1)

    def dense(self, features: int) -> Tensor:
        """The activations [B, F]."""
        out = self.value.new_zeros(len(self.start) - 1, features + 1)
        out[self.token.long(), self.feature.long()] = self.value
        return out[:, :features]


class ByFeature(NamedTuple):
    """The same pairs sorted by feature; those of one feature stay in the order of tokens. Empty slots come last."""

    order: Tensor
    """[P] int32: indices of slots."""
    start: Tensor
    """[F + 1] int32: feature f's are those from start[f] to start[f + 1] of `order`."""

    @property
    def fired(self) -> Tensor:
        """[F] bool"""
        return self.start[1:] > self.start[:-1]
