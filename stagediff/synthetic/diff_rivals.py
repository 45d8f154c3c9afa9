"""Crosscoders and the difference SAE on planted truth: which of their latents stand for a target feature, and the scores that rank them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from stagediff.diff.decoders import unit_rows
from stagediff.evidence.rivals.spec import LatentsSpec
from stagediff.sae.dictionary import SAE
from stagediff.synthetic.diff_score import Ranking, represented, truth
from stagediff.synthetic.diff_world import PlantedDiff

if TYPE_CHECKING:
    from stagediff.steps import Job
    from stagediff.store import Artifact

__all__ = ["RIVAL_SCORES", "Rival", "rival"]

_CROSSCODER = {
    "norm": "relative norm",
    "nu_reconstruction": "ν of reconstructions",
    "nu_error": "ν of errors",
    "norm_new": "norm difference × mass on new rows",
}
RIVAL_SCORES: dict[str, dict[str, str]] = {
    "crosscoder-l1": {f"l1_{name}": f"crosscoder L1, {said}" for name, said in _CROSSCODER.items()},
    "crosscoder-batchtopk": {f"batchtopk_{name}": f"crosscoder BatchTopK, {said}" for name, said in _CROSSCODER.items()},
    "difference-sae": {"strength": "difference SAE, strength", "energy": "difference SAE, energy"},
}
"""Method -> its scores -> what each is. The one by mass on new rows needs to know which rows are new."""


@dataclass(frozen=True)
class Rival:
    """A rival's latents."""

    stands_for: np.ndarray
    """[F] the target that each represents, -1: none."""
    alive: np.ndarray
    rankings: dict[str, Ranking]
    """Of the alive ones, by the names of `RIVAL_SCORES`."""


def rival(method: str, latents: "Artifact", planted: PlantedDiff, represents: float, job: "Job") -> Rival:
    """Reads what the step rival-latents wrote. A crosscoder's latent is judged by its direction in the finetuned model, the difference SAE's by what
    the finetuned model writes beyond the base model.
    """
    spec = latents.spec()
    assert isinstance(spec, LatentsSpec)
    table = latents.read_table("latents.parquet")
    rows = SAE.load(job.artifact(spec.dictionary)).W_dec.double()
    if method == "difference-sae":
        stands_for = represented(_unit(rows), *truth(planted, of_difference=True), represents)
        low = {"strength": table.strength_low, "energy": table.energy_low}
    else:
        stands_for = represented(_unit(rows[:, planted.world.d :]), *truth(planted), represents)
        gain = (table.norm_finetuned - table.norm_base) / np.maximum(table.norm_finetuned, table.norm_base)
        low = {
            "norm": table.relative_base_norm,
            "nu_reconstruction": table.nu_reconstruction,
            "nu_error": table.nu_error,
            "norm_new": -gain * table.new_mass,
        }
    alive = table.alive.to_numpy(bool)
    index = np.flatnonzero(alive)
    rankings = {
        name: Ranking(-value.to_numpy(float)[index], stands_for[None, index], index)
        for name, value in zip(RIVAL_SCORES[method], low.values(), strict=True)
    }
    return Rival(stands_for, alive, rankings)


def _unit(rows: Tensor) -> np.ndarray:
    return unit_rows(rows).nan_to_num(0.0).numpy()
