"""Transport: a dictionary is carried to the next checkpoint by the linear maps between the two models' activations, in closed form.

Between two checkpoints of a training run most of what a short following training has to learn is the same for all features: the residual
stream turned, stretched and shifted. The token rows are paired, so this common part is known. In scaled units, y before and y' after, with
means m and m', two maps are fitted on the same tokens (row vectors; every feature keeps its index):

    forward  A = argmin sum ||(y' - m') - (y - m) A||^2 + r ||A - I||^2      decoder rows and b_dec are written in the new coordinates:
                                                                             W_dec' = W_dec A, b_dec' = m' + (b_dec - m) A
    backward B = argmin sum ||(y - m) - (y' - m') B||^2 + r' ||B - I||^2     the encoder reads the old coordinates out of the new ones:
                                                                             z' = encoder(m + (y' - m') B), so W_enc' = B W_enc

B is a regression of its own, not A's inverse: the inverse would blow up the directions that the new activations hardly fill, and features
that read these would fire everywhere. r = RIDGE times the mean variance draws to the identity, not to 0, so that a model that did not
change leaves the dictionary as it is, bit by bit (the retrain null needs that). Where decoder rows are kept at unit norm, a row's new norm
moves into its encoder column, bias and jumprelu threshold, which leaves every reconstruction the same. Dead features are carried like
others. What is nonlinear in the change, or belongs to single features, is left to the training that follows.

Related: orthogonal Procrustes maps between dictionaries' decoders; here the maps are not orthogonal and come from the activations.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE

__all__ = ["RIDGE", "Maps", "Moments", "fit", "moments", "transport"]

RIDGE = 1e-3
"""Weight of ||A - I||^2, as a share of the mean variance per direction."""
TOKENS_AT_ONCE = 8192


class Moments(NamedTuple):
    """First and second moments of paired vectors before (y) and after (y'), float64; centred, per token."""

    mean: Tensor
    """m [d]"""
    mean_after: Tensor
    """m' [d]"""
    covariance: Tensor
    """E (y - m)^T (y - m) [d, d]"""
    covariance_after: Tensor
    """E (y' - m')^T (y' - m') [d, d]"""
    cross: Tensor
    """E (y - m)^T (y' - m') [d, d]"""


class Maps(NamedTuple):
    """The common part of the change between two checkpoints, as what is added to the identity; float64."""

    mean: Tensor
    """m [d], before."""
    mean_after: Tensor
    """m' [d]"""
    forward: Tensor
    """A - I [d, d]"""
    backward: Tensor
    """B - I [d, d]"""
    explained_forward: float
    """Share of the variance of y' that y A explains, on the tokens of the fit."""
    explained_backward: float
    """Share of the variance of y that y' B explains."""


def moments(pairs: Iterable[tuple[Tensor, Tensor]], scale: float, scale_after: float) -> Moments:
    """Moments of paired batches ([n, d], [n, d]) in raw units, each times its input scale. Memory: TOKENS_AT_ONCE of them in float64 and a few [d, d].

    Sums run in the order of the batches. Raises ValueError where there are none.
    """
    sums: list[Tensor] = []
    shift: tuple[Tensor, Tensor] | None = None
    n = 0
    for before, after in ((y, z) for pair in pairs for y, z in zip(*(x.split(TOKENS_AT_ONCE) for x in pair), strict=True)):
        y, z = before.double() * scale, after.double() * scale_after
        if shift is None:  # sums around a point near the mean keep their digits
            shift = y.mean(0), z.mean(0)
        y, z = y - shift[0], z - shift[1]
        parts = [y.sum(0), z.sum(0), y.t() @ y, z.t() @ z, y.t() @ z]
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else parts
        n += len(y)
    if shift is None or not n:
        raise ValueError("no tokens were given")
    mean, mean_after, yy, zz, yz = (total / n for total in sums)
    return Moments(
        shift[0] + mean,
        shift[1] + mean_after,
        yy - torch.outer(mean, mean),
        zz - torch.outer(mean_after, mean_after),
        yz - torch.outer(mean, mean_after),
    )


def fit(m: Moments, ridge: float = RIDGE) -> Maps:
    """Both maps from the moments."""
    forward, seen = _regression(m.covariance, m.cross, m.covariance_after, ridge)
    backward, seen_back = _regression(m.covariance_after, m.cross.t(), m.covariance, ridge)
    return Maps(m.mean, m.mean_after, forward, backward, seen, seen_back)


def transport(sae: SAE, maps: Maps, scale_after: float) -> SAE:
    """`sae` in the coordinates of the next checkpoint, whose input scale is `scale_after`. With maps that change nothing: the same weights."""
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    m, m_after, forward, backward = (value.to(W_dec.device) for value in maps[:4])
    # All written as what is added, so that nothing is rounded where nothing changes.
    out_dec = W_dec + W_dec @ forward
    out_enc = W_enc + backward @ W_enc
    offset = b_dec - m
    out_b_dec = b_dec + (m_after - m) + offset @ forward
    if sae.config.subtract_b_dec:  # b_enc + (m - b_dec) W_enc - (m' - b_dec') W_enc', with m' - b_dec' = (m - b_dec) A
        out_b = b_enc + (offset @ (forward + backward + forward @ backward)) @ W_enc
    else:  # b_enc + m W_enc - m' W_enc'
        out_b = b_enc + ((m - m_after) - m_after @ backward) @ W_enc
    threshold = sae.threshold
    if sae.config.decoder_norm == "unit":
        grown = out_dec.norm(dim=1) / W_dec.norm(dim=1).clamp_min(1e-12)
        out_dec, out_enc, out_b = out_dec / grown.clamp_min(1e-12)[:, None], out_enc * grown, out_b * grown
        if sae.architecture == "jumprelu":
            assert threshold is not None
            threshold = (threshold.double() * grown).float()
    made = {"W_enc": out_enc, "b_enc": out_b, "W_dec": out_dec, "b_dec": out_b_dec}
    weights = {name: value.to(sae.W_dec.dtype).contiguous() for name, value in made.items()}
    return replace(sae.copy(), **weights, input_scale=scale_after, threshold=threshold)


def _regression(covariance: Tensor, cross: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, float]:
    """What is added to the identity by the ridge regression with these moments, and the explained share of the target's variance."""
    d = len(covariance)
    eye = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    damped = covariance + ridge * covariance.trace() / d * eye
    added = torch.linalg.solve(damped, cross - covariance)
    whole = eye + added
    total = target.trace()
    left = total - 2 * (whole * cross).sum() + (whole * (covariance @ whole)).sum()
    return added, float(1 - left / total) if total > 0 else 0.0
