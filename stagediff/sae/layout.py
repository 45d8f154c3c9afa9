"""The dictionary's files: SAELens' own layout, so that its package loads them as they are.

`cfg.json` and `sae_weights.safetensors` hold the dictionary for raw residual-stream units: with the input scale s folded in, W_enc * s,
W_dec / s, b_dec / s; b_enc, thresholds and activations are as in scaled units. What SAELens has no place for (s, the training
config, batchtopk's name: it exports as jumprelu) stands under `metadata.stagediff`, and reading unfolds s again.
`optimiser.safetensors`, beside them where a training kept it, is in scaled units.
"""

import json
import struct
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.foreign import ENTRY, as_it_is, check_tensors, own_entry, read_entry

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["CFG", "OPTIMISER", "WEIGHTS", "from_bytes", "optimiser_state", "to_bytes"]

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
OPTIMISER = "optimiser.safetensors"
SAELENS_NAMES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
SAELENS_VERSION = "6.0.0"
"""The layout's version. Without it, or with an older one, SAELens runs a converter for its former layouts."""


def to_bytes(sae: SAE, metadata: dict[str, Any] | None = None) -> tuple[bytes, bytes]:
    """The contents of cfg.json and of the weights file. `metadata` goes into SAELens' metadata (hook_name, context_size, …)."""
    name = SAELENS_NAMES[sae.architecture]
    cfg: dict[str, Any] = {
        "architecture": name,
        "d_in": sae.d,
        "d_sae": sae.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": bool(sae.config.subtract_b_dec),
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, **(metadata or {}), ENTRY: own_entry(sae)},
    }
    if name == "topk":
        cfg |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    s = sae.input_scale
    tensors = {"W_enc": sae.W_enc * s, "b_enc": sae.b_enc, "W_dec": sae.W_dec / s, "b_dec": sae.b_dec / s}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    weights = save({key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()})
    return json.dumps(cfg, indent=2, sort_keys=True).encode(), weights


def from_bytes(cfg_bytes: bytes, weights: bytes) -> SAE:
    """The dictionary of these files, on the CPU in fp32; stagediff's own or SAELens' (version 6; standard, topk or jumprelu).

    Raises UserError when the files are no such dictionary.
    """
    try:
        cfg = json.loads(cfg_bytes)
        tensors = {name: value.float() for name, value in load(weights).items()}
    except (ValueError, SafetensorError, struct.error) as error:
        raise UserError(
            f"The dictionary's {CFG} and {WEIGHTS} cannot be read ({error}). A folder saved by sae_lens 6 was expected; save it again."
        ) from None
    if not isinstance(cfg, dict):
        raise UserError(f"The dictionary's {CFG} holds no JSON object. A folder saved by sae_lens 6 was expected.")
    own = (cfg.get("metadata") or {}).get(ENTRY)
    _check(cfg, tensors)
    if not own:
        return _foreign(cfg, tensors)
    config, s = read_entry(own, f"metadata.{ENTRY} in the dictionary's {CFG}")
    threshold = tensors.get("threshold")
    return SAE(tensors["W_enc"] / s, tensors["b_enc"], tensors["W_dec"] * s, tensors["b_dec"] * s, config, s, threshold)


def optimiser_state(artifact: "Artifact") -> dict[str, Tensor]:
    """The optimiser state that a training stored with its dictionary, by the names of `Optimiser.state`. Raises UserError where there is none."""
    if OPTIMISER not in artifact.names():
        raise UserError(
            f"The optimiser state of the start dictionary {artifact.ref} is to be carried on, but none was stored with it. Train the start with "
            "keep_optimiser: true, or begin with a fresh one (optimiser: fresh)."
        )
    return load(artifact.read_bytes(OPTIMISER))


def _foreign(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """A dictionary that SAELens made. Its units are taken as they are: input scale 1."""
    if cfg.get("rescale_acts_by_decoder_norm"):  # its activations count as if decoder rows had norm 1: make it so
        norms = tensors["W_dec"].norm(dim=1)
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms, "W_dec": tensors["W_dec"] / norms[:, None]}
    architecture = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}[cfg["architecture"]]
    return as_it_is(architecture, tensors, subtracts=bool(cfg.get("apply_b_dec_to_input", True)), k=cfg.get("k"))


def _check(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    known = ("standard", "topk", "jumprelu")
    if cfg.get("architecture") not in known:
        raise UserError(
            f"The dictionary's architecture is {cfg.get('architecture')!r}; {', '.join(known)} can be taken in (a batchtopk SAE is saved by sae_lens "
            "as jumprelu). A folder from before sae_lens 6 has to be loaded and saved by sae_lens once."
        )
    normalised, reshaped = cfg.get("normalize_activations", "none"), cfg.get("reshape_activations", "none")
    if normalised != "none" or reshaped != "none":
        raise UserError(
            f"The dictionary normalises its inputs ({normalised!r}) or reshapes them ({reshaped!r}); one for plain residual vectors was expected. "
            "Fold the scale into the weights first (sae_lens: fold_activation_norm_scaling_factor) and save it again."
        )
    try:
        d, F = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"The dictionary's {CFG} does not say d_in and d_sae. A folder saved by sae_lens 6 was expected.") from None
    expected = {"W_enc": (d, F), "b_enc": (F,), "W_dec": (F, d), "b_dec": (d,)}
    if cfg["architecture"] == "jumprelu":
        expected["threshold"] = (F,)
    check_tensors(tensors, expected, f"{CFG} (d_in {d}, d_sae {F})")
    if cfg["architecture"] == "topk" and not (isinstance(cfg.get("k"), int) and 0 < cfg["k"] <= F):
        raise UserError(f"The dictionary's k is {cfg.get('k')!r}; a number from 1 to its {F} features was expected.")
