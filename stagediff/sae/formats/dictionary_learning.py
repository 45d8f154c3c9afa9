"""dictionary_learning (saprmarks), `train_sae` and `load_dictionary`: ae.pt, a state dict, and config.json, whose trainer.dict_class names the class.

Raw inputs, decoder rows of norm 1. An activation norm that a training divided by is folded into biases and threshold before ae.pt is written,
so nothing is left to rescale on the way in.

| class | architecture | subtracts b_dec | |
|---|---|---|---|
| AutoEncoder | relu | yes | `bias` is b_dec; its loader makes the decoder's norm 1 |
| AutoEncoderNew | relu | no | `decoder.bias` is b_dec; comes in only |
| AutoEncoderTopK | topk | yes | its threshold counts only where a caller asks for it |
| BatchTopKSAE | batchtopk | yes | one threshold for all features; negative: none yet |
| MatryoshkaBatchTopKSAE | batchtopk | yes | comes in only, without its nesting: with all groups active it computes the same |
| JumpReluAutoEncoder | jumprelu | no | has a switch for it that is not saved |
"""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.foreign import ENTRY, as_it_is, check_tensors, own_entry, read_entry
from stagediff.sae.formats.units import raw, scaled, with_unit_decoder
from stagediff.sae.layout import CFG as STORED_CFG

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["FILES", "contents", "read"]

CONFIG = "config.json"
WEIGHTS = "ae.pt"
FILES: tuple[str, ...] = (WEIGHTS, CONFIG)


class _Class(NamedTuple):
    architecture: str
    subtracts: bool
    b_dec: str
    """Its name in the state dict."""
    is_linear: bool
    """Weights lie in nn.Linear modules, [out, in]; else as W_enc [d, F], W_dec [F, d]."""


CLASSES = {
    "AutoEncoder": _Class("relu", True, "bias", True),
    "AutoEncoderNew": _Class("relu", False, "decoder.bias", True),
    "AutoEncoderTopK": _Class("topk", True, "b_dec", True),
    "BatchTopKSAE": _Class("batchtopk", True, "b_dec", True),
    "MatryoshkaBatchTopKSAE": _Class("batchtopk", True, "b_dec", False),
    "JumpReluAutoEncoder": _Class("jumprelu", False, "b_dec", False),
}
OUT = {"relu": "AutoEncoder", "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "jumprelu": "JumpReluAutoEncoder"}


def contents(artifact: "Artifact", model: dict[str, Any]) -> dict[str, bytes]:
    """File -> bytes. `model` and the stored metadata tell lm_name and layer."""
    sae = SAE.load(artifact)
    name = OUT[sae.architecture]
    kind = CLASSES[name]
    tensors = raw(sae, subtracts=kind.subtracts)
    if sae.architecture == "relu":
        tensors = with_unit_decoder(tensors)
    state = {file: tensors[ours].t().contiguous() if turned else tensors[ours].contiguous() for file, ours, turned in _names(kind)}
    if sae.k is not None:
        state["k"] = torch.tensor(sae.k, dtype=torch.int)
        state["threshold"] = tensors["threshold"][0].clone() if "threshold" in tensors else torch.tensor(-1.0)
    elif "threshold" in tensors:
        state["threshold"] = tensors["threshold"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    config = _config(sae, name, artifact.read_json(STORED_CFG)["metadata"] | model)
    return {WEIGHTS: buffer.getvalue(), CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}


def read(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The dictionary, on the CPU in fp32, and its model's name. Raises UserError when the files are no dictionary or of a class that stagediff lacks."""
    config, trainer = _read_config(folder / CONFIG)
    name = trainer.get("dict_class")
    if name not in CLASSES:
        raise UserError(
            f"The dictionary in {folder} is of class {name!r}; {', '.join(CLASSES)} can be taken in. (trainer.dict_class in {CONFIG} says which.)"
        )
    kind = CLASSES[name]
    state = _read_state(folder / WEIGHTS)
    tensors, k = _tensors(kind, state, folder, trainer.get("k"))
    metadata = {"model_name": trainer["lm_name"]} if isinstance(trainer.get("lm_name"), str) else {}
    if not (own := config.get(ENTRY)):
        return as_it_is(kind.architecture, tensors, subtracts=kind.subtracts, k=k), metadata
    cfg, scale = read_entry(own, f"{ENTRY} in {folder / CONFIG}", kind.architecture)
    return scaled(tensors, subtracts=kind.subtracts, config=cfg, input_scale=scale), metadata


def _names(kind: _Class) -> list[tuple[str, str, bool]]:
    """(name in the state dict, ours, whether it is transposed)."""
    if kind.is_linear:
        weights = [("encoder.weight", "W_enc", True), ("encoder.bias", "b_enc", False), ("decoder.weight", "W_dec", True)]
    else:
        weights = [("W_enc", "W_enc", False), ("b_enc", "b_enc", False), ("W_dec", "W_dec", False)]
    return [*weights, (kind.b_dec, "b_dec", False)]


def _config(sae: SAE, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json. Its layer is the block whose output was read: what SAELens calls hook_resid_pre of 3 is the output of 2."""
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": sae.d, "dict_size": sae.features}
    if sae.k is not None:
        trainer["k"] = sae.k
    if metadata.get("model_name"):
        trainer["lm_name"] = metadata["model_name"]
    if hook := metadata.get("hook_name"):
        trainer["submodule_name"] = hook
        _, layer, site = f"{hook}..".split(".")[:3]
        if site in ("hook_resid_pre", "hook_resid_post") and layer.isdigit() and (at := int(layer) - (site == "hook_resid_pre")) >= 0:
            trainer["layer"] = at
    buffer = {"d_submodule": sae.d} | ({"ctx_len": metadata["context_size"]} if metadata.get("context_size") else {})
    return {"trainer": trainer, "buffer": buffer, ENTRY: own_entry(sae)}


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole config and its trainer part."""
    try:
        config = json.loads(file.read_bytes())
        trainer = config["trainer"]
        if not isinstance(trainer, dict):
            raise TypeError("trainer is no object")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{file} cannot be read as dictionary_learning's config ({error}). JSON with a part `trainer` that names dict_class was expected."
        ) from None
    return config, trainer


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken pickle raises depends on where it is broken
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{file} cannot be read ({first}). A state dict of plain tensors was expected, as dictionary_learning saves it; a file that holds "
            "other Python objects is not opened."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds no state dict of tensors. One was expected, as dictionary_learning saves it.")
    return {str(name): value for name, value in state.items()}


def _tensors(kind: _Class, state: dict[str, Tensor], folder: Path, asked_k: Any) -> tuple[dict[str, Tensor], int | None]:
    """The weights under our names, fp32, and k. Raises UserError when something lacks or does not fit."""
    names = _names(kind)
    of = {ours: file for file, ours, _ in names}
    encoder = state.get(of["W_enc"])
    if encoder is None or encoder.ndim != 2:
        raise UserError(
            f"{folder / WEIGHTS} holds no matrix {of['W_enc']}, which its class in {CONFIG} asks for; it holds {', '.join(state)}."
        )
    d, F = (encoder.shape[1], encoder.shape[0]) if kind.is_linear else (encoder.shape[0], encoder.shape[1])
    shapes: dict[str, tuple[int, ...]] = {
        of["W_enc"]: tuple(encoder.shape),
        of["b_enc"]: (F,),
        of["W_dec"]: (d, F) if kind.is_linear else (F, d),
        of["b_dec"]: (d,),
    }
    if kind.architecture in ("batchtopk", "jumprelu"):
        shapes["threshold"] = () if kind.architecture == "batchtopk" else (F,)
    state = {name: value.float() if name in shapes else value for name, value in state.items()}
    check_tensors(state, shapes, f"{of['W_enc']} {tuple(encoder.shape)}")
    tensors = {ours: state[file].t().contiguous() if turned else state[file] for file, ours, turned in names}
    if "threshold" in shapes:
        tensors["threshold"] = state["threshold"].expand(F).clone()
    return tensors, _k(state.get("k"), asked_k, F, folder) if kind.architecture in ("topk", "batchtopk") else None


def _k(stored: Tensor | None, asked: Any, F: int, folder: Path) -> int:
    k = asked if stored is None else int(stored)
    if asked is not None and asked != k:
        raise UserError(f"k is {k} in {folder / WEIGHTS} and {asked!r} in {CONFIG}. Its files do not belong together.")
    if not (isinstance(k, int) and 0 < k <= F):
        raise UserError(f"The dictionary's k is {k!r} in {folder}; a number from 1 to its {F} features was expected.")
    return k
