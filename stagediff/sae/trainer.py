"""Training one dictionary: its whole state, and one step. Where the data come from and where results go is `train.py`'s business.

Master weights and Adam's moments are fp32 (a measured case lost 0.11 of explained variance with bf16 ones). Nothing in a step waits for
the device: figures stay tensors until someone reads them. The state round-trips through `state` / `restore` bit by bit.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from stagediff.sae import dense
from stagediff.sae.batchtopk import followed
from stagediff.sae.dictionary import ARCHITECTURES, SAE
from stagediff.sae.focus import weights
from stagediff.sae.gradients import Context, Gradient
from stagediff.sae.optimiser import rate
from stagediff.sae.parallel import Team
from stagediff.sae.sharded import Shards
from stagediff.sae.sparse import engine as sparse
from stagediff.sae.sparse import thresholded
from stagediff.sae.sparse.kernels import Kernels, ThresholdKernels, choose, choose_for_thresholds
from stagediff.sae.spec import Budget

__all__ = ["DEAD_EVERY", "Trainer"]

DEAD_EVERY = 16
"""Steps between two looks at which features are dead (AuxK): the look waits for the device."""
SMALLEST_THRESHOLD = 1e-6


class Trainer:
    """A dictionary in training for `steps` steps.

    `warms_up`: whether the sparsity weight rises from 0 (training from scratch); finetunes keep it constant. `anchor`: how strongly all
    parameters are drawn to where they start (`optimiser.pull`). `team`: the ranks it is shared with; all of them take every step. `kernels`:
    who computes a sparse step (relu, jumprelu: with `above`); None: the fastest that works here. `gradient`: another loss of a dense architecture
    (relu, jumprelu) than its own.
    """

    def __init__(
        self,
        sae: SAE,
        budget: Budget,
        steps: int,
        warms_up: bool,
        compute: torch.dtype,
        anchor: float = 0.0,
        team: Team | None = None,
        kernels: Kernels | None = None,
        gradient: Callable[[dict[str, Tensor], Tensor, Context], Gradient] | None = None,
    ):
        self.budget, self.steps, self.step = budget, steps, 0
        self.team = team or Team()
        self._sae = sae.copy()
        self._warms_up = warms_up
        device = sae.W_dec.device
        s = self._sae
        parameters = {"W_enc": s.W_enc, "b_enc": s.b_enc, "W_dec": s.W_dec, "b_dec": s.b_dec}
        if sae.architecture == "jumprelu":
            assert s.threshold is not None
            parameters["log_threshold"] = s.threshold.clamp_min(SMALLEST_THRESHOLD).log()
        self._engine: dense.Engine | sparse.Engine
        shards = self.team if isinstance(self.team, Shards) else None
        focus = partial(weights, power=budget.focus, team=self.team) if budget.focus else None
        takes_pairs = sae.k is None and gradient is None and not self.team.splits_features
        found = (cast(ThresholdKernels | None, kernels) or choose_for_thresholds(device, compute)) if takes_pairs else None
        if found is not None:
            self._engine = thresholded.Engine(parameters, s.config, budget, compute, found, focus=focus)
        elif sae.k is None:
            own = gradient or ARCHITECTURES[sae.architecture].gradient
            self._engine = dense.Engine(parameters, s.config, budget, compute, own, self.team, focus)
        else:
            self._engine = sparse.Engine(parameters, s.config, budget, compute, kernels or choose(device, compute), shards, focus)
        self.parameters = self._engine.parameters
        # Not a second copy of what the engine may hold in another order.
        held: dict[str, Any] = {name: self.parameters[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        self._sae = replace(s, **held)
        self._anchor = anchor
        self._home = {name: parameter.clone() for name, parameter in self.parameters.items()} if anchor else {}
        self._smallest = (
            s.threshold[0].clone() if sae.architecture == "batchtopk" and s.threshold is not None else torch.zeros((), device=device)
        )
        self._silent = torch.zeros(sae.features, dtype=torch.int64, device=device)
        self._dead = torch.zeros(0, dtype=torch.int64, device=device)
        self._some_dead: bool | None = None
        """Whether any rank has dead features; None: not asked yet."""

    @torch.no_grad()
    def train_on(self, x: Tensor) -> Gradient:
        """One step on a batch x [B, d] in raw units. Returns its figures, taken before the update; `f` is that of this rank's slice."""
        config = self._sae.config
        if config.auxk and self.step % DEAD_EVERY == 0:
            self._dead = (self._silent >= config.dead_after).nonzero()[:, 0]
            self._some_dead = None
        if config.auxk and self._some_dead is None:
            self._some_dead = self.team.is_any(len(self._dead), self._silent.device)
        dead = self._dead if self._some_dead else None
        scaled = self.team.slice_of(x).to(self.parameters["b_dec"].dtype) * self._sae.input_scale
        outcome = self.team.reduce(self._engine.gradient(scaled, self.sparsity_weight, dead))
        lr = rate(self.step, self.steps, self.budget)
        self._engine.update(outcome, lr, self._anchor, self._home)
        if outcome.threshold is not None:
            self._smallest = followed(self._smallest, outcome.threshold)
        self._silent = (self._silent + len(x)).masked_fill_(outcome.fired, 0)
        self.step += 1
        return outcome

    @property
    def kernels(self) -> str:
        """Who computes the sparse steps: reference, numba or triton; empty where steps are dense."""
        return self._engine.kernels.name if isinstance(self._engine, sparse.Engine) else ""

    def is_finite(self) -> bool:
        """Whether all weights are. Waits for the device.

        The loss does not tell: a sparse step takes what is positive, so that a feature with NaN weights may just be silent.
        """
        return bool(self.team.total(torch.stack([value.sum() for value in self.parameters.values()])).isfinite().all())

    @property
    def input_scale(self) -> float:
        return self._sae.input_scale

    @property
    def sparsity_weight(self) -> float:
        """Weight of the sparsity term at the coming step."""
        config = self._sae.config
        rising = (self.step + 1) / max(1.0, config.l1_warmup * self.steps) if self._warms_up else 1.0
        return config.l1 * min(1.0, rising)

    def silent_share(self) -> Tensor:
        """Share of features without a firing in the last `dead_after` tokens (or since the start, where that is less)."""
        seen = min(self._sae.config.dead_after, self.step * self.budget.batch)
        return self.team.over_features((self._silent >= seen).double().mean())

    def dictionary(self) -> SAE:
        """The dictionary as it is now (a copy)."""
        W_enc, b_enc, W_dec, b_dec = (
            self.parameters[name].clone(memory_format=torch.contiguous_format) for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        sae = replace(self._sae, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
        if sae.architecture == "jumprelu":
            sae.threshold = self.parameters["log_threshold"].exp()
        elif sae.architecture == "batchtopk":
            sae.threshold = self._smallest.expand(sae.features).clone()
        return sae

    def optimiser_state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts, for another training to `carry` on."""
        return dict(self._engine.state())

    def carry(self, optimiser: dict[str, Tensor]) -> None:
        """Begins with another training's optimiser state."""
        self._engine.restore({name: value.clone() for name, value in optimiser.items()})

    @torch.no_grad()
    def renew(self, sae: SAE, features: Tensor) -> None:
        """Takes the weights of `features` (indices) from `sae`: they are new from here on, and so have no moments and are not dead yet.

        An anchor draws them to these weights. The other features' weights are left as they are, bit by bit.
        """
        features = features.to(self._silent.device)
        new = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec")}
        if sae.architecture == "jumprelu":
            assert sae.threshold is not None
            new["log_threshold"] = sae.threshold.clamp_min(SMALLEST_THRESHOLD).log()
        moments = self._engine.state()
        for name, value in new.items():
            dim = 1 if name == "W_enc" else 0
            chosen = value.index_select(dim, features)
            for target in (self.parameters, self._home):
                if name in target:
                    target[name].index_copy_(dim, features, chosen)
            for moment in ("exp_avg", "exp_avg_sq"):
                if f"adam.{name}.{moment}" in moments:  # none before the first step
                    moments[f"adam.{name}.{moment}"].index_fill_(dim, features, 0)
        self._silent[features] = 0
        self._dead = self._dead[~torch.isin(self._dead, features)]
        self._some_dead = None

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, besides data and spec. What an anchor draws to is part of it: the start need not be made again."""
        counters = {"silent": self._silent, "dead": self._dead, "smallest": self._smallest}
        return {**self.parameters, **self._engine.state(), **counters, **{f"home.{name}": value for name, value in self._home.items()}}

    def restore(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave after `step` steps."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self._engine.restore(tensors)
        device = self._silent.device
        self._silent, self._dead, self._smallest = (tensors[name].to(device) for name in ("silent", "dead", "smallest"))
        self._some_dead = None
        for name, home in self._home.items():
            home.copy_(tensors[f"home.{name}"])
        self.step = step
