"""What both steps begin with: the finetuned model, the dictionary, prompts, and clean rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stagediff.errors import UserError
from stagediff.evidence.interventions.answers import Prompts, draw_prompts
from stagediff.evidence.interventions.spec import Intervention
from stagediff.lm import hooks
from stagediff.lm.activations import ActivationReader
from stagediff.lm.models import LoadedModel, load_model
from stagediff.sae.dictionary import SAE

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["Setting", "clean_rows", "residual_norm"]


@dataclass(frozen=True)
class Setting:
    """Loaded once per step."""

    loaded: LoadedModel
    sae: SAE
    reader: ActivationReader
    prompts: Prompts

    @staticmethod
    def of(spec: Intervention, job: "Job") -> "Setting":
        """Raises UserError where dictionary and model are of different widths, or there are too few prompts."""
        reader = ActivationReader(job.store, spec.data)
        loaded = load_model(spec.model, job.store, precision=spec.precision, device=job.device)
        sae = SAE.load(job.artifact(spec.dictionary)).to(job.device)
        if sae.d != reader.d:
            raise UserError(
                f"The dictionary {spec.dictionary} has {sae.d} inputs, the activations at its hook point have {reader.d} numbers: they do not belong together."
            )
        prompts = draw_prompts(spec.behaviour, loaded.tokenizer, spec.dev_prompts, spec.test_prompts, reader.context, spec.seed)
        return Setting(loaded, sae, reader, prompts)

    @property
    def skip(self) -> tuple[int, ...]:
        """Positions that the dictionary was never trained on."""
        return self.reader.spec.skip_positions


def clean_rows(reader: ActivationReader, count: int) -> np.ndarray:
    """The first so many held-out base rows. Raises UserError where there are fewer."""
    every = np.arange(reader.data.rows, dtype=np.int64)
    base = every[~reader.is_new(every)]
    if len(base) < count:
        raise UserError(
            f"{count} held-out base rows were asked for, there are {len(base)}. Ask for fewer (rows), or raise statistics.tokens."
        )
    return base[:count]


@torch.no_grad()
def residual_norm(loaded: LoadedModel, reader: ActivationReader, rows: np.ndarray, batch: int = 16) -> float:
    """Mean norm of the activations at the hook point over the rows' kept positions, raw units."""
    kept = torch.from_numpy(reader.positions.astype(np.int64))
    norms = []
    for start in range(0, len(rows), batch):
        ids = torch.from_numpy(reader.token_ids(rows[start : start + batch]).astype(np.int64)).to(loaded.device)
        x = hooks.read(loaded.model, reader.hook, ids)
        norms.append(x[:, kept.to(x.device)].double().norm(dim=-1).cpu())
    return float(torch.cat(norms).mean())
