"""Interventions at a hook point: a vector added, or features of a dictionary clamped. Nothing is left of them afterwards.

add     x + v, a vector of its own for every row of the batch
clamp   x + sum_i (value - f_i) d_i over the clamped features that are active, in raw units: everything else of x, the dictionary's error term included,
        stays. Where none of them is active, x keeps its bits

Both leave alone the padding on a row's left and the positions that the dictionary was never trained on (`skip_positions`). Within one context a batch is
fed once, in one piece or token after token with a key-value cache: positions are counted from the first forward pass on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stagediff.lm import hooks
from stagediff.lm.spec import HookPoint
from stagediff.sae.dictionary import SAE

__all__ = ["ENCODED_BYTES", "Clamp", "Touched", "add", "clamp"]

ENCODED_BYTES = 64 << 20
"""Feature activations [positions, F] at once."""


@contextmanager
def add(model: nn.Module, hook: HookPoint, vectors: Tensor, *, padding: Tensor | None = None, skip: Sequence[int] = ()) -> Iterator[None]:
    """Within it row r of the batch goes on with x + vectors[r] at the hook point.

    Parameters
    ----------
    vectors: [rows, d], in raw units of the residual stream (a unit direction times its strength).
    padding: [rows] positions of padding at each row's left; None: none.
    skip: positions of the text, counted without padding, that are left as they are.
    """
    touched = Touched(padding, skip)

    def added(x: Tensor) -> Tensor:
        return _where(touched.of(x), x + vectors.to(x.device, x.dtype)[:, None], x)

    with hooks.intervene(model, hook, added):
        yield


@contextmanager
def clamp(
    model: nn.Module,
    hook: HookPoint,
    sae: SAE,
    features: Sequence[int],
    *,
    value: float = 0.0,
    padding: Tensor | None = None,
    skip: Sequence[int] = (),
) -> Iterator[None]:
    """Within it the features have `value` wherever they are active, the dictionary's error term kept. `padding`, `skip`: as of `add`."""
    touched, change = Touched(padding, skip), Clamp(sae, features, value)

    def clamped(x: Tensor) -> Tensor:
        return _where(touched.of(x), change(x), x)

    with hooks.intervene(model, hook, clamped):
        yield


class Clamp:
    """x [..., d] -> x with the features at `value` where they are active; the same bits where none is."""

    def __init__(self, sae: SAE, features: Sequence[int], value: float = 0.0):
        self.sae, self.value = sae, value
        self.features = torch.as_tensor(list(features), dtype=torch.int64, device=sae.W_dec.device)
        self.decoder = sae.W_dec[self.features] / sae.input_scale  # [n, d], raw units

    def __call__(self, x: Tensor) -> Tensor:
        if not len(self.features):
            return x
        flat = x.reshape(-1, x.shape[-1]).float()
        block = max(1, ENCODED_BYTES // (4 * self.sae.features))
        parts = [self._changed(part) for part in flat.split(block)]
        return torch.cat(parts).to(x.dtype).view(x.shape)

    def _changed(self, x: Tensor) -> Tensor:
        f = self.sae.encode(x)[:, self.features]
        return x + torch.where(f > 0, self.value - f, 0.0) @ self.decoder


class Touched:
    """Which positions of the next piece of a batch an intervention may touch."""

    def __init__(self, padding: Tensor | None, skip: Sequence[int]):
        self.padding, self.skip, self.seen = padding, tuple(skip), 0

    def of(self, x: Tensor) -> Tensor | None:
        """[rows, positions] bool of x [rows, positions, d], and moves on; None: all of them."""
        start, self.seen = self.seen, self.seen + x.shape[1]
        if self.padding is None and not self.skip:
            return None
        at = torch.arange(start, self.seen, device=x.device)[None]
        at = at.expand(len(x), -1) if self.padding is None else at - self.padding.to(x.device)[:, None]
        touched = at >= 0
        for position in self.skip:
            touched = touched & (at != position)
        return touched


def _where(touched: Tensor | None, changed: Tensor, x: Tensor) -> Tensor:
    return changed if touched is None else torch.where(touched[..., None], changed, x)
