"""How a dictionary starts: the input scale and the mean, measured once, and tied random weights.

Decoder rows are random directions of norm `initial_norm` and the encoder is their transpose (April-2024 recipe: 0.1; the others: 1). b_dec
starts at the data's mean: the larger the mean against the spread, the more features are dead at the start otherwise. Where b_dec is not
subtracted from the input, b_enc starts at -mean W_enc, which is the same function.
"""

import math

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.batches import Activations
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.spec import DictionaryConfig

__all__ = ["MEASURED_TOKENS", "fresh", "measure"]

MEASURED_TOKENS = 1 << 18
"""Tokens of the first shards from which scale and mean are taken."""


def measure(data: Activations, tokens: int = MEASURED_TOKENS) -> tuple[float, Tensor]:
    """Input scale sqrt(d) / E||x|| and mean [d] (raw units) over the first `tokens` tokens.

    Raises UserError when there are none, or when they are 0, NaN or infinite.
    """
    norms, mean, n = 0.0, torch.zeros(data.d, dtype=torch.float64), 0
    for i in range(data.n_shards):
        x = data.read_shard(i)[: tokens - n].double()
        norms += float(x.norm(dim=1).sum())
        mean += x.sum(0)
        n += len(x)
        if n >= tokens:
            break
    if not n or not 0 < norms < math.inf:
        what = "hold no tokens" if not n else "are all 0" if norms == 0 else "hold NaN or infinite values"
        raise UserError(
            f"The activations a dictionary is to be trained on {what}. Check the harvest's rows, and that its model yields finite numbers."
        )
    return math.sqrt(data.d) * n / norms, mean / n


def fresh(config: DictionaryConfig, scale: float, mean: Tensor, seed: int) -> SAE:
    """An untrained dictionary for inputs of width len(mean); `mean` in raw units."""
    d, F = len(mean), config.features
    config = resolved(config, d)
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, d, generator=generator)
    W_dec *= (config.initial_norm or 1.0) / W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec.t().contiguous()
    b_dec = (mean * scale).float()
    b_enc = torch.zeros(F) if config.subtract_b_dec else -b_dec @ W_enc
    threshold = None
    if config.architecture == "jumprelu":
        threshold = torch.full((F,), config.initial_threshold)
    elif config.architecture == "batchtopk":
        threshold = torch.full((F,), -1.0)  # none seen yet
    return SAE(W_enc, b_enc, W_dec, b_dec, config, scale, threshold)
