"""Feature-sharded training: every rank holds F / n rows of encoder and decoder, with their moments and copies, and reads whole batches.

For dictionaries that one device does not hold. Rank r has the features from r F / n on, encodes these alone, and the ranks agree on three things in a
step: which features are active (topk and batchtopk: each rank's candidates are gathered and the largest of all are kept, equal ones by index as on one
rank), the reconstruction (a sum over ranks, fp32), and sums of numbers (loss terms, norms). The way back is each feature's own. Selection is exact;
sums over ranks round differently than one product does, so the result equals one rank's to rounding (decision 010), and bit by bit that of as many ranks.

Checkpoints, optimiser and dictionary are gathered at the first rank and are those of a training on one: it may go on with another number of ranks.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from stagediff.ranks import shard_here
from stagediff.sae.dictionary import SAE
from stagediff.sae.gradients import Gradient
from stagediff.sae.parallel import Team, or_lost
from stagediff.sae.sharing import check
from stagediff.sae.sparse.pairs import Pairs
from stagediff.sae.spec import FinetuneSpec, TrainSpec

if TYPE_CHECKING:
    from stagediff.sae.sparse.kernels import Decoded, Kernels
    from stagediff.sae.sparse.weights import Weights
    from stagediff.sae.trainer import Trainer

__all__ = ["Shards", "team_of"]

SPLIT = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "log_threshold": 0, "threshold": 0, "silent": 0}
"""Along which dimension features lie. What is not named here is the same on every rank."""


def team_of(spec: TrainSpec | FinetuneSpec, architecture: str, features: int) -> Team:
    """The ranks of this training, by what STAGEDIFF_SHARD says. Raises UserError where they cannot share it."""
    shard, ranks = shard_here(), Team().size
    check(spec, architecture, features, ranks, shard)
    return Shards(features) if shard == "features" and ranks > 1 else Team()


class Shards(Team):
    """The ranks among which a dictionary's features are split."""

    splits_features = True

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.own_features = features // self.size
        self.first = self.rank * self.own_features
        self._saved: tuple[int, dict[str, Tensor]] | None = None

    # The trainer's side

    def own(self, sae: SAE) -> SAE:
        """This rank's features."""
        parts: dict[str, Any] = {name: self._part(name, getattr(sae, name), self.rank).clone() for name in ("W_enc", "b_enc", "W_dec")}
        threshold = None if sae.threshold is None else self._part("threshold", sae.threshold, self.rank).clone()
        return replace(sae, **parts, threshold=threshold)

    def slice_of(self, x: Tensor) -> Tensor:
        """All of the batch."""
        return x

    def everyones(self, own: Tensor) -> Tensor:
        """Each rank sees all tokens."""
        return own

    def reduce(self, own: Gradient) -> Gradient:
        """Gradients are this rank's features'; their squares are summed over all, each parameter once."""
        if own.squares is not None:
            return own
        split = torch.stack([value.square().sum() for name, value in own.gradients.items() if name in SPLIT]).sum()
        return own._replace(squares=self.total(split) + own.gradients["b_dec"].square().sum())

    def total(self, value: Tensor) -> Tensor:
        whole = value.contiguous()
        or_lost(lambda: dist.all_reduce(whole))
        return whole

    def l0(self, outcome: Gradient) -> Tensor:
        return self.total(outcome.l0.double())

    def over_features(self, share: Tensor) -> Tensor:
        return self.total(share) / self.size

    def is_any(self, count: int, device: torch.device) -> bool:
        return bool(self.total(torch.tensor(count, device=device)) > 0)

    # The sparse step's side

    def keep(self, feature: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Which of this rank's candidates are among the k largest of all ranks' for their token.

        `feature`, `value` [n, c], c <= k, as `Kernels.largest` gives them. Those that are not come last, as empty slots. Ranks gather
        8 n k bytes of each other.
        """
        keys = _keys(value, feature.long() + self.first)
        least = self._least(keys, k)
        kept = (keys >= least[:, None]) & (keys > 0)
        order = kept.logical_not().byte().argsort(dim=1, stable=True)
        kept = kept.gather(1, order)
        feature, value = feature.gather(1, order), value.gather(1, order)
        return feature.masked_fill(~kept, self.own_features), value.masked_fill(~kept, 0)

    def keep_of_all(self, pairs: Pairs, count: int) -> tuple[Pairs, Tensor]:
        """Which of this rank's candidates are among the `count` largest of all ranks' for the whole batch, and the smallest of these.

        Ranks gather 8 `count` bytes of each other.
        """
        n = len(pairs.start) - 1
        keys = _keys(pairs.value, pairs.token.long() * self.features + self.first + pairs.feature)
        least = self._least(keys[None], count)[0]
        kept = (keys >= least) & (keys > 0)
        order = kept.logical_not().byte().argsort(stable=True)
        kept = kept[order]
        token = pairs.token[order].masked_fill(~kept, n)
        start = torch.searchsorted(token, torch.arange(n + 1, dtype=torch.int32, device=token.device), out_int32=True)
        smallest = (least >> 32).int().view(torch.float32)
        feature, value = pairs.feature[order].masked_fill(~kept, self.own_features), pairs.value[order].masked_fill(~kept, 0)
        return Pairs(feature, value, token.clamp_max(n - 1), start), smallest

    def decode(self, kernels: "Kernels", weights: "Weights", pairs: Pairs, x: Tensor) -> "Decoded":
        """`Kernels.decode` where others hold the other features.

        Kernels know one reconstruction and one target. So they decode twice: against a target that makes the error this rank's share of the sum,
        and, once the whole error is known, against the one from which this rank's share is just that far away.
        """
        target = x if self.rank == 0 else weights.rows["b_dec"].expand_as(x).contiguous()
        share = kernels.decode(weights, pairs, target).error
        error = self.total(share.clone())
        back = kernels.decode(weights, pairs, share + target - error)
        scaled = (error * (2 / len(x))).to(back.scaled.dtype)
        return back._replace(error=error, scaled=scaled, squares=error.square().sum(1), total=error.sum(0))

    def _least(self, keys: Tensor, k: int) -> Tensor:
        """[n] the k-th largest of all ranks' keys [n, c]; 0 where there are fewer."""
        padded = torch.nn.functional.pad(keys, (0, k - keys.shape[1])).contiguous()
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        or_lost(lambda: dist.all_gather(everyone, padded))
        return torch.cat(everyone, 1).topk(k, dim=1, sorted=False).values.amin(1)

    # Checkpoints

    def resume(self, trainer: "Trainer", step: int, tensors: dict[str, Tensor]) -> None:
        """`agree` will hand out this state of the whole training."""
        self._saved = (step, tensors)

    def agree(self, trainer: "Trainer") -> None:
        """Gives every rank its part of what the first one resumes; without that, all stand at their beginning already."""
        saved, self._saved = self._saved, None
        step, tensors = saved or (0, {})
        told: list[Any] = [step, {name: value.dtype for name, value in tensors.items()}]
        or_lost(lambda: dist.broadcast_object_list(told, src=0))
        step, outline = told
        if not outline:
            return
        device = trainer.parameters["b_dec"].device
        trainer.restore(step, {name: self._handed_out(tensors.get(name), name, dtype, device) for name, dtype in outline.items()})

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """At the first rank all features' tensors, on the CPU; nothing at the others. All ranks call it with the same names."""
        found = {name: self._gathered(name, value) for name, value in tensors.items()}
        return {name: value for name, value in found.items() if value is not None}

    def dictionary(self, trainer: "Trainer") -> SAE | None:
        own = trainer.dictionary()
        names = [name for name in ("W_enc", "b_enc", "W_dec", "threshold") if getattr(own, name) is not None]
        found: dict[str, Any] = dict(self.whole({name: getattr(own, name) for name in names}))
        return replace(own, **found, b_dec=own.b_dec.cpu()) if self.rank == 0 else None

    def _gathered(self, name: str, own: Tensor) -> Tensor | None:
        dim = _dim(name)
        if name == "dead":
            own, dim = own + self.first, 0
        if dim is None:
            return own.cpu() if self.rank == 0 else None
        sizes: list[Any] = [None] * self.size
        or_lost(lambda: dist.all_gather_object(sizes, own.shape[dim]))
        by_feature = own.movedim(dim, 0).contiguous()  # what belongs to a rank lies together
        if self.rank:
            if own.numel():
                or_lost(lambda: dist.send(by_feature, 0))
            return None
        shape = list(own.shape)
        shape[dim] = sum(sizes)
        out, at = torch.empty(shape, dtype=own.dtype), 0
        for rank, size in enumerate(sizes):
            part = by_feature if rank == 0 else by_feature.new_empty(size, *by_feature.shape[1:])
            if rank and part.numel():
                or_lost(lambda part=part, rank=rank: dist.recv(part, rank))  # type: ignore[misc]
            out.narrow(dim, at, size).copy_(part.movedim(0, dim))
            at += size
        return out

    def _handed_out(self, whole: Tensor | None, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        own = None
        shapes: list[Any] = [[tuple(self._part(name, whole, rank).shape) for rank in range(self.size)] if whole is not None else None]
        or_lost(lambda: dist.broadcast_object_list(shapes, src=0))
        for rank in range(1, self.size):
            if 0 in shapes[0][rank] or self.rank not in (0, rank):
                continue
            if whole is not None:
                part = self._part(name, whole, rank).contiguous().to(device)
                or_lost(lambda part=part, rank=rank: dist.send(part, rank))  # type: ignore[misc]
            else:
                own = torch.empty(shapes[0][rank], dtype=dtype, device=device)
                or_lost(lambda own=own: dist.recv(own, 0))  # type: ignore[misc]
        if whole is not None:
            return self._part(name, whole, 0).to(device)
        return torch.empty(shapes[0][self.rank], dtype=dtype, device=device) if own is None else own

    def _part(self, name: str, whole: Tensor, rank: int) -> Tensor:
        first = rank * self.own_features
        if name == "dead":
            return whole[(whole >= first) & (whole < first + self.own_features)] - first
        dim = _dim(name)
        return whole if dim is None else whole.narrow(dim, first, self.own_features)


def _dim(name: str) -> int | None:
    """Of a name in `Trainer.state`: W_enc, adam.W_enc.exp_avg, home.W_enc, …"""
    if name.endswith(".step"):
        return None
    return next((SPLIT[word] for word in name.split(".") if word in SPLIT), None)


def _keys(value: Tensor, index: Tensor) -> Tensor:
    """Integers that sort like positive values (fp32), equal ones by the lower index (below 2^32); 0 for the others."""
    patterns = value.float().view(torch.int32).long()
    return ((patterns << 32) | (0xFFFFFFFF - index)).masked_fill_(value <= 0, 0)
