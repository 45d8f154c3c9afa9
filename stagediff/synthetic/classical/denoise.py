"""Denoising a photograph with sparse codes of its patches (Elad, Aharon 2006): an example in which a dictionary's worth can be seen.

Every patch of the noisy picture loses its mean, is coded, and comes back; overlapping patches are averaged. Dictionaries are learnt from the noisy
patches themselves. The classical codes end where the error is what the noise makes, so flat patches get no atoms at all; a TopK SAE spends k on
each, a BatchTopK SAE k on average.
To tell the encoder from the atoms, every dictionary is also used the other way: SAEs' atoms by pursuit, classical ones with k atoms a patch.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from stagediff.sae.batches import Activations
from stagediff.sae.dictionary import SAE
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.synthetic.classical.dictionary import AtomDictionary, InMemory, Learner, SparseDictionary, by_pursuit
from stagediff.synthetic.classical.ksvd import KSVD
from stagediff.synthetic.classical.online import OnlineLearning
from stagediff.synthetic.classical.photograph import PATCH, cosines, joined, noisy, patches, photograph, psnr
from stagediff.synthetic.classical.saes import SAETraining, warm_up
from stagediff.synthetic.classical.threads import Seconds, one_thread

if TYPE_CHECKING:
    from stagediff.progress import Progress

__all__ = ["LEARNERS", "SIGMA", "Picture", "denoise", "denoised"]

SIGMA = 25 / 255
ERROR = PATCH * PATCH * (1.15 * SIGMA) ** 2
"""Squared error of a patch at which its code is long enough (Elad, Aharon 2006: 1.15 sigma per pixel)."""
ATOMS, LONGEST, K = 256, 16, 2
"""Atoms of a dictionary; at most so many in a code to the error; in a code of fixed length."""
TRAINING_PATCHES = 16_384
CODED_AT_ONCE = 8192


class _Cosines:
    """The fixed dictionary, which learns nothing: the control."""

    def fit(self, data: Activations, seed: int = 0) -> AtomDictionary:
        return AtomDictionary(cosines(), torch.zeros(data.d), LONGEST, ERROR)


def _sae(architecture: Literal["topk", "batchtopk"], k: int) -> SAETraining:
    config = DictionaryConfig(architecture=architecture, features=ATOMS, k=k, dead_after=100_000)
    return SAETraining(dictionary=config, budget=Budget(tokens=1_048_576, batch=1024, lr=1e-3))


LEARNERS: dict[str, Learner] = {
    "cosines": _Cosines(),
    "ksvd": KSVD(features=ATOMS, k=LONGEST, error=ERROR, iterations=15),
    "online": OnlineLearning(features=ATOMS, k=LONGEST, error=ERROR, l1=0.3, epochs=2),
    "topk": _sae("topk", K),
    "batchtopk": _sae("batchtopk", 1),
}
"""Method -> its settings, chosen on the photograph `flower`."""


class Picture(NamedTuple):
    """A picture with what was made of it."""

    clean: Tensor
    """[height, width]"""
    noisy: Tensor
    best: dict[str, Tensor]
    """Method -> the picture denoised by its own encoder."""
    atoms: dict[str, Tensor]
    """Method -> [F, PATCH^2]"""


def denoise(
    name: str, seeds: Iterable[int], learners: Mapping[str, Learner] = LEARNERS, *, progress: "Progress | None" = None
) -> tuple[pd.DataFrame, Picture]:
    """Denoises a photograph, once per seed (of noise and learners). Returns a row per seed and method, and the first seed's pictures.

    Columns: method, seed, noisy, pursuit, fixed (PSNR in decibels: before; with codes to the noise's error; with K atoms per patch; for an SAE by its own
    encoder), atoms (in a code to the error, mean), seconds and processor_seconds of learning, on one thread. Raises UserError for an unknown name.
    """
    from stagediff.progress import Progress

    clean, seeds, progress = photograph(name), list(seeds), progress or Progress()
    rows, first = [], None
    with one_thread(), progress.step("denoise"), progress.task("dictionaries", len(seeds) * len(learners), "dictionaries") as task:
        warm_up(learners)
        for seed in seeds:
            picture = Picture(clean, noisy(clean, SIGMA, seed), {}, {})
            for method, learner in learners.items():
                rows.append({"method": method, "seed": seed, **_measured(method, learner, picture, seed)})
                task.advance(note=f"{method}, seed {seed}")
            first = first or picture
    assert first is not None
    return pd.DataFrame(rows), first


def denoised(image: Tensor, dictionary: SparseDictionary) -> tuple[Tensor, float]:
    """The picture [height, width] from the codes of its patches, within [0, 1], and how many atoms a patch's code has."""
    all_patches = patches(image)
    out, active = torch.empty_like(all_patches), 0
    for at in range(0, len(all_patches), CODED_AT_ONCE):
        part = all_patches[at : at + CODED_AT_ONCE]
        mean = part.mean(1, keepdim=True)
        f = dictionary.encode(part - mean)
        out[at : at + len(part)] = dictionary.decode(f) + mean
        active += int((f != 0).sum())
    return joined(out, image.shape).clamp(0, 1), active / len(all_patches)


def _measured(method: str, learner: Learner, picture: Picture, seed: int) -> dict[str, float]:
    every = patches(picture.noisy)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:TRAINING_PATCHES]
    training = every[chosen] - every[chosen].mean(1, keepdim=True)
    with Seconds() as taken:
        dictionary = learner.fit(InMemory(training), seed)
    fixed, _ = denoised(picture.noisy, dictionary if isinstance(dictionary, SAE) else by_pursuit(dictionary, K))
    pursued, atoms = denoised(picture.noisy, by_pursuit(dictionary, LONGEST, ERROR))
    picture.best[method] = fixed if isinstance(dictionary, SAE) else pursued
    picture.atoms[method] = dictionary.directions()
    figures = {"noisy": picture.noisy, "pursuit": pursued, "fixed": fixed}
    figures_db = {name: psnr(image, picture.clean) for name, image in figures.items()}
    return {**figures_db, "atoms": atoms, "seconds": taken.wall, "processor_seconds": taken.processor}
