"""One function in two systems of units: stagediff's scaled ones, and raw ones with the decoder left as it is.

stagediff computes f = act((s x - c b_dec) W_enc + b_enc), x_hat = (f W_dec + b_dec) / s, with c = 1 where b_dec is subtracted from the input.
dictionary_learning and sparsify keep decoder rows at norm 1 and read raw activations, so s goes into the features: g = f / s. With b_dec / s,
b_enc / s and threshold / s, and both weight matrices unchanged, x_hat = g W_dec + b_dec / s is the same (relu, topk and a threshold that is
divided too all commute with a positive factor). It is what dictionary_learning does with its own activation norm (`scale_biases`). Where a
class subtracts b_dec from its input and the dictionary does not, or the other way round, b_dec W_enc moves into the encoder's bias.
"""

import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE
from stagediff.sae.spec import DictionaryConfig

__all__ = ["raw", "scaled", "with_unit_decoder"]

BLOCK = 4096
"""Features whose biases are computed in fp64 at a time."""


def raw(sae: SAE, *, subtracts: bool) -> dict[str, Tensor]:
    """W_enc [d, F], b_enc [F], W_dec [F, d], b_dec [d] and, where there is one, threshold [F] for raw inputs, fp32.

    `subtracts`: whether whoever reads them subtracts b_dec from the input.
    """
    s = sae.input_scale
    b_enc = _moved(sae.b_enc, sae.b_dec, sae.W_enc, int(subtracts) - int(bool(sae.config.subtract_b_dec)))
    tensors = {
        "W_enc": sae.W_enc.float(),
        "b_enc": (b_enc / s).float(),
        "W_dec": sae.W_dec.float(),
        "b_dec": (sae.b_dec.double() / s).float(),
    }
    if sae.threshold is not None:
        tensors["threshold"] = _threshold(sae.threshold, 1 / s)
    return tensors


def scaled(tensors: dict[str, Tensor], *, subtracts: bool, config: DictionaryConfig, input_scale: float) -> SAE:
    """The dictionary whose `raw(..., subtracts=subtracts)` these tensors are."""
    b_enc = _moved(tensors["b_enc"], tensors["b_dec"], tensors["W_enc"], int(bool(config.subtract_b_dec)) - int(subtracts))
    return SAE(
        tensors["W_enc"],
        (b_enc * input_scale).float(),
        tensors["W_dec"],
        (tensors["b_dec"].double() * input_scale).float(),
        config,
        input_scale,
        _threshold(tensors["threshold"], input_scale) if "threshold" in tensors else None,
    )


def with_unit_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same reconstructions of a relu dictionary with decoder rows of norm 1: the norms go into encoder and activations.

    A feature whose row is 0 adds nothing; it becomes one that never fires, along the first axis.
    """
    norms = tensors["W_dec"].double().norm(dim=1)
    rows = tensors["W_dec"] / norms.clamp_min(1e-30)[:, None]
    rows[norms == 0, 0] = 1
    return tensors | {
        "W_enc": (tensors["W_enc"] * norms).float(),
        "b_enc": (tensors["b_enc"] * norms).float(),
        "W_dec": rows.float(),
    }


def _moved(b_enc: Tensor, b_dec: Tensor, W_enc: Tensor, times: int) -> Tensor:
    """b_enc + times * b_dec W_enc, fp64: the two terms may be much larger than their sum."""
    if times == 0:
        return b_enc.double()
    product = torch.cat([b_dec.double() @ block.double() for block in W_enc.split(BLOCK, dim=1)])
    return b_enc.double() + times * product


def _threshold(threshold: Tensor, factor: float) -> Tensor:
    """Times `factor`; a negative one means that none was seen in training yet, and stays."""
    return torch.where(threshold < 0, threshold, (threshold.double() * factor).float())
