"""A user's words (paths, hub names, revisions) turned into sources with digests, and checked, before any work.

A local folder is known by the sha256 of its config, weights and tokenizer, one behind a URL too (s3://bucket/model: see `remote`); a hub
repository by its commit, to which the source is pinned; a tokenizer always by its files' contents, so that two models with the same tokenizer
share their token rows. Checks read `config.json` only: no weight is loaded, and neither torch nor transformers is imported here.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagediff.digest import file_digest, files_digest
from stagediff.errors import UserError
from stagediff.lm import hub, remote
from stagediff.lm.spec import HookPoint, ModelSource, TokenizerSource
from stagediff.spec import Ref

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = [
    "artifact_folder",
    "check_context",
    "check_hook",
    "check_models",
    "check_unchanged",
    "local_copy",
    "model_config",
    "n_layers",
    "resolve_model",
    "resolve_tokenizer",
    "width",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"(model|pytorch_model)[^/]*-of-[^/]*\.(safetensors|bin)")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SHAPE_FIELDS = {
    "architecture": ("model_type",),
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "vocabulary": ("vocab_size",),
}
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def resolve_model(*, name: str, revision: str | None = None, adapter: str | None = None) -> ModelSource:
    """The model that a path or hub name means now.

    Parameters: adapter: path or hub name of a PEFT adapter, merged at load time; "name@revision" pins a hub one.
    Raises UserError when neither a folder nor the hub (or its local cache) answers, or when the folder holds no model.
    """
    folder = _local_folder(name)
    if folder is not None:
        digest = _folder_digest(folder)
        revision = None
    else:
        revision = hub.commit(name, revision)
        digest = f"commit:{revision}"
    if adapter is not None:
        adapter, adapter_digest = _resolve_adapter(adapter)
        digest = hashlib.sha256(f"{digest}+{adapter_digest}".encode()).hexdigest()
    return ModelSource(name=_known_as(name, folder), revision=revision, adapter=adapter, digest=digest)


def resolve_tokenizer(*, name: str, revision: str | None = None) -> TokenizerSource:
    """The tokenizer that a path (a folder, or a tokenizer.json) or hub name means now, by its files' contents. Raises UserError as `resolve_model`."""
    folder = _local_folder(name, TOKENIZER_FILES)
    commit = None if folder is not None else hub.commit(name, revision)
    files = _tokenizer_files(folder if folder is not None else name, commit)
    if not files:
        raise UserError(
            f"{name!r} holds no tokenizer (none of {', '.join(TOKENIZER_FILES[:1] + TOKENIZER_FILES[4:8])}). Save the model's tokenizer "
            "beside it, or name another tokenizer."
        )
    return TokenizerSource(name=_known_as(name, folder), revision=commit, digest=files_digest(files, files[0].parent))


def local_copy(name: str, only: tuple[str, ...] | None = None) -> str:
    """What transformers can load: a path for a URL (its files in this machine's cache), anything else as it is. `only`: the files that are needed."""
    return str(_local_folder(name, only)) if remote.is_remote(name) else name


def check_unchanged(source: ModelSource) -> None:
    """Raises UserError when a local model no longer is what its digest says. (Hub names are pinned to a commit.)"""
    if source.artifact is not None or source.name is None:
        return
    now = resolve_model(name=source.name, revision=source.revision, adapter=source.adapter)
    if now.digest != source.digest:
        raise UserError(
            f"The model {source.name}{' with adapter ' + source.adapter if source.adapter else ''} has changed since this run was planned "
            f"(digest {_short(source.digest)} then, {_short(now.digest)} now). Plan the run again: what the new weights give gets a key of "
            "its own."
        )


def check_models(base: ModelSource, finetuned: ModelSource, store: "Store | None" = None) -> None:
    """Raises UserError unless both have the same architecture, shapes and tokenizer. Artifacts that do not exist yet are skipped."""
    first, second = model_config(base, store), model_config(finetuned, store)
    if first is None or second is None:
        return
    for what, names in SHAPE_FIELDS.items():
        a, b = _field(first, names), _field(second, names)
        if a != b:
            raise UserError(
                f"The two models do not fit together: {_called(base)} has {what} {a}, {_called(finetuned)} has {what} {b}. "
                "A diff compares one architecture before and after finetuning; name a model and its own finetune."
            )
    a, b = (_tokenizer_content(s, store) for s in (base, finetuned))
    if a is not None and b is not None and a != b:
        raise UserError(
            f"The two models do not share a tokenizer: {_called(base)} and {_called(finetuned)} split text differently, so their "
            "activations cannot be "
            "paired token by token. Name a model and its own finetune, or save the base's tokenizer with the finetune if the files are "
            "what is wrong."
        )


def check_hook(source: ModelSource, hook: HookPoint, store: "Store | None" = None) -> None:
    """Raises UserError when the model has no such layer; from its config only. Artifacts that do not exist yet are skipped."""
    config = model_config(source, store)
    if config is None:
        return
    n = n_layers(config)
    if not 0 <= hook.layer < n:
        raise UserError(f"The hook point asks for layer {hook.layer}, but {_called(source)} has layers 0 to {n - 1}. Choose one of these.")


def check_context(config: dict[str, Any], context: int) -> None:
    """Raises UserError when rows of `context` tokens are longer than the model was made for. `config`: as `model_config` gives it."""
    most = next((config[name] for name in POSITION_FIELDS if isinstance(config.get(name), int) and config[name] > 0), None)
    if most is not None and context > most:
        raise UserError(
            f"context is {context}, but the model takes at most {most} tokens at a time (its config.json). Give a context up to that."
        )


def model_config(source: ModelSource, store: "Store | None" = None) -> dict[str, Any] | None:
    """The language model's part of config.json; None for an artifact that does not exist yet (or when no store was given)."""
    if source.artifact is not None:
        if store is None or not store.artifact(source.artifact).is_complete:
            return None
        path = artifact_folder(source.artifact, source.checkpoint, store, only=("config.json",)) / "config.json"
    else:
        assert source.name is not None
        folder = _local_folder(source.name, ("config.json",))
        path = folder / "config.json" if folder is not None else hub.file(source.name, "config.json", source.revision)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"The file {path} is no readable model config ({error}). A Hugging Face causal LM has a config.json beside its weights."
        ) from error
    return config.get("text_config", config)


def n_layers(config: dict[str, Any]) -> int:
    return int(_field(config, SHAPE_FIELDS["layers"]))


def width(config: dict[str, Any]) -> int:
    """The residual stream's width d."""
    return int(_field(config, SHAPE_FIELDS["hidden size"]))


def _field(config: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise UserError(
        f"The model config (model_type {config.get('model_type')!r}) has none of the fields {', '.join(names)}. Decoder-only transformers "
        "of Hugging Face are supported."
    )


def _called(source: ModelSource) -> str:
    if source.artifact is not None:
        return f"{source.artifact}{'/' + source.checkpoint if source.checkpoint else ''}"
    return f"{source.name}{'@' + source.revision if source.revision else ''}"


def _short(digest: str | None) -> str:
    return (digest or "none")[:12]


# --- local folders ---------------------------------------------------------------------------------------------------


def _local_folder(name: str, only: tuple[str, ...] | None = None) -> Path | None:
    """The folder (or single file) that `name` means; None when it can only be a hub name. Raises UserError for a path that is missing.

    A URL means a copy in the cache, of the files in `only`, or of all that make a model.
    """
    if remote.is_remote(name):
        return remote.copy_of(name, _is_of_a_model if only is None else only.__contains__)
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_path:
        raise UserError(
            f"There is no folder {name}. A path to a Hugging Face model folder (config.json, weights, tokenizer) or a hub name like "
            "owner/model was expected."
        )
    return None


def _known_as(name: str, folder: Path | None) -> str:
    """How a source is named: by its full path, its URL, or its hub name."""
    return name if folder is None or remote.is_remote(name) else str(folder)


def _is_of_a_model(file: str) -> bool:
    return file in (*CONFIG_FILES, *TOKENIZER_FILES, *ADAPTER_FILES, *WEIGHTS) or _SHARD.fullmatch(file) is not None


def _folder_digest(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} is a PEFT adapter, not a model. Name the model it was trained on, and give this folder as `adapter:`."
            )
        raise UserError(
            f"{folder} holds no config.json, so it is no Hugging Face model. A folder with config.json, weights (safetensors or bin) and "
            "tokenizer was expected."
        )
    weights = _weights(folder)
    if not weights:
        raise UserError(f"{folder} has a config.json but no weights ({', '.join(WEIGHTS)}). Save the model there with save_pretrained.")
    for file in weights:
        if file.suffix == ".safetensors":
            _check_whole(file)
    files = weights + [folder / n for n in CONFIG_FILES + TOKENIZER_FILES if (folder / n).is_file()]
    return files_digest(files, folder)


def _check_whole(file: Path) -> None:
    """Raises UserError when a safetensors file is shorter than its header says: a download or copy that was cut off."""
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            size = file.stat().st_size
            header = json.loads(f.read(length)) if length < size else {}
        expected = 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The weights {file} cannot be read as safetensors ({error}). Copy or download the model again.") from error
    if size < expected:
        raise UserError(f"The weights {file} are cut off: {size:,} bytes instead of {expected:,}. Copy or download the model again.")


def _weights(folder: Path) -> list[Path]:
    """The weight files that transformers would load, in its order of preference."""
    for name in WEIGHTS:
        if not (folder / name).is_file():
            continue
        if not name.endswith("index.json"):
            return [folder / name]
        try:
            parts = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise UserError(f"The file {folder / name} is no readable weight index ({error}). Copy the model folder again.") from error
        return [folder / name, *(folder / p for p in parts)]
    return []


def _resolve_adapter(adapter: str) -> tuple[str, str]:
    name, _, revision = adapter.partition("@") if not Path(adapter).expanduser().exists() else (adapter, "", "")
    folder = _local_folder(name)
    if folder is None:
        commit = hub.commit(name, revision or None)
        return f"{name}@{commit}", f"commit:{commit}"
    files = [folder / n for n in ADAPTER_FILES if (folder / n).is_file()]
    if not (folder / ADAPTER_FILES[0]).is_file() or len(files) < 2:
        raise UserError(
            f"{folder} is no PEFT adapter: adapter_config.json and adapter_model.safetensors were expected. For a whole model use `name:` "
            "instead of `adapter:`."
        )
    return _known_as(name, folder), files_digest(files, folder)


def artifact_folder(ref: Ref, checkpoint: str | None, store: "Store", only: tuple[str, ...] | None = None) -> Path:
    """A local folder with a models artifact's files: those of the checkpoint, or the final ones at its top (not the checkpoints below it).

    Parameters: only: names of the files that are needed (those that exist); None: all.
    Raises UserError when the artifact is not complete or has no such checkpoint.
    """
    artifact = store.artifact(ref).require()
    below = f"{checkpoint}/" if checkpoint else ""
    files = [n for n in artifact.names(checkpoint or "") if "/" not in n.removeprefix(below)]
    if f"{below}config.json" not in files:
        kept = sorted({n.split("/")[0] for n in artifact.names() if n.count("/") == 1 and n.endswith("/config.json")})
        raise UserError(
            f"The model artifact {ref} has no checkpoint {checkpoint!r}; it holds its final weights and "
            f"{', '.join(kept) or 'no checkpoints'}."
        )
    paths = [artifact.local(n) for n in files if only is None or n.removeprefix(below) in only]
    return paths[0].parent if paths else artifact.local(f"{below}config.json").parent


# --- tokenizers ------------------------------------------------------------------------------------------------------


def _tokenizer_files(where: Path | str, commit: str | None) -> list[Path]:
    """The tokenizer's files that exist, all in one folder."""
    if isinstance(where, Path):
        return [where] if where.is_file() else [where / n for n in TOKENIZER_FILES if (where / n).is_file()]
    import huggingface_hub

    folder = Path(
        hub.ask(
            where,
            lambda offline: huggingface_hub.snapshot_download(
                where, revision=commit, allow_patterns=list(TOKENIZER_FILES), local_files_only=offline
            ),
        )
    )
    return [folder / n for n in TOKENIZER_FILES if (folder / n).is_file()]


def _tokenizer_content(source: ModelSource, store: "Store | None") -> Any:
    """What decides how text is split, in a form that can be compared; None when the model comes without a tokenizer."""
    if source.artifact is not None:
        if store is None:
            return None
        where: Path | str = artifact_folder(source.artifact, None, store, only=TOKENIZER_FILES)
    else:
        assert source.name is not None
        where = _local_folder(source.name, TOKENIZER_FILES) or source.name
    files = {p.name: p for p in _tokenizer_files(where, source.revision)}
    if "tokenizer.json" in files:
        content = json.loads(files["tokenizer.json"].read_text())
        model = dict(content["model"])
        # older files write a merge as "a b", newer ones as ["a", "b"]; dropout and fallbacks are training-time settings
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        return model.get("vocab"), merges, content.get("normalizer"), content.get("pre_tokenizer")
    plain = [n for n in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model") if n in files]
    return [(n, file_digest(files[n])) for n in plain] or None
