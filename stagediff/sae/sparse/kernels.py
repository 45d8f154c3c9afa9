"""What a step needs computed, and who computes it: numba on a CPU, Triton on a GPU, plain torch anywhere."""

import logging
import os
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.sparse.pairs import ByFeature, Pairs
from stagediff.sae.sparse.weights import Weights

__all__ = ["KERNELS", "Decoded", "Extra", "Kernels", "Rows", "ThresholdKernels", "Update", "choose", "choose_for_thresholds"]

log = logging.getLogger("stagediff")

KERNELS = "STAGEDIFF_KERNELS"
"""Environment variable: reference, numba or triton; unset: the fastest that works here."""


class Decoded(NamedTuple):
    """The way forward through the decoder, and back to the activations."""

    error: Tensor
    """[B, d] x_hat - x, master type."""
    scaled: Tensor
    """[B, d] 2/B times that, in the type in which weight gradients read it."""
    squares: Tensor
    """[B] squared norms of the error."""
    total: Tensor
    """[d] sum of the error over all tokens."""
    g: Tensor
    """[P] gradient of the loss in each slot's activation; 0 where it is empty."""


class Extra(NamedTuple):
    """Gradients that some features get besides those of the pairs (AuxK)."""

    features: Tensor
    """[n] int64, all different."""
    W_enc: Tensor
    """[n, d]"""
    W_dec: Tensor
    """[n, d]"""
    b_enc: Tensor
    """[n]"""


class Rows(NamedTuple):
    """Gradients by feature row, master type; valid until the next ones are taken."""

    W_enc: Tensor
    """[F, d]"""
    W_dec: Tensor
    """[F, d]"""
    b_enc: Tensor
    """[F]"""
    squares: Tensor
    """Some numbers whose sum is the sum of the squares of all of these."""
    inner: Tensor
    """[d] gradient of what the encoder saw, summed over tokens: b_enc @ W_enc."""


class Update(NamedTuple):
    """One step of Adam, and what goes with it."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int
    """From 1."""
    unit: bool
    """Whether decoder rows are brought to norm 1 at the end."""
    pull: float
    """Share of the way to `home` that all parameters are drawn after Adam (`stagediff.sae.optimiser.pull`)."""
    home: dict[str, Tensor]
    """By name, shaped as `Weights.rows`; empty: no pull."""


class Kernels(Protocol):
    """Every method adds in an order that depends on shapes alone. x is the scaled batch [B, d] in master type."""

    name: str

    def largest(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest positive of each row of pre [n, F] (compute type): features [n, k] int32 (F: there were too few; these last) and
        values [n, k] fp32 (float64 where pre is). Ties: the lowest index.
        """
        ...

    def largest_of_all(self, pre: Tensor, count: int) -> tuple[Pairs, Tensor]:
        """The `count` largest positive of all of pre [B, F], and the smallest of them (0 where there were too few). Ties: the lowest token,
        then the lowest feature.
        """
        ...

    def decode(self, weights: Weights, pairs: Pairs, x: Tensor) -> Decoded:
        """Reconstruction, error, and the error's gradient in the activations."""
        ...

    def by_feature(self, pairs: Pairs, features: int) -> ByFeature:
        """Sorts."""
        ...

    def gradients(
        self, weights: Weights, pairs: Pairs, sorted_pairs: ByFeature, decoded: Decoded, inner: Tensor, extra: Extra | None, unit: bool
    ) -> Rows:
        """Weight gradients. `inner` [B, d] (compute type) is what the encoder saw; `unit`: the decoder's gradient loses its part along each row."""
        ...

    def update(self, weights: Weights, gradients: dict[str, Tensor], factor: Tensor | None, update: Update) -> None:
        """Takes a step with gradients (by name, shaped as `Weights.rows`) times `factor` [], and brings the copies in compute type up to date."""
        ...


class ThresholdKernels(Kernels, Protocol):
    """Kernels that find what passes a threshold: how many that is is looked at, so a GPU would be waited for."""

    def above(self, pre: Tensor, floor: Tensor, most: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What lies above `floor` [F] of pre [n, F]: its number for every token [n] int32, features [P] int32 and values [P] by token and feature.

        None for both where there are more than `most` in all.
        """
        ...


def choose(device: torch.device, compute: torch.dtype) -> Kernels:
    """The fastest kernels for this device that work here. Falls back with one warning, which says what is missing."""
    from stagediff.sae.sparse.reference import Reference

    asked = os.environ.get(KERNELS, "")
    if asked not in ("", "reference", "numba", "triton"):
        raise UserError(f"{KERNELS} is {asked!r}. Expected reference, numba or triton, or leave it unset for the fastest that works here.")
    fitting = {"cuda": "triton", "cpu": "numba"}.get(device.type, "reference")
    if asked not in ("", "reference", fitting):
        raise UserError(f"{KERNELS} is {asked!r}, but this training runs on {device.type}, which takes {fitting} or reference. Unset it.")
    if asked == "reference" or fitting == "reference" or compute not in (torch.bfloat16, torch.float32):
        return Reference()
    try:
        if fitting == "triton":
            from stagediff.sae.sparse.gpu import TritonKernels

            return TritonKernels(device)
        from stagediff.sae.sparse.cpu import NumbaKernels

        return NumbaKernels()
    except Exception as error:  # whatever a compiler may say: a training runs without it
        if asked:
            raise UserError(f"{KERNELS} is {asked!r}, but that does not work here: {type(error).__name__}: {error}") from error
        needs = "Triton and a GPU it knows" if fitting == "triton" else "numba"
        log.warning(
            "Sparse training falls back to plain torch, which is several times slower: %s did not work (%s: %s).",
            needs,
            type(error).__name__,
            error,
        )
        return Reference()


def choose_for_thresholds(device: torch.device, compute: torch.dtype) -> ThresholdKernels | None:
    """Kernels for the sparse steps of relu and jumprelu; None where dense ones are faster: on a GPU, and in plain torch."""
    if device.type != "cpu":
        return None
    chosen = choose(device, compute)  # which falls back where numba is missing
    return cast(ThresholdKernels, chosen) if chosen.name == "numba" else None
