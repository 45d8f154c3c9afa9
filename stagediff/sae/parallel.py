"""Data parallel training: the ranks that train one dictionary together (torch.distributed, set up by `stagediff.ranks`).

Every rank reads the whole stream of batches and takes its slice of each; gradients and figures are means over tokens, so the mean over ranks
with slices of the same size is the batch's own. All else is the same on every rank: parameters, optimiser, counters. Sums over slices round
differently than one sum over the batch, so the result equals that of one rank to rounding, and bit by bit only that of as many ranks (the world
size belongs to the numerics class).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stagediff.ranks import RankLostError
from stagediff.sae.gradients import Gradient

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE
    from stagediff.sae.trainer import Trainer

__all__ = ["Team", "or_lost"]

T = TypeVar("T")


class Team:
    """The ranks of this training; one where nothing was set up."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    splits_features = False
    """Whether a rank holds some of the features only (`sae.sharded`)."""

    def slice_of(self, x: Tensor) -> Tensor:
        """This rank's share of a batch [B, d]: [B / size, d]."""
        return x if self.size == 1 else x.chunk(self.size)[self.rank]

    def reduce(self, own: Gradient) -> Gradient:
        """The batch's outcome from those of its slices; `f` stays the slice's."""
        if self.size == 1:
            return own
        figures = self.mean(torch.stack([own.loss, own.error, own.sparsity]))
        gradients = {name: self.mean(gradient) for name, gradient in own.gradients.items()}
        fired = own.fired.to(torch.uint8)
        or_lost(lambda: dist.all_reduce(fired, dist.ReduceOp.MAX))
        return own._replace(loss=figures[0], error=figures[1], sparsity=figures[2], gradients=gradients, fired=fired.bool(), squares=None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.size > 1:
            whole = value if value.is_contiguous() else value.t()  # a sparse training's encoder lies by feature
            or_lost(lambda: dist.all_reduce(whole))
            value /= self.size
        return value

    def everyones(self, own: Tensor) -> Tensor:
        """A value [n] for each token of the whole batch from those of each rank's slice, on every rank."""
        if self.size == 1:
            return own
        found = [torch.empty_like(own) for _ in range(self.size)]
        or_lost(lambda: dist.all_gather(found, own.contiguous()))
        return torch.cat(found)

    def own(self, sae: "SAE") -> "SAE":
        """What this rank holds of a dictionary."""
        return sae

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks of what each has of its own features: here each has all."""
        return value

    def l0(self, outcome: Gradient) -> Tensor:
        """Active features per token of the whole batch."""
        return self.mean(outcome.l0)

    def over_features(self, share: Tensor) -> Tensor:
        """A mean over all features from that over this rank's."""
        return share

    def is_any(self, count: int, device: torch.device) -> bool:
        """Whether any rank has a count."""
        return count > 0

    def resume(self, trainer: "Trainer", step: int, tensors: dict[str, Tensor]) -> None:
        """Puts back a checkpoint; `agree` tells the other ranks."""
        trainer.restore(step, tensors)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of the whole dictionary from each rank's, on the CPU."""
        return {name: value.cpu() for name, value in tensors.items()}

    def dictionary(self, trainer: "Trainer") -> "SAE | None":
        """The dictionary as it is now; None at ranks that do not get it."""
        return trainer.dictionary()

    def agree(self, trainer: "Trainer") -> None:
        """Gives every rank the first one's state: where the training was left, or its beginning."""
        if self.size == 1:
            return
        device = trainer.parameters["b_dec"].device
        state = trainer.state() if self.rank == 0 else {}
        told: list[Any] = [trainer.step, {name: (tuple(value.shape), value.dtype) for name, value in state.items()}]
        or_lost(lambda: dist.broadcast_object_list(told, src=0))
        step, outline = told
        received = {}
        for name, (shape, dtype) in outline.items():  # one at a time on the device, which has no room for all of them twice
            value = state[name].to(device).contiguous() if self.rank == 0 else torch.empty(shape, dtype=dtype, device=device)
            _receive(value)
            if self.rank:
                received[name] = value.cpu()
        if self.rank:
            trainer.restore(step, received)


def _receive(value: Tensor) -> None:
    """Fills a tensor with the first rank's."""
    if value.numel():
        or_lost(lambda: dist.broadcast(value, src=0))


def or_lost(call: Callable[[], T]) -> T:
    """A call that needs the other ranks: raises RankLostError where one is gone."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankLostError(f"another rank does not answer: {error}") from error
