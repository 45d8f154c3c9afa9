"""Online dictionary learning (Mairal, Bach, Ponce, Sapiro 2010): scikit-learn's MiniBatchDictionaryLearning, fed batch by batch.

Each batch is coded by the lasso; sums of codes and of their products with the data, over all batches so far, are all that the atoms' update needs, so the
data are read once through and never held. What is learnt is then coded by the same pursuit as K-SVD's dictionary, so that the two differ in their
atoms alone.
"""

import warnings

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.batches import Activations, Order, batches, shard_sizes
from stagediff.spec import Value
from stagediff.synthetic.classical.dictionary import AtomDictionary, mean, oriented, random_atoms, unit
from stagediff.synthetic.classical.pursuit import batch_omp, check_k

__all__ = ["OnlineLearning"]

ORIENTED_ON = 8192
"""Vectors whose codes tell the atoms' signs."""


class OnlineLearning(Value):
    """Learns a dictionary online; its codes are by pursuit."""

    features: PositiveInt
    k: PositiveInt
    """Atoms per vector of its codes, at most."""
    error: float = Field(0.0, ge=0)
    """Squared error per vector at which a code is long enough."""
    l1: float = Field(0.1, gt=0)
    """The lasso's weight: 1/2 ||x - f D||^2 + l1 ||f||_1, with the data as they are. (No counterpart of k: it only serves the learning.)"""
    batch: PositiveInt = 256
    epochs: float = Field(2.0, gt=0)
    """How often the data are read."""
    centre: bool = False
    """Whether the data's mean is taken off first."""

    def fit(self, data: Activations, seed: int = 0) -> AtomDictionary:
        """The dictionary, fp32.

        Raises UserError when k cannot be, when there is not one batch of vectors, fewer vectors than atoms, or when they are not finite.
        """
        from sklearn.decomposition import MiniBatchDictionaryLearning
        from sklearn.exceptions import ConvergenceWarning

        check_k(self.k, data.d, self.features)
        steps = int(self.epochs * data.n_tokens) // self.batch
        if not steps:
            raise UserError(
                f"Online learning has {int(self.epochs * data.n_tokens):,} vectors to read, less than one batch of {self.batch:,}. "
                "Give more vectors or epochs, or a smaller batch."
            )
        offset = mean(data) if self.centre else torch.zeros(data.d)
        order = Order(seed, shard_sizes(data))
        first = _first(data, max(self.features, ORIENTED_ON), order) - offset
        learner = MiniBatchDictionaryLearning(
            n_components=self.features,
            alpha=self.l1,
            fit_algorithm="cd",
            dict_init=random_atoms(first, self.features, seed).double().numpy(),
            random_state=seed % (1 << 32),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a batch's codes that are short of 1e-8
            for x in batches(data, order, self.batch, 0, steps):
                learner.partial_fit((x.double() - offset).numpy())  # the lasso's tolerance is beyond fp32, where it would not end
        atoms = unit(torch.from_numpy(learner.components_).float())
        return AtomDictionary(oriented(atoms, batch_omp(first, atoms, self.k)), offset, self.k, self.error)


def _first(data: Activations, n: int, order: Order) -> Tensor:
    """The first n vectors (or all) of the order in which they are read, [n, d]."""
    n = min(n, data.n_tokens)
    return next(batches(data, order, n, 0, 1)).float()
