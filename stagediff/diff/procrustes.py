"""The common rotation between the stages' decoders: the orthogonal map that best turns the base model's directions into the finetuned model's.

A finetune may turn the whole representation a little. Every feature's cosine then falls, which is no news about any one of them. Q minimises
||S Q - M|| over orthogonal Q, for the unit decoder rows of features alive in both (Schönemann, 1966): with S^T M = U W V^T, Q = U V^T. S and M
differ by the model alone; no new data is involved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stagediff.diff.decoders import Decoder, aligned_blocks, unit_rows

__all__ = ["FINETUNED", "Rotation", "Turned", "common_rotation"]

FINETUNED = ("M", "F_D", "F_M", "F_direct")
"""Stages whose dictionaries read the finetuned model; S and D read the base model."""


@dataclass(frozen=True)
class Rotation:
    """The common rotation and what it explains."""

    matrix: Tensor
    """[d, d] orthogonal, float64: a row u of the base model's becomes u @ matrix."""
    angle: float
    """Degrees by which it turns a direction, on average over the features it was fitted on."""
    before: float
    """Mean cosine of S's and M's rows as they are."""
    after: float
    """The same once S's rows are turned."""
    features: int

    def figures(self) -> dict[str, Any]:
        return {
            "rotation_angle": self.angle,
            "rotation_cosine_before": self.before,
            "rotation_cosine_after": self.after,
            "rotation_features": self.features,
        }


def common_rotation(decoders: Mapping[str, Decoder], alive: np.ndarray) -> Rotation:
    """Fits the rotation from S to M on the features that are `alive` [F]; the identity where there are none. Reads block by block."""
    d = decoders["S"].shape[1]
    both = {stage: decoders[stage] for stage in ("S", "M")}
    product = torch.zeros(d, d, dtype=torch.float64)
    for s, m, _ in _alive_rows(both, alive):
        product += s.T @ m
    u, _, vh = torch.linalg.svd(product)
    matrix = u @ vh if bool(product.any()) else torch.eye(d, dtype=torch.float64)
    sums, n = torch.zeros(3, dtype=torch.float64), 0
    for s, m, count in _alive_rows(both, alive):
        turned = s @ matrix
        own = (s * turned).sum(1).clamp(-1, 1)
        sums += torch.stack([torch.rad2deg(torch.arccos(own)).sum(), (s * m).sum(), (turned * m).sum()])
        n += count
    angle, before, after = (sums / max(n, 1)).tolist()
    return Rotation(matrix, angle, before, after, n)


class Turned(Decoder):
    """A decoder of the base model with its rows turned into the finetuned model's coordinates."""

    def __init__(self, decoder: Decoder, rotation: Rotation):
        self._path, self.shape, self._matrix = decoder._path, decoder.shape, rotation.matrix

    def rows(self, start: int, stop: int) -> Tensor:
        return super().rows(start, stop) @ self._matrix


def _alive_rows(decoders: Mapping[str, Decoder], alive: np.ndarray):
    for start, stop, rows in aligned_blocks(decoders):
        unit = {stage: unit_rows(of) for stage, of in rows.items()}
        kept = torch.from_numpy(np.array(alive[start:stop], bool)) & unit["S"].isfinite().all(1) & unit["M"].isfinite().all(1)
        yield unit["S"][kept], unit["M"][kept], int(kept.sum())
