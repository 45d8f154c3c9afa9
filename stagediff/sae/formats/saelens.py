"""SAELens, `SAE.save_model` and `SAE.load_from_disk`: the layout in which stagediff stores its own dictionaries. See `stagediff.sae.layout`.

Activations are as in stagediff; the input scale is folded into W_enc, W_dec and b_dec. Every architecture goes out (batchtopk as jumprelu);
standard, topk and jumprelu come in.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagediff.sae.dictionary import SAE
from stagediff.sae.foreign import ENTRY
from stagediff.sae.layout import CFG, WEIGHTS, from_bytes

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = ["FILES", "contents", "read"]

FILES: tuple[str, ...] = (WEIGHTS, CFG)


def contents(artifact: "Artifact", model: dict[str, Any]) -> dict[str, bytes]:
    """File -> bytes: the stored weights as they are, `model` in the metadata."""
    cfg = artifact.read_json(CFG)
    cfg["metadata"] |= model
    return {WEIGHTS: artifact.read_bytes(WEIGHTS), CFG: json.dumps(cfg, indent=2, sort_keys=True).encode()}


def read(folder: Path) -> tuple[SAE, dict[str, Any]]:
    """The dictionary and its metadata. Raises UserError when the files are no dictionary, or one that stagediff has no architecture for."""
    cfg = (folder / CFG).read_bytes()
    sae = from_bytes(cfg, (folder / WEIGHTS).read_bytes())
    metadata = json.loads(cfg).get("metadata") or {}
    return sae, {k: v for k, v in metadata.items() if k not in (ENTRY, "sae_lens_version")}
