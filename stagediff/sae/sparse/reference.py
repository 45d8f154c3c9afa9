"""The sparse step's parts in plain torch: any device, any float type, no compiler. What the other kernels are tested against.

Sums over a token's or a feature's pairs are embedding bags, which add in the pairs' order. Weights are read in master type; only the encoder's
product is in compute type.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.optim.adam import adam

from stagediff.sae.sparse.kernels import Decoded, Extra, Rows, Update
from stagediff.sae.sparse.pairs import ByFeature, Pairs
from stagediff.sae.sparse.weights import Weights

__all__ = ["Reference", "largest_of_all"]

GROUP = 32
"""Features that are first judged by their largest."""


class Reference:
    """Plain torch."""

    name = "reference"

    def largest(self, pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
        n, F = pre.shape
        size = max(1, min(GROUP, F // (4 * k)))
        groups = -(-F // size)
        if groups * size > F:
            pre = torch.nn.functional.pad(pre, (0, groups * size - F))
        tiles = _patterns(pre).view(n, groups, size)
        # A group with one of the k largest is among the k groups with the largest maxima, of which equal ones are taken by index.
        chosen = _first_largest(tiles.amax(2), min(k, groups)).sort(1).values
        of_rows = chosen + torch.arange(n, device=pre.device)[:, None] * groups
        candidates = tiles.view(-1, size).index_select(0, of_rows.flatten()).view(n, -1)
        at = _first_largest(candidates, k)
        value = candidates.gather(1, at).clamp_min_(0).view(pre.dtype).to(torch.promote_types(pre.dtype, torch.float32))
        feature = chosen.gather(1, at // size) * size + at % size
        return torch.where(value > 0, feature, F).int(), value

    def largest_of_all(self, pre: Tensor, count: int) -> tuple[Pairs, Tensor]:
        return largest_of_all(pre, count, lambda values, size: _patterns(values).view(len(values), -1, size).amax(2))

    def above(self, pre: Tensor, floor: Tensor, most: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        wide = pre.to(torch.promote_types(pre.dtype, torch.float32))
        passes = wide > floor
        counts = passes.sum(1).int()
        if int(counts.sum()) > most:
            return counts, None, None
        return counts, passes.nonzero()[:, 1].int(), wide[passes]

    def decode(self, weights: Weights, pairs: Pairs, x: Tensor) -> Decoded:
        W_dec, b_dec = weights.rows["W_dec"], weights.rows["b_dec"]
        feature = pairs.feature.clamp_max(weights.features - 1)
        with torch.enable_grad():
            value = pairs.value.to(x.dtype).requires_grad_()
            x_hat = _sums(W_dec, feature, pairs.start[:-1], value)
        error = x_hat.detach() + b_dec - x
        scaled = error * (2 / len(x))
        (g,) = torch.autograd.grad(x_hat, value, scaled)
        return Decoded(error, scaled, error.square().sum(1), error.sum(0), g * (pairs.feature < weights.features))

    def by_feature(self, pairs: Pairs, features: int) -> ByFeature:
        feature, order = torch.sort(pairs.feature, stable=True)
        bounds = torch.arange(features + 1, device=feature.device, dtype=feature.dtype)
        return ByFeature(order.int(), torch.searchsorted(feature, bounds, out_int32=True))

    def gradients(
        self, weights: Weights, pairs: Pairs, sorted_pairs: ByFeature, decoded: Decoded, inner: Tensor, extra: Extra | None, unit: bool
    ) -> Rows:
        order = sorted_pairs.order.long()
        token, value, g = (t[order] for t in (pairs.token, pairs.value.to(decoded.error.dtype), decoded.g))
        start = sorted_pairs.start  # one bag more: the empty slots
        W_dec = _sums(decoded.scaled, token, start, value)[:-1]
        W_enc = _sums(inner.to(g.dtype), token, start, g)[:-1]
        b_enc = _sums(g.new_ones(len(inner), 1), token, start, g)[:-1, 0]
        if extra is not None:
            W_dec[extra.features] += extra.W_dec
            W_enc[extra.features] += extra.W_enc
            b_enc[extra.features] += extra.b_enc
        if unit:
            rows = weights.rows["W_dec"]
            W_dec -= (W_dec * rows).sum(1, keepdim=True) * rows
        squares = torch.stack([t.square().sum() for t in (W_enc, W_dec, b_enc)])
        return Rows(W_enc, W_dec, b_enc, squares, b_enc @ weights.rows["W_enc"])

    def update(self, weights: Weights, gradients: dict[str, Tensor], factor: Tensor | None, update: Update) -> None:
        if factor is not None:
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        names = list(weights.rows)
        before = torch.tensor(float(update.step - 1), device=weights.rows["b_dec"].device)
        adam(
            [weights.rows[name] for name in names],
            [gradients[name] for name in names],
            [weights.first[name] for name in names],
            [weights.second[name] for name in names],
            [],
            [before.clone() for _ in names],
            fused=True,
            amsgrad=False,
            beta1=update.betas[0],
            beta2=update.betas[1],
            lr=update.lr,
            weight_decay=0.0,
            eps=update.eps,
            maximize=False,
        )
        for name, home in update.home.items():
            weights.rows[name].lerp_(home, update.pull)
        if update.unit:
            W_dec = weights.rows["W_dec"]
            W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
        weights.renew_copies()


def largest_of_all(pre: Tensor, count: int, maxima: Callable[[Tensor, int], Tensor]) -> tuple[Pairs, Tensor]:
    """`Kernels.largest_of_all`. `maxima` gives for values [n, F] the largest pattern of every `size` features [n, F / size]."""
    n, F = pre.shape
    size = max(s for s in (1, 2, 4, 8, 16, 32) if F % s == 0 and (s == 1 or 4 * count * s <= pre.numel()))
    groups = _first(maxima(pre, size).flatten(), count)
    candidates = _patterns(pre).view(-1, size).index_select(0, groups.clamp_min(0)).masked_fill_((groups < 0)[:, None], 0).flatten()
    found = _first(candidates, count)
    is_empty = found < 0
    at = found.clamp_min(0)
    value = candidates[at].view(pre.dtype).to(torch.promote_types(pre.dtype, torch.float32)).masked_fill_(is_empty, 0)
    position = groups[at // size] * size + at % size
    feature = torch.where(is_empty, F, position % F).int()
    token = torch.where(is_empty, n - 1, position // F).int()
    # Tokens ascend: token b's slots begin where those of the tokens before it end; the empty ones are nobody's.
    bounds = torch.arange(n + 1, dtype=torch.int32, device=pre.device)
    start = torch.searchsorted(torch.where(is_empty, n, token), bounds, out_int32=True)
    return Pairs(feature, value, token, start), value.amin()


def _first(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest positive of values [n] are, ascending: [count], -1 where there are too few. Equal ones by index."""
    least = values.topk(count, sorted=False).values.amin().clamp_min(0)
    above = values > least
    ties = (values == least) & (least > 0)
    keep = above | (ties & (ties.cumsum(0, dtype=torch.int32) <= count - above.sum()))
    # The i-th that is kept is where the number of those kept comes to i.
    position = torch.searchsorted(keep.cumsum(0, dtype=torch.int32), torch.arange(1, count + 1, dtype=torch.int32, device=values.device))
    return position.masked_fill_(position == len(values), -1)


def _sums(rows: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """For each bag, which reaches from its `start` to the next one's, the weighted sum of `rows` [n, d] at `index`: [bags, d]."""
    return embedding_bag(index, rows, start.to(index.dtype), mode="sum", per_sample_weights=weight)


def _patterns(values: Tensor) -> Tensor:
    """The values' bits as integers: positive ones sort alike, the others are not positive. Integers are several times as fast to compare on a CPU."""
    return values.view({torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype])


def _first_largest(patterns: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of patterns [n, m] are, descending: [n, k]; equal ones by index, those that are not positive are all equal.

    torch.topk takes any of equal values. With the index in the low bits no two are equal.
    """
    m = patterns.shape[1]
    patterns = patterns.clamp_min(0)
    if patterns.dtype == torch.int16 and m <= 1 << 16:
        keys = patterns.int().bitwise_left_shift_(16).bitwise_or_(torch.arange(m - 1, -1, -1, dtype=torch.int32, device=patterns.device))
    elif patterns.dtype != torch.int64:
        keys = patterns.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(m - 1, -1, -1, device=patterns.device))
    else:
        return patterns.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return keys.topk(k, dim=1).indices
