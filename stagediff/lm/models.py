"""Loads language models and tokenizers from their sources: any Hugging Face causal LM by path, hub name or store artifact.

A model comes in eval mode, in the asked precision, with a PEFT adapter merged in if the source names one. With `upto` the blocks above a hook
point are not even loaded. bf16 weights are what makes a forward pass fast on CPUs that have bf16 instructions (speed.md: 3.4x fp32);
what Hugging Face keeps in fp32 (rotary frequencies, the inside of norms) stays so.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from stagediff.errors import UserError
from stagediff.lm import sources
from stagediff.lm.hooks import decoder_layers
from stagediff.lm.spec import HarvestSpec, HookPoint, ModelSource, TokenizerSource

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["LoadedModel", "check_harvest", "load_model", "load_tokenizer"]

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class LoadedModel:
    """A causal LM ready to run, and where it came from."""

    model: PreTrainedModel
    source: ModelSource
    where: str
    """Path or hub name the weights were read from."""
    _tokenizer_from: tuple[str, str | None]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved with the model; read on first use."""
        return _tokenizer(*self._tokenizer_from)

    @property
    def device(self) -> torch.device:
        """Where token ids go (a model spread over several devices has its embedding there)."""
        return cast(torch.Tensor, self.model.get_input_embeddings().weight).device

    @property
    def width(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocab(self) -> int:
        """How many token ids the model knows."""
        return len(cast(torch.Tensor, self.model.get_input_embeddings().weight))


def load_model(
    source: ModelSource,
    store: "Store | None" = None,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    upto: HookPoint | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> LoadedModel:
    """The model of a source, in eval mode and without gradients.

    Parameters
    ----------
    upto: blocks above this hook point are not loaded (its own block is); only `hooks.read` works then.
    device_map: accelerate's placement ("auto": spread over all GPUs and, if need be, the CPU). None: all on `device`, or spread over the GPUs
        when `device` is "cuda", several are visible and one cannot hold the model.

    Raises
    ------
    UserError: the weights are missing, incomplete or of another shape, a local model changed since its digest was taken, or the layer does not exist.
    """
    if source.artifact is not None:
        if store is None:
            raise ValueError("a model artifact needs the store it is in")
        where, revision = str(sources.artifact_folder(source.artifact, source.checkpoint, store)), None
        # checkpoints share the tokenizer at the artifact's top
        tokenizer_from: tuple[str, str | None] = (str(Path(where).parent) if source.checkpoint else where, None)
    else:
        sources.check_unchanged(source)
        assert source.name is not None
        where, revision = sources.local_copy(source.name), source.revision
        tokenizer_from = (where, revision)
    config = _config(where, revision)
    if upto is not None:
        _check_layer(config, upto, where)
        if source.adapter is None:
            _truncate(config, upto.layer + 1)
    dtype = DTYPES[precision]
    placement = device_map if device_map is not None else _placement(device, config, dtype)
    loaded_dtype = torch.float32 if source.adapter is not None else dtype
    model = _load(where, revision, config, loaded_dtype, placement, truncated=upto is not None)
    if source.adapter is not None:
        model = _merge(model, source.adapter)
        _cast_parameters(model, dtype)
    if placement is None:
        model.to(device)  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    return LoadedModel(model, source, where, tokenizer_from)


def check_harvest(spec: HarvestSpec) -> None:
    """Raises UserError for a model outside the store whose architecture cannot be harvested. Reads its config, loads no weight."""
    if spec.model.artifact is None:
        assert spec.model.name is not None
        _check_architecture(sources.local_copy(spec.model.name, ("config.json",)), spec.model.revision, spec.hook.layer)


@cache
def _check_architecture(where: str, revision: str | None, layer: int) -> None:
    config = _config(where, revision)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"The model {where} is of type {config.model_type!r}, which is no decoder-only language model (a causal LM of Hugging Face). "
            "Give one, such as GPT-NeoX, GPT-2, Llama, Qwen, Gemma or Mistral."
        )
    _truncate(config, layer + 1)
    with torch.device("meta"):
        decoder_layers(AutoModelForCausalLM.from_config(config))


def load_tokenizer(source: TokenizerSource, store: "Store | None" = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a source. Raises UserError when there is none there."""
    if source.artifact is not None:
        if store is None:
            raise ValueError("a tokenizer artifact needs the store it is in")
        return _tokenizer(str(store.artifact(source.artifact).require().local("")), None)
    assert source.name is not None
    if source.digest is not None and (now := sources.resolve_tokenizer(name=source.name, revision=source.revision).digest) != source.digest:
        raise UserError(
            f"The tokenizer {source.name} has changed since this run was planned (digest {source.digest[:12]} then, {(now or '')[:12]} "
            "now). Plan the run again."
        )
    return _tokenizer(sources.local_copy(source.name, sources.TOKENIZER_FILES), source.revision)


def _config(where: str, revision: str | None) -> Any:
    try:
        with _quiet():
            return AutoConfig.from_pretrained(where, revision=revision, local_files_only=Path(where).exists())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"The config of the model {where} cannot be used: {_first_line(error)} A Hugging Face causal LM that this transformers version "
            "knows was expected."
        ) from error


def _check_layer(config: Any, hook: HookPoint, where: str) -> None:
    n = config.get_text_config(decoder=True).num_hidden_layers
    if not 0 <= hook.layer < n:
        raise UserError(f"The hook point asks for layer {hook.layer}, but the model {where} has layers 0 to {n - 1}. Choose one of these.")


def _truncate(config: Any, n: int) -> None:
    """Makes the config one of the first n blocks; per-layer lists (attention types and the like) are cut with it."""
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:n])
    text.num_hidden_layers = n


def _load(where: str, revision: str | None, config: Any, dtype: torch.dtype, placement: Any, truncated: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"device_map": placement} if placement is not None else {}
    auto: Any = AutoModelForCausalLM
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                where,
                revision=revision,
                config=config,
                dtype=dtype,
                local_files_only=Path(where).exists(),
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(
                f"The model {where} does not fit into the device's memory ({_first_line(error)}). Use bf16, a larger device, or several "
                "GPUs."
            ) from error
        raise UserError(
            f"The weights of the model {where} cannot be loaded: {_first_line(error)} Weights that fit its config.json were expected; a "
            "damaged or half-copied folder is the usual reason."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"The model {where} lacks {len(missing)} of its weights ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): they "
            "would be random. "
            "Copy the folder again, or check that its config.json belongs to its weights."
        )
    if (unexpected := sorted(info["unexpected_keys"])) and not truncated and len(unexpected) > len(model.state_dict()):
        raise UserError(
            f"The weights of the model {where} do not belong to its config.json: {len(unexpected)} tensors have no place in it "
            f"({', '.join(unexpected[:3])}, …)."
        )
    return model


def _merge(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    try:
        import peft
    except ImportError as error:
        raise UserError(f"The adapter {adapter} needs the package peft, which is not installed. Install it (pip install peft).") from error

    adapter = sources.local_copy(adapter)
    name, revision = (adapter, None) if Path(adapter).exists() else (adapter.partition("@")[0], adapter.partition("@")[2] or None)
    try:
        with _quiet():
            return peft.PeftModel.from_pretrained(model, name, revision=revision).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"The adapter {adapter} cannot be merged into the model: {_first_line(error)} An adapter trained on this very base model was "
            "expected."
        ) from error


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters only: casting buffers too would spoil the rotary frequencies. Merging happens before, in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _placement(device: str, config: Any, dtype: torch.dtype) -> str | None:
    """ "auto" when one GPU cannot hold the weights and others are there."""
    if device != "cuda" or torch.cuda.device_count() < 2:
        return None
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    free, _ = torch.cuda.mem_get_info()
    return "auto" if parameters * dtype.itemsize > 0.8 * free else None


def _tokenizer(where: str, revision: str | None) -> PreTrainedTokenizerBase:
    path = Path(where)
    file = path if path.is_file() else path / "tokenizer.json"
    try:
        if file.is_file() and (path.is_file() or not (path / "tokenizer_config.json").is_file()):
            return PreTrainedTokenizerFast(tokenizer_file=str(file))
        return AutoTokenizer.from_pretrained(where, revision=revision, local_files_only=path.exists())
    except Exception as error:  # tokenizers raises plain Exception for a damaged file
        raise UserError(
            f"The tokenizer of {where} cannot be loaded: {_first_line(error)} Tokenizer files as saved by save_pretrained were expected "
            "there."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0].strip() if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else line + "."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report on tensors that a truncated model has no place for (missing ones raise here)."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
