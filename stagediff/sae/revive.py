"""Resampling: features that are dead where a finetune starts, or on its way, begin anew at inputs which the dictionary reconstructs badly.

The rule is Bricken et al.'s (Towards Monosemanticity, 2023, "Neuron resampling"), applied before the steps that the spec names (`revive_at`;
before step 0 if it names none). A feature is dead when it fires on none of the tokens looked at, which are the same every time. For each an
input is drawn with probability proportional to the square of its loss, ||x - x_hat||^2 in scaled units. The feature's decoder row gets that
input's direction and the alive rows' mean norm (or 1 where rows are kept at unit norm), its encoder the same direction and 0.2 of the alive
columns' mean norm, its bias is 0, its optimiser moments are 0 (`Trainer.renew`).

Where this departs from the paper: the direction is that of the residual x - x_hat, which is what the dictionary lacks, not of x. No input is
drawn twice, nor a copy of one (first positions of rows repeat): two features with the same weights would get the same gradients for ever. A
bias of 0 belongs to an encoder that sees x - b_dec; where it sees x, -b_dec W_enc is the same. jumprelu's threshold shrinks with the encoder:
0.2 of the alive features' median. topk and batchtopk follow the same rule: with the whole mean norm, new features outdo good ones and a short
finetune does not recover.
"""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE

__all__ = ["ENCODER_SHARE", "REVIVED", "REVIVED_COLUMNS", "drawn", "renewed", "resample"]

ENCODER_SHARE = 0.2
"""A new encoder column's norm, as a share of the alive ones' mean (Bricken et al.)."""
REVIVED = "revived.parquet"
REVIVED_COLUMNS = {
    "step": ("steps", "training steps done when it was found dead; 0: at the start"),
    "feature": ("", "index of a dead feature: from here on it is another feature than before"),
    "token": ("tokens", "position in the training order of the input whose residual it starts from"),
    "token_loss": ("scaled units squared", "||x - x_hat||^2 of that input under the dictionary at that step, summed over d"),
}


@torch.no_grad()
def resample(sae: SAE, read: Callable[[], Iterable[Tensor]], seed: int, step: int = 0) -> tuple[SAE, pd.DataFrame]:
    """A copy of `sae` with its dead features begun anew, and the table of these, ascending (REVIVED_COLUMNS).

    `read` gives the same batches [n, d] (bf16, raw units, on the dictionary's device) whenever it is called: it is read twice. Features are
    left dead where there are fewer different inputs with a loss than dead features. `step` is where the training stands. Memory: a batch's
    activations and 16 bytes a token.
    """
    fired, losses, prints = _examine(sae, read())
    dead = (~fired).nonzero()[:, 0].cpu()
    tokens = drawn(losses, prints, len(dead), seed + step)
    features = dead[: len(tokens)]
    table = pd.DataFrame({"step": step, "feature": features.numpy(), "token": tokens.numpy(), "token_loss": losses[tokens].numpy()})
    return renewed(sae, features, _residuals(sae, read(), tokens), fired), table


def drawn(losses: Tensor, prints: Tensor, count: int, seed: int) -> Tensor:
    """Up to `count` indices into losses [n] (float64, on the CPU), one after the other with probability proportional to losses^2.

    Inputs with equal `prints` [n] are one and the same: once one of them is drawn, none of them is drawn again.
    """
    uniform = torch.rand(len(losses), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    arrival = -torch.log1p(-uniform) / losses.square()  # exponential with rate loss^2: the order of arrival is that of drawing
    first = arrival.argsort(stable=True)
    first = first[losses[first] > 0]
    _, newest = np.unique(prints[first].numpy(), return_index=True)
    return first[torch.from_numpy(np.sort(newest)[:count])]


def renewed(sae: SAE, features: Tensor, residuals: Tensor, alive: Tensor) -> SAE:
    """A copy with new weights for `features` [n] along `residuals` [n, d]; norms and threshold are taken from `alive` [F] bool (none: all)."""
    out = sae.copy()
    if not len(features):
        return out
    features = features.to(sae.W_dec.device)
    alive = alive if alive.any() else torch.ones_like(alive)
    unit = torch.nn.functional.normalize(residuals, dim=1)
    decoder = 1.0 if sae.config.decoder_norm == "unit" else sae.decoder_norms()[alive].mean()
    W_enc = ENCODER_SHARE * sae.W_enc.norm(dim=0)[alive].mean() * unit  # [n, d]
    out.W_dec[features] = decoder * unit
    out.W_enc[:, features] = W_enc.t()
    out.b_enc[features] = 0.0 if sae.config.subtract_b_dec else -(W_enc @ sae.b_dec)
    if sae.architecture == "jumprelu":
        assert sae.threshold is not None
        assert out.threshold is not None
        out.threshold[features] = ENCODER_SHARE * sae.threshold[alive].median()
    return out


def _examine(sae: SAE, stream: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which features fire [F]; on the CPU, each token's loss [n] float64 and a fingerprint of its input [n] int64."""
    device = sae.W_dec.device
    factors = torch.randint(-(2**62), 2**62, (sae.d,), generator=torch.Generator().manual_seed(0)).to(device)
    fired = torch.zeros(sae.features, dtype=torch.bool, device=device)
    losses, prints = [], []
    for x in stream:
        f = sae.encode(x)
        fired |= (f > 0).any(0)
        losses.append(((sae.decode(f) - x) * sae.input_scale).double().square().sum(1))
        prints.append((x.bfloat16().view(torch.int16) * factors).sum(1))  # wraps around
    return fired, torch.cat(losses).cpu(), torch.cat(prints).cpu()


def _residuals(sae: SAE, stream: Iterable[Tensor], tokens: Tensor) -> Tensor:
    """x - x_hat [n, d] of the inputs at positions `tokens` [n] of the stream."""
    out = torch.empty(len(tokens), sae.d, dtype=sae.W_dec.dtype, device=sae.W_dec.device)
    start = 0
    for x in stream:
        here = ((tokens >= start) & (tokens < start + len(x))).nonzero()[:, 0]
        chosen = x[(tokens[here] - start).to(x.device)].to(out.dtype)
        out[here.to(out.device)] = chosen - sae.decode(sae.encode(chosen))
        start += len(x)
    return out
