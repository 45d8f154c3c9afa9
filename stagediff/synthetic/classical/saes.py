"""SAEs beside the classical learners: the same `fit`, by the trainer of every other dictionary here, on data in memory or in a store."""

from collections.abc import Mapping

import torch

from stagediff.errors import UserError
from stagediff.sae.batches import Activations, Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.initial import fresh, measure
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer
from stagediff.spec import Value
from stagediff.synthetic.classical.dictionary import InMemory, Learner

__all__ = ["SAETraining", "warm_up"]


class SAETraining(Value):
    """Trains an SAE, as the step `train` does, but without its checkpoints, its curve and its store."""

    dictionary: DictionaryConfig
    budget: Budget

    def fit(self, data: Activations, seed: int = 0) -> SAE:
        """The SAE, on the CPU in fp32.

        Raises UserError when the budget is under one batch, when the data are empty, all 0 or not finite, or when the weights become so.
        """
        steps = self.budget.tokens // self.budget.batch
        if not steps:
            raise UserError(
                f"The training budget is {self.budget.tokens:,} vectors, less than one batch of {self.budget.batch:,}. Give more, or a smaller batch."
            )
        scale, mean = measure(data)
        trainer = Trainer(fresh(self.dictionary, scale, mean, seed), self.budget, steps, True, torch.float32)
        for x in batches(data, Order(seed, shard_sizes(data)), self.budget.batch, 0, steps):
            trainer.train_on(x)
        if not trainer.is_finite():
            raise UserError("Weights became NaN or infinite in training. Finite ones were expected: lower the learning rate (budget.lr).")
        return trainer.dictionary()


def warm_up(learners: Mapping[str, Learner]) -> None:
    """Compiles what a first training would compile (numba's kernels), so that nobody's time holds it."""
    for learner in learners.values():
        if isinstance(learner, SAETraining):
            budget = Budget(tokens=learner.budget.batch, batch=learner.budget.batch)
            x = torch.randn(learner.budget.batch, 64, generator=torch.Generator().manual_seed(0))
            learner.model_copy(update={"budget": budget}).fit(InMemory(x))
