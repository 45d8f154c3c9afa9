"""One training step of topk or batchtopk over sparse activations: gradients, and the update that they lead to.

The same step as the dense algebra's, L = 1/B sum_b ||x_hat_b - x_b||^2 + AuxK, with the same clip by the common norm of all gradients; which is
why there are two passes over the weights and not one: gradients, their norm, then the update. The batch goes through the encoder's product in
chunks, so that pre-activations are never held for all of it (topk) and stay in the cache (CPU).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stagediff.sae.auxk import auxk
from stagediff.sae.gradients import Gradient, alone, clip_factor
from stagediff.sae.optimiser import pulled_share
from stagediff.sae.sparse.kernels import Decoded, Kernels, Update
from stagediff.sae.sparse.pairs import Pairs
from stagediff.sae.sparse.weights import Weights

if TYPE_CHECKING:
    from stagediff.sae.sharded import Shards
    from stagediff.sae.spec import Budget, DictionaryConfig

__all__ = ["Engine", "Focus", "gradient", "weighted"]

Focus = Callable[[Tensor], Tensor]
"""From squared errors [B] to the tokens' weights [B] (`sae.focus`)."""

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
"""Pre-activations that are held at once. On a CPU: about what its last cache holds; a chunk has at least FEWEST_TOKENS tokens."""
FEWEST_TOKENS = 256
EPS = 1e-8


class Engine:
    """Weights, moments and the step. `parameters` as for `Weights`; the config with every default resolved."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        config: "DictionaryConfig",
        budget: "Budget",
        compute: torch.dtype,
        kernels: Kernels,
        shards: "Shards | None" = None,
        focus: Focus | None = None,
    ):
        self.weights = Weights(parameters, compute)
        self.kernels = kernels
        self._config, self._budget, self._shards, self._focus = config, budget, shards, focus

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name, in the shapes that every architecture has."""
        return self.weights.parameters

    def gradient(self, x: Tensor, sparsity: float, dead: Tensor | None) -> Gradient:
        """Loss and gradients on a scaled batch x [B, d] in master type; `dead`: indices of dead features (AuxK), None: there are none."""
        return gradient(self.weights, self._config, self.kernels, x, dead, self._shards, self._focus)

    def update(self, outcome: Gradient, lr: float, anchor: float, home: dict[str, Tensor]) -> None:
        """Takes a step: clip, Adam, the pull of `anchor` to `home` (parameters' names and shapes; empty: none), unit rows."""
        weights, budget = self.weights, self._budget
        weights.steps += 1
        unit = self._config.decoder_norm == "unit"
        settings = Update(lr, budget.betas, EPS, weights.steps, unit, pulled_share(anchor, lr), _by_rows(home))
        factor = clip_factor(outcome.gradients, budget.clip, outcome.squares) if budget.clip > 0 else None
        self.kernels.update(weights, _by_rows(outcome.gradients), factor, settings)

    def state(self) -> dict[str, Tensor]:
        """Of the optimiser."""
        return self.weights.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` gave."""
        self.weights.restore(tensors)


def gradient(
    weights: Weights,
    config: "DictionaryConfig",
    kernels: Kernels,
    x: Tensor,
    dead: Tensor | None,
    shards: "Shards | None" = None,
    focus: Focus | None = None,
) -> Gradient:
    """The gradient of a step, see `Engine.gradient`. `shards`: the ranks among which features are split. AuxK has no focus."""
    rows, n = weights.rows, len(x)
    inner = (x - rows["b_dec"] if config.subtract_b_dec else x).to(weights.compute)
    pairs, smallest = _active(weights, config, kernels, inner, shards)
    decoded = shards.decode(kernels, weights, pairs, x) if shards else kernels.decode(weights, pairs, x)
    if focus:
        decoded = weighted(decoded, pairs, focus(decoded.squares))
    squared = loss = decoded.squares.sum() / n
    extra = None
    if dead is not None and config.auxk:
        term, extra = auxk(config, weights, kernels, inner, decoded.error, dead, shards)
        loss = loss + term
    total = shards.total if shards else alone
    unit = config.decoder_norm == "unit"
    sorted_pairs = kernels.by_feature(pairs, weights.features)
    found = kernels.gradients(weights, pairs, sorted_pairs, decoded, inner, extra, unit)
    b_dec = decoded.total * (2 / n)
    if config.subtract_b_dec:
        b_dec -= total(found.inner)
    gradients = {"W_enc": found.W_enc.t(), "b_enc": found.b_enc, "W_dec": found.W_dec, "b_dec": b_dec}
    squares = total(found.squares.sum()) + b_dec.square().sum()
    return Gradient(loss, squared, torch.zeros_like(squared), pairs, sorted_pairs.fired, gradients, smallest, squares)


def _active(
    weights: Weights, config: "DictionaryConfig", kernels: Kernels, inner: Tensor, shards: "Shards | None"
) -> tuple[Pairs, Tensor | None]:
    """The active features of the batch, and batchtopk's smallest activation."""
    n, F, k = len(inner), weights.features, config.k
    W_enc, b_enc = weights.copy_of("W_enc").t(), weights.rows["b_enc"].to(weights.compute)
    if config.architecture == "batchtopk":  # chooses among all of them
        if shards is None:
            return kernels.largest_of_all(torch.addmm(b_enc, inner, W_enc), k * n)
        return shards.keep_of_all(kernels.largest_of_all(torch.addmm(b_enc, inner, W_enc), min(k, F) * n)[0], k * n)
    at_once = max(FEWEST_TOKENS, CHUNK_BYTES.get(inner.device.type, n * F) // (F * inner.element_size()))
    pre = inner.new_empty(min(n, at_once), F)
    found = []
    for part in inner.split(at_once):
        out = pre[: len(part)]
        torch.addmm(b_enc, part, W_enc, out=out)
        largest = kernels.largest(out, min(k, F))
        found.append(shards.keep(*largest, k) if shards else largest)
    feature, value = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    k = feature.shape[1]
    start = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=inner.device)
    token = torch.arange(n, dtype=torch.int32, device=inner.device)[:, None].expand(n, k).flatten()
    return Pairs(feature.flatten(), value.flatten(), token, start), None


def weighted(decoded: Decoded, pairs: Pairs, weight: Tensor) -> Decoded:
    """With the gradients of a loss in which tokens count by `weight` [B]; error and squares stay as they are."""
    scaled = decoded.scaled.mul_(weight[:, None])
    return decoded._replace(scaled=scaled, total=weight @ decoded.error, g=decoded.g * weight.index_select(0, pairs.token))


def _by_rows(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.t() if name == "W_enc" else value for name, value in values.items()}
