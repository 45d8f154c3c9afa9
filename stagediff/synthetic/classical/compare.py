"""SAEs, K-SVD and online dictionary learning on the same planted activations: which atoms each finds, how well it reconstructs, what it costs.

The activations are those of the base model on base data in a world of the stage-wise diff (`stagediff.synthetic.diff_world`, rung `small`): 230 features in
64 dimensions, 4 of which fire per vector, with Zipf's frequencies, positive amplitudes and noise. Everyone gets the same vectors, 256 atoms and L0 4.
Beside them stand two that learn nothing: the planted directions themselves, and vectors of the data drawn at random.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.sae.batches import Activations
from stagediff.sae.metrics import Meter
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.synthetic.classical.dictionary import AtomDictionary, InMemory, Learner, SparseDictionary, by_pursuit, random_atoms
from stagediff.synthetic.classical.ksvd import KSVD
from stagediff.synthetic.classical.online import OnlineLearning
from stagediff.synthetic.classical.saes import SAETraining, warm_up
from stagediff.synthetic.classical.threads import Seconds, one_thread
from stagediff.synthetic.diff_rungs import diff_world
from stagediff.synthetic.diff_spec import DiffWorld
from stagediff.synthetic.diff_world import PlantedDiff

if TYPE_CHECKING:
    from stagediff.progress import Progress

__all__ = ["ATOMS", "LEARNERS", "RECOVERED", "K", "Planted", "compare", "planted", "recovery", "sae_learner"]

RECOVERED = 0.9
"""Cosine from which a planted direction counts as found."""
ATOMS, K = 256, 4
TRAINING_BLOCKS, HELDOUT_BLOCKS = 8, 2
"""Of 256 rows of 16 vectors each."""
EVALUATED_AT_ONCE = 4096


def sae_learner(architecture: str, lr: float, l1: float = 0.0) -> SAETraining:
    """An SAE of ATOMS latents on 2,097,152 vectors; K and l1 count for the architectures that have them."""
    config = {"architecture": architecture, "features": ATOMS, "k": K, "l1": l1, "dead_after": 100_000}
    return SAETraining(dictionary=DictionaryConfig.model_validate(config), budget=Budget(tokens=2_097_152, batch=1024, lr=lr))


LEARNERS: dict[str, Learner] = {
    "topk": sae_learner("topk", lr=1e-2),
    "relu": sae_learner("relu", lr=5e-3, l1=5.0),
    "ksvd": KSVD(features=ATOMS, k=K, iterations=20),
    "ksvd-no-twins": KSVD(features=ATOMS, k=K, iterations=20, coherence=0.9),
    "online": OnlineLearning(features=ATOMS, k=K, l1=0.25, epochs=1),
}
"""Method -> its settings, chosen on the seed 100 for five to eight processor seconds each; ReLU's l1 so that its L0 is near K."""


class Planted(NamedTuple):
    """A world's activations."""

    training: Tensor
    """[n, d]"""
    heldout: Tensor
    """[m, d]"""
    truth: Tensor
    """[G, d] unit directions of the features that fire."""


@dataclass(frozen=True)
class _Given:
    """Learns nothing."""

    atoms: Tensor

    def fit(self, data: Activations, seed: int = 0) -> AtomDictionary:
        return AtomDictionary(self.atoms, torch.zeros(data.d), K)


def planted(world: DiffWorld, training: int = TRAINING_BLOCKS, heldout: int = HELDOUT_BLOCKS) -> Planted:
    """So many blocks of the base model's activations on base data."""
    whole = PlantedDiff(world)

    def vectors(split: str, blocks: int) -> Tensor:
        parts = [whole.activations(whole.topics("base", split, b), "base", split, b, "base") for b in range(blocks)]
        return torch.from_numpy(np.concatenate(parts))

    truth = whole.directions["base", "base"][: world.base_features]
    return Planted(vectors("train", training), vectors("heldout", heldout), torch.from_numpy(truth).float())


def recovery(atoms: Tensor, truth: Tensor) -> tuple[float, float]:
    """Share of planted directions [G, d] with a cosine above RECOVERED to some atom [F, d], and the mean of each one's largest cosine (MMCS)."""
    nearest = (truth @ atoms.t()).max(1).values
    return float((nearest > RECOVERED).float().mean()), float(nearest.mean())


def compare(seeds: Iterable[int], learners: Mapping[str, Learner] = LEARNERS, *, progress: "Progress | None" = None) -> pd.DataFrame:
    """A row per seed (world and learners) and method.

    Columns: method, seed, recovered and mmcs (see `recovery`), l0 and fvu of its own encoder on held-out vectors, fvu_pursuit of its atoms with codes by
    pursuit at L0 K, seconds and processor_seconds of learning, on one thread.
    """
    from stagediff.progress import Progress

    seeds, progress = list(seeds), progress or Progress()
    rows = []
    with one_thread(), progress.step("classical"), progress.task("dictionaries", len(seeds) * (len(learners) + 2), "dictionaries") as task:
        warm_up(learners)
        for seed in seeds:
            world = planted(diff_world("small", seed))
            controls = {"planted": _Given(world.truth), "random": _Given(random_atoms(world.training, ATOMS, seed))}
            for name, learner in {**controls, **learners}.items():
                rows.append({"method": name, "seed": seed, **_measured(learner, world, seed)})
                task.advance(note=f"{name}, seed {seed}")
    return pd.DataFrame(rows)


def _measured(learner: Learner, world: Planted, seed: int) -> dict[str, float]:
    with Seconds() as taken:
        dictionary = learner.fit(InMemory(world.training), seed)
    recovered, mmcs = recovery(dictionary.directions(), world.truth)
    fvu, l0 = _error(dictionary, world.heldout)
    pursued, _ = _error(by_pursuit(dictionary, K), world.heldout)
    times = {"seconds": taken.wall, "processor_seconds": taken.processor}
    return {"recovered": recovered, "mmcs": mmcs, "l0": l0, "fvu": fvu, "fvu_pursuit": pursued, **times}


def _error(dictionary: SparseDictionary, x: Tensor) -> tuple[float, float]:
    """FVU and L0 on x [n, d]."""
    meter = Meter(dictionary.features, dictionary.d)
    for part in x.split(EVALUATED_AT_ONCE):
        f = dictionary.encode(part)
        meter.add(part, dictionary.decode(f), f.abs())  # pursuit's coefficients have either sign
    quality = meter.result()
    return 1 - quality.explained_variance, quality.l0
