"""Dictionaries of other libraries: an SAE saved by sae_lens comes in as an artifact and may be S; any dictionary goes out for sae_lens.

Only the files are read and written; the package itself is not needed. See `layout.py` for what stands in them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagediff.digest import files_digest
from stagediff.errors import UserError
from stagediff.sae.layout import CFG, WEIGHTS, from_bytes, to_bytes
from stagediff.sae.spec import FinetuneSpec, ImportSpec, TrainSpec
from stagediff.steps import Job

if TYPE_CHECKING:
    from stagediff.store import Artifact, Store

__all__ = ["EXPORTS", "compute", "export_saelens", "resolve_import"]


def resolve_import(path: str | Path) -> ImportSpec:
    """The spec of importing the SAE in folder `path` (cfg.json and sae_weights.safetensors), by the digest of its files.

    Raises UserError when the folder holds no such SAE.
    """
    return ImportSpec(path=str(path), digest=_digest(Path(path)))


def compute(spec: ImportSpec, job: Job) -> dict[str, Any]:
    """Fills a `dictionaries` artifact with the same function. Figures: architecture, d, features, decoder_norm_mean / _min / _max.

    Raises UserError when the folder is gone or holds something else by now, or an architecture that stagediff does not have.
    """
    if spec.path is None:
        raise UserError("An import needs the folder of the SAE; no path was given.")
    folder = Path(spec.path)
    if (digest := _digest(folder)) != spec.digest:
        raise UserError(
            f"The SAE in {folder} is not the one this import was planned with (digest {digest[:12]}, planned {spec.digest[:12]}). Plan it again."
        )
    cfg_bytes = (folder / CFG).read_bytes()
    sae = from_bytes(cfg_bytes, (folder / WEIGHTS).read_bytes())
    metadata = json.loads(cfg_bytes).get("metadata") or {}
    kept = {k: v for k, v in metadata.items() if k not in ("stagediff", "sae_lens_version")}
    cfg, weights = to_bytes(sae, kept)
    job.writer.write_bytes(WEIGHTS, weights)
    job.writer.write_bytes(CFG, cfg)
    norms = sae.decoder_norms()
    return {
        "architecture": sae.architecture,
        "d": sae.d,
        "features": sae.features,
        "decoder_norm_mean": float(norms.mean()),
        "decoder_norm_min": float(norms.min()),
        "decoder_norm_max": float(norms.max()),
    }


def export_saelens(artifact: "Artifact", folder: str | Path, store: "Store | None" = None) -> Path:
    """Copies a dictionary to `folder` so that `sae_lens.SAE.load_from_disk(folder)` reads it; returns the folder.

    With `store` the model's name is looked up in the harvest it was trained on and put into the metadata (artifacts leave it out: the same
    model under another path is the same model). Raises UserError when the artifact is no complete dictionary or the folder cannot be written.
    """
    artifact.require()
    if artifact.ref.kind != "dictionaries":
        raise UserError(f"{artifact.ref} is no dictionary. Give the key of one: `stagediff ls` shows them under dictionaries.")
    cfg = artifact.read_json(CFG)
    weights = artifact.read_bytes(WEIGHTS)
    if store is not None:
        cfg["metadata"] |= _model_metadata(artifact, store)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CFG).write_text(json.dumps(cfg, indent=2, sort_keys=True))
    except OSError as error:
        raise UserError(
            f"The dictionary could not be exported to {folder}: {error.strerror}. Choose a folder that can be written and has room."
        ) from None
    return folder


EXPORTS = {"saelens": export_saelens}
"""Format -> (artifact, folder, store) -> folder."""


def _model_metadata(artifact: "Artifact", store: "Store") -> dict[str, Any]:
    spec = artifact.spec()
    if not isinstance(spec, TrainSpec | FinetuneSpec):
        return {}
    model = store.artifact(spec.data.base).manifest.spec.get("model", {})
    revision = {"model_from_pretrained_kwargs": {"revision": model["revision"]}} if model.get("revision") else {}
    return {"model_name": model.get("name") or model.get("artifact"), **revision}


def _digest(folder: Path) -> str:
    files = [folder / CFG, folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} holds no {file.name}. A folder that sae_lens saved was expected, with {CFG} and {WEIGHTS}.")
    return files_digest(files, root=folder)
