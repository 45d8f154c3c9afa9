"""Dictionaries in files that others may have written: how these are checked, what they are taken in as, and the entry by which stagediff knows its own.

A file of another library has no place for the input scale and the training config. They go into an entry `stagediff` that its package does
not look at; without the entry the file's units are taken as they are, with input scale 1.
"""

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.spec import DictionaryConfig

__all__ = ["ENTRY", "as_it_is", "check_tensors", "own_entry", "read_entry"]

ENTRY = "stagediff"


def own_entry(sae: SAE) -> dict[str, Any]:
    """What stands under `stagediff` in a file with this dictionary."""
    return {"config": sae.config.model_dump(mode="json"), "input_scale": sae.input_scale}


def read_entry(entry: Any, where: str, architecture: str | None = None) -> tuple[DictionaryConfig, float]:
    """Config and input scale from such an entry.

    Raises UserError, which names the entry by `where`, when it is no such thing or its architecture is not the one that the file tells (if given).
    """
    try:
        config = DictionaryConfig.model_validate(entry["config"])
        scale = float(entry["input_scale"])
        if not 0 < scale < float("inf"):
            raise ValueError(f"input_scale is {scale}")
        if architecture not in (None, config.architecture):
            raise ValueError(f"it says {config.architecture}, the file holds {architecture}")
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is not what stagediff writes ({error}). Export the dictionary again.") from None
    return config, scale


def as_it_is(architecture: str, tensors: dict[str, Tensor], *, subtracts: bool, k: int | None = None) -> SAE:
    """The dictionary of these weights (named and shaped as in `SAE`) in their own units: input scale 1."""
    norms = tensors["W_dec"].norm(dim=1)
    is_unit = bool(((norms - 1).abs() < 1e-4).all())
    F, d = tensors["W_dec"].shape
    config = DictionaryConfig.model_validate(
        {
            "architecture": architecture,
            "features": F,
            "k": min(32 if k is None else k, F),
            "decoder_norm": "unit" if is_unit else "free",
            "subtract_b_dec": subtracts,
        }
    )
    return SAE(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], resolved(config, d), 1.0, tensors.get("threshold"))


def check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], said: str) -> None:
    """Raises UserError unless every name of `shapes` is there with its shape (which `said` asks for) and finite."""
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise UserError(f"The dictionary's {name} has shape {found}; {said} asks for {shape}. Its files do not belong together.")
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"The dictionary's {name} holds NaN or infinite values. Its training failed; it cannot be used.")
