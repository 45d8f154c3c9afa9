"""An easy planted dictionary: 24 atoms in 16 dimensions, two of which make each vector."""

import pytest
import torch

from stagediff.synthetic.classical.dictionary import unit


@pytest.fixture(scope="session")
def easy() -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [3000, 16] and the atoms [24, 16] that they are made of."""
    g = torch.Generator().manual_seed(5)
    atoms = unit(torch.randn(24, 16, generator=g))
    chosen = torch.rand(3000, 24, generator=g).topk(2).indices
    amplitudes = torch.zeros(3000, 24).scatter_(1, chosen, 0.5 + torch.rand(3000, 2, generator=g))
    return amplitudes @ atoms + 0.01 * torch.randn(3000, 16, generator=g), atoms
