"""The crosscoder's own algebra: how it starts, its L1 loss with designated shared latents, and how it is stored.

    f = relu([x_b; x_f] W_enc + b_enc),  x_hat_m = f W_dec^m + b_dec^m
    L = sum_m ||x_m - x_hat_m||^2 + lambda sum_i w_i f_i (||W_dec_i^b|| + ||W_dec_i^f||)        (Lindsey et al., "Sparse crosscoders", 2024)

The penalty sees the sum of both norms, so that a latent for one model only costs half of one for both. The first `shared` latents have W_dec^b =
W_dec^f and a smaller weight w_i ("designated shared features", Anthropic's crosscoder model diffing update, February 2025): they take up what both
models have in common, and leave what is not in common to the others. The batchtopk kind is the project's BatchTopK over the two activations side by
side (rows of unit norm over both models, Minder et al. 2025 choose by the sum of both norms instead): it needs no algebra of its own.

Each model's activations have a scale of their own, E||x'|| = sqrt(d), so that a model with larger residual norms does not have more to say.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from stagediff.sae.batches import Activations
from stagediff.sae.dictionary import SAE
from stagediff.sae.gradients import Context, Gradient, column_sums, encode, keep_active, reconstruct, to_activations, to_encoder
from stagediff.sae.initial import MEASURED_TOKENS, fresh
from stagediff.sae.spec import DictionaryConfig

__all__ = ["for_raw_units", "from_raw_units", "gradient", "measure_apart", "start", "tie"]


def measure_apart(data: Activations, tokens: int = MEASURED_TOKENS) -> tuple[Tensor, Tensor]:
    """Scale of every input [2 d] (one number per model, sqrt(d) / E||x||) and their mean [2 d] in raw units, over the first `tokens` tokens."""
    d = data.d // 2
    norms, mean, n = torch.zeros(2, dtype=torch.float64), torch.zeros(2 * d, dtype=torch.float64), 0
    for i in range(data.n_shards):
        x = data.read_shard(i)[: tokens - n].double()
        norms += x.view(len(x), 2, d).norm(dim=2).sum(0)
        mean += x.sum(0)
        n += len(x)
        if n >= tokens:
            break
    return (math.sqrt(d) * n / norms).float().repeat_interleave(d), mean / n


def start(config: DictionaryConfig, scale: Tensor, mean: Tensor, seed: int) -> SAE:
    """An untrained crosscoder in scaled units: every latent begins with one direction for both models, so that a difference is what training found."""
    sae = fresh(config, 1.0, mean * scale.double(), seed)
    d = sae.d // 2
    W_dec = sae.W_dec[:, :d].repeat(1, 2)
    W_dec *= (sae.config.initial_norm or 1.0) / W_dec.norm(dim=1, keepdim=True)
    W_enc = W_dec.t().contiguous()
    b_enc = sae.b_enc if sae.config.subtract_b_dec else -sae.b_dec @ W_enc
    return replace(sae, W_dec=W_dec, W_enc=W_enc, b_enc=b_enc)


def gradient(p: dict[str, Tensor], x: Tensor, context: Context, shared: int, shared_weight: float) -> Gradient:
    """Loss and gradients of the L1 crosscoder on a scaled batch x [B, 2 d]; the first `shared` latents are tied, with `shared_weight` in the penalty.

    The gradient of a tied row is that of its one direction, given to both halves.
    """
    n, d = len(x), x.shape[1] // 2
    forward = encode(p, x, context)
    f = forward.pre.relu_()
    error, squared = reconstruct(p, x, forward, f)
    counts, weighted = context.weighted(error)
    scaled = (weighted * (2 / n)).to(context.compute)

    halves = p["W_dec"].view(-1, 2, d)
    norms = halves.norm(dim=2).clamp_min(1e-12)  # [F, 2]
    weights = torch.ones(len(norms), dtype=x.dtype, device=x.device)
    weights[:shared] = shared_weight
    cost = weights * norms.sum(1)  # [F]
    mass = column_sums(f, x.dtype) / n
    sparsity = mass @ cost

    W_dec = torch.mm(f.t(), scaled).to(x.dtype).view(-1, 2, d)
    pressed = mass if counts is None else column_sums(f, x.dtype, counts) / n
    W_dec.addcmul_((context.sparsity * pressed * weights)[:, None, None] / norms[:, :, None], halves)
    W_dec[:shared] = W_dec[:shared].sum(1, keepdim=True)
    g_f = to_activations(scaled, forward.W_dec, cost * (context.sparsity / n), counts)
    gradients = to_encoder(p, context, forward, weighted, keep_active(g_f, f))
    return Gradient(squared + context.sparsity * sparsity, squared, sparsity, f, mass > 0, gradients | {"W_dec": W_dec.view(-1, 2 * d)})


@torch.no_grad()
def tie(W_dec: Tensor, shared: int) -> None:
    """Makes both halves of the first `shared` rows of W_dec [F, 2 d] one, in place: equal gradients keep them equal but for rounding."""
    d = W_dec.shape[1] // 2
    W_dec[:shared, d:] = W_dec[:shared, :d]


def for_raw_units(sae: SAE, scale: Tensor) -> SAE:
    """The crosscoder that reads raw activations side by side: the scales [2 d] folded into its weights, input scale 1."""
    return replace(sae, W_enc=sae.W_enc * scale[:, None], W_dec=sae.W_dec / scale, b_dec=sae.b_dec / scale)


def from_raw_units(sae: SAE, scale: Tensor) -> SAE:
    """`for_raw_units` undone, to rounding."""
    return replace(sae, W_enc=sae.W_enc / scale[:, None], W_dec=sae.W_dec * scale, b_dec=sae.b_dec * scale)
