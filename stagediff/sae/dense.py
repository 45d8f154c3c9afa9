"""One training step over dense activations (relu, jumprelu): the architecture's gradient, torch's fused Adam. `sparse.engine` is its counterpart."""

from collections.abc import Callable

import torch
from torch import Tensor

from stagediff.sae.gradients import Context, Gradient
from stagediff.sae.optimiser import Optimiser, clip, pull
from stagediff.sae.parallel import Team
from stagediff.sae.spec import Budget, DictionaryConfig

__all__ = ["Engine"]


class Engine:
    """Parameters by name, changed in place, and Adam's moments. The config with every default resolved."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: DictionaryConfig,
        budget: Budget,
        compute: torch.dtype,
        gradient: Callable[[dict[str, Tensor], Tensor, Context], Gradient],
        team: Team,
        focus: Callable[[Tensor], Tensor] | None = None,
    ):
        self.parameters = parameters
        self._config, self._budget, self._compute, self._gradient = config, budget, compute, gradient
        self._team, self._focus = team, focus
        self._optimiser = Optimiser(parameters, budget)

    def gradient(self, x: Tensor, sparsity: float, dead: Tensor | None) -> Gradient:
        """Loss and gradients on a scaled batch x [B, d] in master type."""
        assert dead is None, "AuxK is topk's and batchtopk's"
        return self._gradient(self.parameters, x, Context(self._config, sparsity, self._compute, None, self._team.total, focus=self._focus))

    def update(self, outcome: Gradient, lr: float, anchor: float, home: dict[str, Tensor]) -> None:
        """Takes a step: clip (the outcome's gradients are changed), Adam, the pull of `anchor` to `home` (0: none), unit rows."""
        clip(outcome.gradients, self._budget.clip, outcome.squares)
        self._optimiser.step(outcome.gradients, lr)
        if anchor:
            pull(self.parameters, home, anchor, lr)
        if self._config.decoder_norm == "unit":
            W_dec = self.parameters["W_dec"]
            W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def state(self) -> dict[str, Tensor]:
        """Of the optimiser."""
        return self._optimiser.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self._optimiser.restore(tensors)
