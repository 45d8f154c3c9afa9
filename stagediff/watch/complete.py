"""Whether a checkpoint is one: a whole model that nobody is writing to any more.

Whole: config.json can be read, and every safetensors file is as long as its own header says, all shards of an index included. That proves the
weights, but not that the tokenizer, which is saved after them, is there already. So besides it has to be known that nothing more comes: the
Trainer has written its state, which it does last; or the training announced the checkpoint; or it is a hub commit; or nothing has changed for
the quiet time. Weights that can't prove themselves (pytorch_model.bin) count in the same cases.

What is no whole model after the quiet time is refused, with the reason. It is looked at again each time: a slow copy counts once it is whole.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from stagediff.lm.sources import WEIGHTS
from stagediff.store.objects import Entry
from stagediff.watch.places import Files

__all__ = ["State", "Verdict", "judge"]

TRAINER_STATE = "trainer_state.json"
LONGEST_HEADER = 100 << 20
"""Bytes; safetensors allows no longer one."""


class State(StrEnum):
    COMPLETE = "complete"
    SETTLING = "settling"
    """Still being written, as far as can be told."""
    REFUSED = "refused"


class Verdict(NamedTuple):
    state: State
    why: str = ""


def judge(files: Files, *, quiet: float, now: float, announced: bool = False, adapters: bool = False) -> Verdict:
    """What a checkpoint's folder is worth at the time `now` (seconds since the epoch).

    `announced`: the training has said that it is saved. `adapters`: a PEFT adapter is a checkpoint too.
    """
    entries = files.entries()
    if not entries:
        return Verdict(State.SETTLING, "it holds no files yet")
    fault = _fault(files, entries, adapters)
    age = now - max(entry.modified for entry in entries.values())
    is_still = files.is_fixed or age >= quiet
    if fault is None and (is_still or announced or (files.is_local and _trainer_is_done(files))):
        return Verdict(State.COMPLETE)
    if fault is not None and is_still:
        return Verdict(State.REFUSED, fault)
    return Verdict(State.SETTLING, fault or f"whole, but changed {max(0, age):.0f} s ago: counts after {quiet:g} s without a change")


def _fault(files: Files, entries: Mapping[str, Entry], adapters: bool) -> str | None:
    """Why this is no whole model; None where it is one."""
    if "config.json" not in entries:
        if "adapter_config.json" not in entries:
            return (
                "it holds no config.json, so it is no Hugging Face model: save it with save_pretrained, or consolidate a sharded checkpoint"
            )
        if not adapters:
            return "it is a PEFT adapter, not a model: merge it into its base, or watch it in a stagewise run"
        return _adapter_fault(files, entries)
    if _json(files, "config.json") is None:
        return "its config.json cannot be read (yet)"
    weights = next((name for name in WEIGHTS if name in entries), None)
    if weights is None:
        return f"it has a config.json but no weights ({', '.join(WEIGHTS)}): save the model there with save_pretrained"
    if not weights.endswith("index.json"):
        return _cut_off(files, entries, weights)
    index = _json(files, weights)
    shards = set(index["weight_map"].values()) if index and isinstance(index.get("weight_map"), dict) else set()
    if not shards:
        return f"its {weights} cannot be read (yet)"
    if missing := sorted(shards - set(entries)):
        return f"{len(missing)} of its {len(shards)} weight files are missing ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
    return next((fault for name in sorted(shards) if (fault := _cut_off(files, entries, name))), None)


def _adapter_fault(files: Files, entries: Mapping[str, Entry]) -> str | None:
    weights = next((name for name in ("adapter_model.safetensors", "adapter_model.bin") if name in entries), None)
    return "it has an adapter_config.json but no adapter_model.safetensors" if weights is None else _cut_off(files, entries, weights)


def _cut_off(files: Files, entries: Mapping[str, Entry], name: str) -> str | None:
    """Whether a safetensors file is not what its header says."""
    size = entries[name].size
    if files.is_checked or not name.endswith(".safetensors"):
        return None if size else f"{name} is empty"
    length = int.from_bytes(files.read(name, 0, 8), "little")
    if not 0 < length <= min(size - 8, LONGEST_HEADER):
        return f"{name} is cut off, or no safetensors file: {size:,} bytes are less than its header needs"
    try:
        header = json.loads(files.read(name, 8, 8 + length))
        expected = 8 + length + max((tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"{name} has no readable safetensors header"
    return None if size == expected else f"{name} has {size:,} bytes, but its header tells of {expected:,}: it is cut off or being written"


def _trainer_is_done(files: Files) -> bool:
    return isinstance(_json(files, TRAINER_STATE), dict)


def _json(files: Files, name: str) -> dict | None:
    try:
        found = json.loads(files.whole(name))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
