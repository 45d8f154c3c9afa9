"""One training step of relu or jumprelu over its active features, as long as these are few; else by the dense algebra.

A trained dictionary has some tens of active features per token, an untrained one half of all. Where the first tokens of a batch are sparse enough,
the step is `engine`'s: one dense product, then pairs. What pairs hold besides: the penalty's part of every activation's gradient, and (jumprelu) the
features whose pre-activation lies within the threshold's kernel without passing it, with value 0, for the threshold's pseudo-derivative.
The same step as `relu.gradient` and `jumprelu.gradient`; which way it goes depends on weights and batch alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stagediff.sae import jumprelu, relu
from stagediff.sae.gradients import Context, Gradient
from stagediff.sae.sparse import engine
from stagediff.sae.sparse.kernels import Decoded, ThresholdKernels
from stagediff.sae.sparse.pairs import ByFeature, Pairs

__all__ = ["Engine"]

SPARSE_BELOW = 1 / 32
"""Share of features per token up to which pairs cost less than four dense products (about where both take as long, at d 128 and at d 512)."""
LOOK = 256
"""Tokens of a batch by which this is judged."""


class _Active(NamedTuple):
    pairs: Pairs
    by_feature: ByFeature
    feature: Tensor
    """[P] int64, of each pair."""


class Engine(engine.Engine):
    """Weights, moments and the step. `parameters` may hold `log_threshold` [F] besides those of `Weights` (jumprelu)."""

    kernels: ThresholdKernels

    def gradient(self, x: Tensor, sparsity: float, dead: Tensor | None) -> Gradient:
        """Loss and gradients on a scaled batch x [B, d] in master type."""
        assert dead is None, "AuxK is topk's and batchtopk's"
        rows, config = self.weights.rows, self._config
        is_jump = config.architecture == "jumprelu"
        threshold = rows["log_threshold"].exp() if is_jump else None
        inner = (x - rows["b_dec"] if config.subtract_b_dec else x).to(self.weights.compute)
        pairs = self._above(
            inner, rows["b_dec"].new_zeros(self.weights.features) if threshold is None else threshold - config.bandwidth / 2
        )
        if pairs is None:
            return self._dense(x, sparsity)
        active = _Active(pairs, self.kernels.by_feature(pairs, self.weights.features), pairs.feature.long())
        if threshold is None:
            return self._relu(x, inner, sparsity, active)
        return self._jumprelu(x, inner, sparsity, active, threshold)

    def _relu(self, x: Tensor, inner: Tensor, weight: float, active: _Active) -> Gradient:
        n, W_dec = len(x), self.weights.rows["W_dec"]
        decoded, counts = self._decoded(active.pairs, x)
        norms = W_dec.norm(dim=1).clamp_min(1e-12)
        mass = self._sums(active, active.pairs.value) / n
        pressed = mass if counts is None else self._sums(active, active.pairs.value * counts) / n
        g = (norms * (weight / n))[active.feature]
        outcome = self._backward(x, inner, active, decoded._replace(g=decoded.g + (g if counts is None else g * counts)))
        if self._config.decoder_norm == "free":  # along the rows: unit ones lose that part
            outcome.gradients["W_dec"].addcmul_((weight * pressed / norms)[:, None], W_dec)
        sparsity = mass @ norms
        return outcome._replace(loss=outcome.error + weight * sparsity, sparsity=sparsity)

    def _jumprelu(self, x: Tensor, inner: Tensor, weight: float, near: _Active, threshold: Tensor) -> Gradient:
        n, width = len(x), self._config.bandwidth
        over = near.pairs.value - threshold[near.feature]
        passes = over > 0
        active = near._replace(pairs=near.pairs._replace(value=near.pairs.value * passes))
        decoded, counts = self._decoded(active.pairs, x)
        outcome = self._backward(x, inner, active, decoded._replace(g=decoded.g * passes))
        is_near = (over.abs() < width / 2).to(x.dtype)
        counted = is_near if counts is None else is_near * counts
        of_threshold = -(threshold * self._sums(active, is_near * decoded.g) + (weight / n) * self._sums(active, counted)) / width
        fired = self._sums(active, passes.to(x.dtype))
        sparsity = fired.sum() / n
        gradients = outcome.gradients | {"log_threshold": of_threshold * threshold}
        return outcome._replace(loss=outcome.error + weight * sparsity, sparsity=sparsity, fired=fired > 0, gradients=gradients)

    def _decoded(self, pairs: Pairs, x: Tensor) -> tuple[Decoded, Tensor | None]:
        """Errors and gradients, with the focus in them; the weight [P] of each pair's token (None: all are 1)."""
        decoded = self.kernels.decode(self.weights, pairs, x)
        if not self._focus:
            return decoded, None
        counts = self._focus(decoded.squares)
        return engine.weighted(decoded, pairs, counts), counts.index_select(0, pairs.token)

    def _backward(self, x: Tensor, inner: Tensor, active: _Active, decoded: Decoded) -> Gradient:
        """The error and the weights' gradients, without what a penalty adds to them by itself."""
        n, config = len(x), self._config
        found = self.kernels.gradients(self.weights, active.pairs, active.by_feature, decoded, inner, None, config.decoder_norm == "unit")
        b_dec = decoded.total * (2 / n)
        if config.subtract_b_dec:
            b_dec -= found.inner
        gradients = {"W_enc": found.W_enc.t(), "b_enc": found.b_enc, "W_dec": found.W_dec, "b_dec": b_dec}
        squared = decoded.squares.sum() / n
        return Gradient(squared, squared, torch.zeros_like(squared), active.pairs, active.by_feature.fired, gradients)

    def _dense(self, x: Tensor, sparsity: float) -> Gradient:
        copies = {"W_enc": self.weights.copy_of("W_enc").t(), "W_dec": self.weights.copy_of("W_dec")}
        algebra = jumprelu.gradient if self._config.architecture == "jumprelu" else relu.gradient
        outcome = algebra(self.parameters, x, Context(self._config, sparsity, self.weights.compute, copies=copies, focus=self._focus))
        outcome.gradients["W_enc"] = outcome.gradients["W_enc"].t().contiguous().t()  # by feature, as the update goes
        return outcome

    def _above(self, inner: Tensor, floor: Tensor) -> Pairs | None:
        """Pre-activations above `floor` [F] by token; None where there are too many."""
        n, F = len(inner), self.weights.features
        W_enc, b_enc = self.weights.copy_of("W_enc").t(), self.weights.rows["b_enc"].to(self.weights.compute)
        at_once = max(LOOK, engine.CHUNK_BYTES["cpu"] // (F * inner.element_size()))
        pre = inner.new_empty(min(n, at_once), F)
        found, seen, total = [], 0, 0
        for part in (inner[:LOOK], *inner[LOOK:].split(at_once)):
            if not len(part):
                continue
            out = pre[: len(part)]
            torch.addmm(b_enc, part, W_enc, out=out)
            counts, feature, value = self.kernels.above(out, floor, int(SPARSE_BELOW * F * len(part) * (1 if not seen else 2)))
            if feature is None or value is None:
                return None
            found.append((counts, feature, value))
            seen += len(part)
            total += len(feature)
        counts, feature, value = (torch.cat(parts) for parts in zip(*found, strict=True))
        start = torch.zeros(n + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=start[1:])
        token = torch.repeat_interleave(torch.arange(n, dtype=torch.int32), counts.long(), output_size=total)
        return Pairs(feature, value, token, start)

    def _sums(self, active: _Active, values: Tensor) -> Tensor:
        """[F] sums of values [P] by feature, added up in the order of tokens."""
        return torch.bincount(active.feature, weights=values, minlength=self.weights.features).to(values.dtype)
