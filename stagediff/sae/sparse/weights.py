"""Weights and Adam's moments of a sparse training, all by feature row: what belongs to a feature lies together.

The encoder is held as [F, d]; `parameters["W_enc"]` is its transpose [d, F], a view, so that readers, checkpoints and optimiser states see the
shapes that every architecture has. Masters and moments are fp32. The encoder's product and the decoder's rows are read from copies in compute
type; the pass that changes a row writes its copy. Whoever else changes weights does it by torch, whose version counters tell.
"""

import torch
from torch import Tensor

__all__ = ["MATRICES", "Weights"]

MATRICES = ("W_enc", "W_dec")


class Weights:
    """Parameters by name in `parameters` (SAE's shapes) and in `rows` (W_enc: [F, d]; the others as they are); the same memory.

    `first` and `second` hold Adam's moments in the shapes of `rows`, `steps` the number of updates made.
    """

    def __init__(self, parameters: dict[str, Tensor], compute: torch.dtype):
        """Takes over W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d]. Their memory may be changed from here on."""
        self.rows = {name: (value.t() if name == "W_enc" else value).contiguous() for name, value in parameters.items()}
        self.parameters = {name: _turned(name, value) for name, value in self.rows.items()}
        self.compute = compute
        self.first = {name: torch.zeros_like(value) for name, value in self.rows.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.rows.items()}
        self.steps = 0
        self._copies: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}

    @property
    def features(self) -> int:
        return self.rows["W_dec"].shape[0]

    def copy_of(self, name: str) -> Tensor:
        """A matrix by rows [F, d] in compute type; the master itself where that is its type."""
        master = self.rows[name]
        if master.dtype == self.compute:
            return master
        if self._seen.get(name) != master._version:
            self._copy(name)
        return self._copies[name]

    def renew_copies(self) -> None:
        """After an update that changed the masters alone (a fused optimiser does not count as a change of version)."""
        for name in self._copies:
            self._copy(name)

    def _copy(self, name: str) -> None:
        master = self.rows[name]
        if name in self._copies:
            self._copies[name].copy_(master)
        else:
            self._copies[name] = master.to(self.compute)
        self._seen[name] = master._version

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, named and shaped as `stagediff.sae.optimiser.Optimiser.state` does."""
        out: dict[str, Tensor] = {}
        for name in self.rows:
            out[f"adam.{name}.step"] = torch.tensor(float(self.steps))
            out[f"adam.{name}.exp_avg"] = _turned(name, self.first[name])
            out[f"adam.{name}.exp_avg_sq"] = _turned(name, self.second[name])
        return out

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes the values that `state` gave (parameters are no part of them); the tensors themselves are left alone."""
        self.steps = int(tensors["adam.W_dec.step"])
        for name in self.rows:
            _turned(name, self.first[name]).copy_(tensors[f"adam.{name}.exp_avg"])
            _turned(name, self.second[name]).copy_(tensors[f"adam.{name}.exp_avg_sq"])


def _turned(name: str, value: Tensor) -> Tensor:
    """Between the shapes of `rows` and those of `parameters`."""
    return value.t() if name == "W_enc" else value
