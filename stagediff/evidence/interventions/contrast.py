"""What the trigger switches on: how much more of each feature there is in a triggered prompt and its answer than without the trigger.

Development prompts only. Per feature the mean activation over all positions of prompt and answer that the dictionary was trained on, times its
decoder norm: with the trigger less without it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor

from stagediff.evidence.interventions.answers import answers
from stagediff.evidence.interventions.hooks import ENCODED_BYTES, Touched
from stagediff.evidence.interventions.setting import Setting
from stagediff.lm import hooks

__all__ = ["trigger_contrast"]


def trigger_contrast(setting: Setting, batch: int) -> np.ndarray:
    """[F] float64, in the dictionary's scaled units; large: there with the trigger and not without."""
    dev = setting.prompts.split("dev")
    with_, without = (_mean_activation(setting, asked[dev], batch) for asked in (setting.prompts.triggered, setting.prompts.without))
    return ((with_ - without) * setting.sae.decoder_norms().cpu().double()).numpy()


def _mean_activation(setting: Setting, prompts: list[list[int]], batch: int) -> Tensor:
    """[F] float64 over the prompts and all of their answers but the last token, which no forward pass reads."""
    total, count = torch.zeros(setting.sae.features, dtype=torch.float64), 0
    block = max(1, ENCODED_BYTES // (4 * setting.sae.features))

    @contextmanager
    def watch(padding: Tensor) -> Iterator[None]:
        touched = Touched(padding, setting.skip)

        def look(x: Tensor) -> Tensor:
            nonlocal count
            kept = x[touched.of(x)].float()  # [positions, d]
            for part in kept.split(block):
                total.add_(setting.sae.encode(part).sum(0, dtype=torch.float64).cpu())
            count += len(kept)
            return x

        with hooks.intervene(setting.loaded.model, setting.reader.hook, look):
            yield

    def edit(rows: list[int], padding: Tensor) -> AbstractContextManager[None]:
        return watch(padding)

    answers(setting.loaded.model, prompts, setting.prompts.length, batch, edit)
    return total / max(1, count)
