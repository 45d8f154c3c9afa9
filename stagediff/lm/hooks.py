"""Hook points: where in a decoder activations are read or replaced, found from the module tree rather than from a list of names.

- The decoder layers are the ModuleList with as many blocks as the config says, each holding an attention module.
- `resid_pre` is the block's input, `resid_post` its output.
- `attn_out` and `mlp_out` are what the block *adds to the residual stream*. For most families that is what the attention or MLP module returns;
  Gemma 2/3, OLMo 2 and GLM-4 normalise it first. Which one holds is not guessed from names (Llama and Gemma both have a
  `post_attention_layernorm`, with different meanings) but traced: on a first, tiny forward pass the tensor that the module returns is followed
  through those of the block's own submodules that take it as it is, and then input + attn_out + mlp_out must equal the output.

Nothing above a hook point is computed by `read`: an exception raised in the hook ends the forward pass there.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stagediff.errors import UserError
from stagediff.lm.spec import HookPoint

__all__ = ["Place", "decoder_layers", "find", "intervene", "read"]

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """A module and which side of it the hook point is."""

    module: nn.Module
    side: Literal["input", "output"]


class _Stop(BaseException):
    """Ends a forward pass at the hook point; not an Exception, so that no library code swallows it."""


_places: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, str], Place]]" = weakref.WeakKeyDictionary()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of the decoder, in order. Raises UserError when the module tree has no such list."""
    config: Any = model.config
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    n = config.num_hidden_layers
    lists = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) == n and all(_child(block, "attention") is not None for block in m)
    ]
    if not lists:
        raise UserError(
            f"The model {type(model).__name__} has no list of {n} blocks with an attention module each, so its layers cannot be found. "
            "Decoder-only transformers of Hugging Face are supported (GPT-NeoX, GPT-2, Llama, Qwen, Gemma, Mistral and their like)."
        )
    return lists[0]


def find(model: nn.Module, hook: HookPoint) -> Place:
    """The place of a hook point; traced once per model. Raises UserError when layer or site does not exist."""
    known = _places.setdefault(model, {})
    at = (hook.layer, hook.site)
    if at not in known:
        layers = decoder_layers(model)
        if not 0 <= hook.layer < len(layers):
            raise UserError(
                f"The hook point asks for layer {hook.layer}, but {type(model).__name__} has layers 0 to {len(layers) - 1}. Choose one of "
                "these."
            )
        block = layers[hook.layer]
        if hook.site == "resid_pre":
            known[at] = Place(block, "input")
        elif hook.site == "resid_post":
            known[at] = Place(block, "output")
        else:
            attention, mlp = _added(model, block)
            known[hook.layer, "attn_out"] = Place(attention, "output")
            known[hook.layer, "mlp_out"] = Place(mlp, "output")
    return known[at]


@torch.no_grad()
def read(model: nn.Module, hook: HookPoint, input_ids: Tensor) -> Tensor:
    """Activations [rows, context, d] at the hook point, in the model's precision; no layer above it is computed.

    Parameters: input_ids [rows, context], without padding.
    """
    got: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        got.append(x)
        raise _Stop

    with _hooked(find(model, hook), take):
        _run(model, input_ids)
    return got[0]


@contextmanager
def intervene(model: nn.Module, hook: HookPoint, fn: Transform) -> Iterator[None]:
    """Within it every forward pass of the model (generate too) goes on with fn(x) in place of the activation x [rows, positions, d].

    In generation with a cache, x holds the new positions only. Afterwards the model is as before: no weight is touched.
    """
    with _hooked(find(model, hook), fn):
        yield


def _run(model: nn.Module, input_ids: Tensor) -> None:
    with suppress(_Stop):
        model(input_ids=input_ids, use_cache=False)


@contextmanager
def _hooked(place: Place, fn: Transform) -> Iterator[None]:
    if place.side == "input":
        handle = place.module.register_forward_pre_hook(lambda _, args, kwargs: _replace_input(args, kwargs, fn), with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(lambda _, args, output: _replace_output(output, fn))
    try:
        yield
    finally:
        handle.remove()


def _replace_input(args: tuple[Any, ...], kwargs: dict[str, Any], fn: Transform) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (fn(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": fn(kwargs["hidden_states"])}


def _replace_output(output: Any, fn: Transform) -> Any:
    return (fn(output[0]), *output[1:]) if isinstance(output, tuple) else fn(output)


def _child(block: nn.Module, what: Literal["attention", "mlp"]) -> nn.Module | None:
    """The block's attention or MLP: by class name first, by attribute name where the class has a name of its own."""
    words = {"attention": ("attention", "attn"), "mlp": ("mlp", "feedforward", "ffn", "moe")}[what]
    no_part = ("norm", "dropout", "cross")
    children = [(name.lower(), type(m).__name__.lower(), m) for name, m in block.named_children()]
    children = [(name, kind, m) for name, kind, m in children if not any(word in name + kind for word in no_part)]
    for by_class in (True, False):
        for name, kind, module in children:
            if any(word in (kind if by_class else name) for word in words):
                return module
    return None


def _added(model: nn.Module, block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs the block adds to the residual stream: (attention's, MLP's)."""
    parts = {what: _child(block, what) for what in ("attention", "mlp")}
    if any(part is None for part in parts.values()):
        raise UserError(
            f"A block of {type(model).__name__} ({type(block).__name__}) has no attention or no MLP submodule, so attn_out and mlp_out do "
            "not exist there. Use site resid_pre or resid_post."
        )
    calls: list[tuple[nn.Module, Tensor | None, Tensor]] = []
    ends: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        taken = args[0] if args else kwargs.get("hidden_states")
        calls.append((module, taken, output[0] if isinstance(output, tuple) else output))

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ends.extend([args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output])
        raise _Stop

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in block.children()]
    handles.append(block.register_forward_hook(end, with_kwargs=True))
    try:
        with torch.no_grad():
            _run(model, torch.arange(3, device=next(model.parameters()).device)[None])
    finally:
        for handle in handles:
            handle.remove()

    found, added = [], []
    for part in parts.values():
        module, value = next((m, out) for m, _, out in calls if m is part)
        for follower, taken, output in calls:
            if taken is not value or follower is module or follower in parts.values():
                continue
            value = output
            if not isinstance(follower, nn.Dropout):  # nothing in eval mode, and often one module for both parts
                module = follower
        found.append(module)
        added.append(value.float())
    is_once = all(sum(m is module for m, _, _ in calls) == 1 for module in found)
    x, y = (t.float() for t in ends)
    whole = x + added[0] + added[1]
    tolerance = 2e-2 if ends[0].dtype != torch.float32 else 1e-4
    if not is_once or not torch.allclose(whole, y, rtol=tolerance, atol=tolerance * float(y.abs().max())):
        raise UserError(
            f"A block of {type(model).__name__} ({type(block).__name__}) does not compute input + attention + MLP (a residual multiplier, "
            "or a structure of its own), "
            "so attn_out and mlp_out cannot be told there. Use site resid_pre or resid_post."
        )
    return found[0], found[1]
