"""Adam over named fp32 parameters, its learning-rate schedule, gradient clipping and a pull towards given weights; its state can be stored."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.gradients import clip_factor

if TYPE_CHECKING:
    from stagediff.sae.spec import Budget

__all__ = ["Optimiser", "clip", "pull", "pulled_share", "rate"]


def rate(step: int, steps: int, budget: "Budget") -> float:
    """Learning rate of a step (from 0): linear warm-up over `budget.warmup`, flat, linear to 0 over the last `budget.decay`."""
    up = min(1.0, (step + 1) / max(1.0, budget.warmup * steps))
    down = min(1.0, (steps - step) / max(1.0, budget.decay * steps))
    return budget.lr * up * down


def clip(gradients: dict[str, Tensor], largest: float, squares: Tensor | None = None) -> None:
    """Scales all gradients, in place, so that their common norm is at most `largest`; 0 means no limit. No host sync.

    `squares`: the sum of all squares, where it is known already.
    """
    if largest <= 0:
        return
    factor = clip_factor(gradients, largest, squares)
    for gradient in gradients.values():
        gradient.mul_(factor)


def pull(parameters: dict[str, Tensor], home: dict[str, Tensor], anchor: float, lr: float) -> None:
    """Pulls parameters W towards `home` W_0, in place: the step of the penalty anchor * ||W - W_0||^2 after Adam's own.

    The step is implicit, argmin_V anchor ||V - W_0||^2 + ||V - W||^2 / (2 lr), so V - W_0 = (W - W_0) / (1 + 2 lr anchor): it pins W for
    a large anchor. Inside the gradient (L2-SP) it would not: Adam divides a gradient by its own size and moves by about lr however large
    the anchor is, and the gradient's clip would take the data's part away. Decoupled as AdamW's decay is (Loshchilov & Hutter 2019),
    towards W_0 instead of 0. A weight that Adam drives one way comes to rest 1 / (2 anchor) from home.
    """
    for name, parameter in parameters.items():
        parameter.lerp_(home[name], pulled_share(anchor, lr))


def pulled_share(anchor: float, lr: float) -> float:
    """The share of the way home that `pull` takes parameters."""
    strength = 2 * lr * anchor
    return strength / (1 + strength)


class Optimiser:
    """torch's fused Adam. The parameters are changed in place."""

    def __init__(self, parameters: dict[str, Tensor], budget: "Budget"):
        self._parameters = parameters
        self._adam = torch.optim.Adam(list(parameters.values()), lr=budget.lr, betas=budget.betas, eps=1e-8, fused=True)

    def step(self, gradients: dict[str, Tensor], lr: float) -> None:
        """One update; gradients by parameter name."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for name, parameter in self._parameters.items():
            parameter.grad = gradients[name]
        self._adam.step()
        for parameter in self._parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, by "adam.<parameter>.<name>"."""
        return {f"adam.{name}.{key}": value for name, p in self._parameters.items() for key, value in self._adam.state[p].items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        for name, parameter in self._parameters.items():
            prefix = f"adam.{name}."
            state = {key.removeprefix(prefix): value.to(parameter.device) for key, value in tensors.items() if key.startswith(prefix)}
            self._adam.state[parameter] = state
