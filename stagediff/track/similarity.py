"""How alike the vectors of a set are, pair by pair, by the four measures of SAE-Track (arXiv 2412.17626, section on feature formation).

Activation space: cosine of the residual-stream vectors. Feature space, codes a and b of one dictionary: cosine; Jaccard
|a != 0 & b != 0| / (|a != 0 or b != 0| + 1e-8); weighted Jaccard sum(min(a, b)) / (sum(max(a, b)) + 1e-8). A vector without any active feature has
similarity 0 to all others.

Codes are sparse: columns in which fewer than two of a set's vectors are active add nothing to a dot product, an intersection or a sum of minima. So pairs
are compared on the other columns alone; norms, counts and sums are taken over all. sum(min) = (|a| + |b| - |a - b|) / 2 with 1-norms, and
sum(max) = |a| + |b| - sum(min).
"""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["similarities"]

EPSILON = 1e-8
"""In the denominators of both Jaccard measures."""
SMALLEST_NORM = 1e-30


@torch.no_grad()
def similarities(x: Tensor, f: Tensor) -> Tensor:
    """[4, B, n (n - 1) / 2] fp32, in the order of MEASURES: every unordered pair (a < b, row by row) of B sets of n vectors.

    x: [B, n, d] residual-stream vectors, fp32; f: [B, n, F] their codes, fp32, >= 0.
    """
    n = x.shape[1]
    unit = functional.normalize(x, dim=2)
    norm, size, mass = f.norm(dim=2), f.count_nonzero(2).float(), f.sum(2)
    common = _shared_columns(f)
    active = (common > 0).float()
    both = active @ active.mT
    own = common.sum(2)
    smaller = (_sums(own) - torch.cdist(common, common, p=1)) / 2
    found = (
        unit @ unit.mT,
        common @ common.mT / _products(norm).clamp_min(SMALLEST_NORM),
        both / (_sums(size) - both + EPSILON),
        smaller / (_sums(mass) - smaller + EPSILON),
    )
    a, b = torch.triu_indices(n, n, 1, device=x.device)
    return torch.stack([each[:, a, b] for each in found])


def _shared_columns(f: Tensor) -> Tensor:
    """[B, n, U]: each set's columns in which at least two of its vectors are active, side by side; 0 behind a set's last one."""
    used = f.count_nonzero(1) > 1  # [B, F]
    count = used.sum(1)
    of, column = used.nonzero(as_tuple=True)
    place = torch.arange(len(of), device=f.device) - (count.cumsum(0) - count)[of]
    widest = int(count.max())
    columns = torch.zeros(len(f), widest, dtype=torch.int64, device=f.device)
    columns[of, place] = column
    is_one = torch.arange(widest, device=f.device) < count[:, None]
    return f.gather(2, columns[:, None].expand(-1, f.shape[1], -1)) * is_one[:, None]


def _sums(v: Tensor) -> Tensor:
    """[B, n] -> [B, n, n]"""
    return v[:, :, None] + v[:, None, :]


def _products(v: Tensor) -> Tensor:
    return v[:, :, None] * v[:, None, :]
