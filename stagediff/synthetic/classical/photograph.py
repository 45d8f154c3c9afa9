"""Photographs as vectors: one of scikit-learn's, noise upon it, its overlapping patches, and the picture that patches make when laid over each other."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, fold

from stagediff.errors import UserError

__all__ = ["PATCH", "PHOTOGRAPHS", "cosines", "joined", "noisy", "patches", "photograph", "psnr"]

PATCH = 8
"""Pixels of a patch's side."""
PHOTOGRAPHS = ("china", "flower")
GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def photograph(name: str) -> Tensor:
    """One of scikit-learn's photographs, grey from 0 to 1 and half as large: [213, 320]. Raises UserError when there is none of that name."""
    from sklearn.datasets import load_sample_image

    if name not in PHOTOGRAPHS:
        raise UserError(f"There is no photograph {name!r} in scikit-learn; it has {' and '.join(PHOTOGRAPHS)}.")
    grey = torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).float() @ torch.tensor(GREY) / 255
    return avg_pool2d(grey[None], 2)[0]


def noisy(image: Tensor, sigma: float, seed: int) -> Tensor:
    """The image with Gaussian noise of that standard deviation; values may leave [0, 1]."""
    return image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


def patches(image: Tensor) -> Tensor:
    """All overlapping patches, [n, PATCH^2], row by row."""
    return image.unfold(0, PATCH, 1).unfold(1, PATCH, 1).reshape(-1, PATCH * PATCH)


def joined(of: Tensor, shape: torch.Size) -> Tensor:
    """The image of that shape whose pixels are the means over all patches [n, PATCH^2] that hold them."""
    columns = torch.stack([of.t(), torch.ones_like(of.t())])
    total, count = fold(columns, (shape[0], shape[1]), PATCH)[:, 0]
    return total / count


def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels, for values from 0 to 1."""
    return float(-10 * (image.double() - clean.double()).square().mean().log10())


def cosines(side: int = 16) -> Tensor:
    """The overcomplete discrete cosine dictionary [side^2, PATCH^2]: a fixed one, of unit atoms (Elad, Aharon 2006, section IV)."""
    at = torch.arange(PATCH, dtype=torch.float64)
    waves = torch.cos(torch.pi / side * torch.arange(side, dtype=torch.float64)[:, None] * at)
    waves[1:] -= waves[1:].mean(1, keepdim=True)
    waves /= waves.norm(dim=1, keepdim=True)
    return torch.kron(waves, waves).float()
