"""Import and export: which format a folder is in, the step that takes it in, the files that go out. What stands in them the formats' own files say."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stagediff.digest import files_digest
from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.formats import dictionary_learning, saelens, sparsify
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import FinetuneSpec, ImportSpec, TrainSpec
from stagediff.steps import Job

if TYPE_CHECKING:
    from stagediff.store import Artifact, Store

__all__ = ["FORMATS", "Format", "compute", "export", "resolve_import"]


class Format(Protocol):
    """A module for one library's files."""

    FILES: tuple[str, ...]
    """What a folder of this format holds; in the order in which they are written."""

    def contents(self, artifact: "Artifact", model: dict[str, Any]) -> dict[str, bytes]:
        """File -> bytes of a stored dictionary. `model`: model_name and what else the harvest tells of its model.

        Raises UserError when the format has no place for the dictionary's architecture.
        """

    def read(self, folder: Path) -> tuple[SAE, dict[str, Any]]:
        """The dictionary in a folder that holds FILES, and its metadata. Raises UserError when it cannot be taken in."""


FORMATS: dict[str, Format] = {"saelens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def resolve_import(path: str | Path) -> ImportSpec:
    """The spec of importing the dictionary in folder `path`, by the digest of its files; which format it is in, the files tell.

    Raises UserError when the folder holds no dictionary, or files of two formats.
    """
    found = _formats_in(Path(path))
    if not found:
        raise UserError(_nothing_in(Path(path)))
    if len(found) > 1:
        raise UserError(
            f"{path} holds the files of {' and '.join(found)}. One dictionary was expected: move the others to a folder of their own."
        )
    return ImportSpec.model_validate({"path": str(path), "format": found[0], "digest": _digest(Path(path), found[0])})


def compute(spec: ImportSpec, job: Job) -> dict[str, Any]:
    """Fills a `dictionaries` artifact with the same function. Figures: architecture, d, features, decoder_norm_mean / _min / _max.

    Raises UserError when the folder is gone or holds something else by now, or an architecture that stagediff does not have.
    """
    if spec.path is None:
        raise UserError("An import needs the folder of the SAE; no path was given.")
    folder = Path(spec.path)
    if (digest := _digest(folder, spec.format)) != spec.digest:
        raise UserError(
            f"The SAE in {folder} is not the one this import was planned with (digest {digest[:12]}, planned {spec.digest[:12]}). Plan it again."
        )
    sae, metadata = FORMATS[spec.format].read(folder)
    cfg, weights = to_bytes(sae, metadata)
    job.writer.write_bytes(WEIGHTS, weights)
    job.writer.write_bytes(CFG, cfg)
    return {"architecture": sae.architecture, "d": sae.d, "features": sae.features, **sae.norm_figures()}


def export(artifact: "Artifact", folder: str | Path, store: "Store | None" = None, to: str = "saelens") -> Path:
    """Writes a dictionary to `folder` in the format `to`, so that its package reads it; returns the folder.

    With `store` the model's name is looked up in the harvest it was trained on and written too (artifacts leave it out: the same model under
    another path is the same model). Raises UserError when the artifact is no complete dictionary, the format unknown or without a place for
    its architecture, or the folder cannot be written or holds another format's files.
    """
    if to not in FORMATS:
        raise UserError(f"The format {to!r} is not known; expected one of: {', '.join(FORMATS)}.")
    artifact.require()
    if artifact.ref.kind != "dictionaries":
        raise UserError(f"{artifact.ref} is no dictionary. Give the key of one: `stagediff ls` shows them under dictionaries.")
    folder = Path(folder)
    if others := [name for name in _formats_in(folder) if name != to]:  # some formats' files have the same name
        raise UserError(f"{folder} holds a dictionary in the format {others[0]}. Choose another folder for {to}.")
    contents = FORMATS[to].contents(artifact, _model_metadata(artifact, store) if store is not None else {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FORMATS[to].FILES:
            (folder / name).write_bytes(contents[name])
    except OSError as error:
        raise UserError(
            f"The dictionary could not be exported to {folder}: {error.strerror}. Choose a folder that can be written and has room."
        ) from None
    return folder


def _formats_in(folder: Path) -> list[str]:
    return [name for name, fmt in FORMATS.items() if all(os.path.isfile(folder / file) for file in fmt.FILES)]


def _nothing_in(folder: Path) -> str:
    """What to say of a folder in no known format."""
    layouts = [(" with ".join(sorted(fmt.FILES, key=lambda file: not file.startswith("c"))), name) for name, fmt in FORMATS.items()]
    wanted = " and ".join(", ".join(f"no {files} ({name})" for files, name in part) for part in (layouts[:-1], layouts[-1:]))
    try:
        below = sorted(child.name for child in folder.iterdir() if _formats_in(child))
    except OSError:
        below = []
    hint = f" Folders in it that do: {', '.join(below[:8])}{', …' if len(below) > 8 else ''}." if below else ""
    return f"{folder} holds {wanted}. A folder with a dictionary that one of these libraries saved was expected.{hint}"


def _model_metadata(artifact: "Artifact", store: "Store") -> dict[str, Any]:
    spec = artifact.spec()
    if not isinstance(spec, TrainSpec | FinetuneSpec):
        return {}
    model = store.artifact(spec.data.base).manifest.spec.get("model", {})
    revision = {"model_from_pretrained_kwargs": {"revision": model["revision"]}} if model.get("revision") else {}
    return {"model_name": model.get("name") or model.get("artifact"), **revision}


def _digest(folder: Path, name: str) -> str:
    files = [folder / file for file in FORMATS[name].FILES]
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{folder} holds no {file.name} any more. A folder in the format {name} was expected; plan the import again.")
    return files_digest(files, root=folder)
