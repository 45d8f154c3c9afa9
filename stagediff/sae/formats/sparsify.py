"""sparsify (EleutherAI), `SparseCoder.save_to_disk` and `load_from_disk`: cfg.json and sae.safetensors, TopK only.

f = topk(relu((x - b_dec) W_enc + b_enc)), x_hat = f W_dec + b_dec, raw inputs, decoder rows of norm 1 unless `normalize_decoder` is false.
`multi_topk` is about the training's loss: encode and decode take k features all the same (though forward(), in 1.3.3, then returns a
reconstruction from 4 k). Which hook point it is for, its folder's name says (layers.5: after block 5); the file has no place for it.
"""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.foreign import ENTRY, as_it_is, check_tensors, own_entry, read_entry
from stagediff.sae.formats.units import raw, scaled

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["FILES", "contents", "read"]

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"
FILES: tuple[str, ...] = (WEIGHTS, CFG)
REFUSED = {
    "transcode": "predicts a module's output from its input (transcode)",
    "skip_connection": "has a skip connection",
    "signed": "keeps negative activations (signed)",
}
"""Setting of cfg.json that changes the function -> what it means."""


def contents(artifact: "Artifact", model: dict[str, Any]) -> dict[str, bytes]:
    """File -> bytes. Raises UserError when the dictionary is no topk."""
    sae = SAE.load(artifact)
    if sae.architecture != "topk":
        raise UserError(
            f"{artifact.ref} is {sae.architecture}, and sparsify holds topk only. Export it with --format dictionary_learning or saelens, which "
            "hold all architectures."
        )
    tensors = raw(sae, subtracts=True)
    cfg = {
        "activation": "topk",
        "num_latents": sae.features,
        "k": sae.config.k,
        "normalize_decoder": sae.config.decoder_norm == "unit",
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d,
        ENTRY: own_entry(sae),
    }
    named = {
        "encoder.weight": tensors["W_enc"].t().contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"].contiguous(),
        "b_dec": tensors["b_dec"],
    }
    return {WEIGHTS: save(named), CFG: json.dumps(cfg, indent=2, sort_keys=True).encode()}


def read(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The dictionary, on the CPU in fp32, and no metadata. Raises UserError when the files are no plain TopK dictionary."""
    try:
        cfg = json.loads((folder / CFG).read_bytes())
        named = {name: value.float() for name, value in load((folder / WEIGHTS).read_bytes()).items()}
    except (ValueError, SafetensorError, struct.error, OSError) as error:
        raise UserError(f"{CFG} and {WEIGHTS} in {folder} cannot be read ({error}). A folder saved by sparsify was expected.") from None
    d, F, k = _sizes(cfg, folder)
    for setting, meaning in REFUSED.items():
        if cfg.get(setting) or (setting == "skip_connection" and "W_skip" in named):
            raise UserError(f"The sparse coder in {folder} {meaning}; a plain autoencoder (TopK) was expected.")
    if (activation := cfg.get("activation", "topk")) != "topk":
        raise UserError(
            f"The sparse coder in {folder} has activation {activation!r}; topk was expected, the only one that stagediff has too."
        )
    check_tensors(
        named,
        {"encoder.weight": (F, d), "encoder.bias": (F,), "W_dec": (F, d), "b_dec": (d,)},
        f"{CFG} (d_in {d}, {F} latents)",
    )
    tensors = {
        "W_enc": named["encoder.weight"].t().contiguous(),
        "b_enc": named["encoder.bias"],
        "W_dec": named["W_dec"],
        "b_dec": named["b_dec"],
    }
    if not (own := cfg.get(ENTRY)):
        return as_it_is("topk", tensors, subtracts=True, k=k), {}
    config, scale = read_entry(own, f"{ENTRY} in {folder / CFG}", "topk")
    return scaled(tensors, subtracts=True, config=config, input_scale=scale), {}


def _sizes(cfg: Any, folder: Path) -> tuple[int, int, int]:
    """d, features, k."""
    try:
        d = int(cfg["d_in"])
        F = int(cfg.get("num_latents") or d * int(cfg["expansion_factor"]))
        k = int(cfg["k"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{folder / CFG} does not say d_in, k, and num_latents or expansion_factor. A folder saved by sparsify was expected."
        ) from None
    if not 0 < k <= F:
        raise UserError(f"k is {k} in {folder / CFG}; a number from 1 to its {F} latents was expected.")
    return d, F, k
