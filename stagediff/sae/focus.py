"""Tokens that are explained badly count for more in a step: `Budget.focus`.

A loss that is a mean over tokens learns what is frequent. New directions that live on a hundredth of the tokens get a hundredth of its gradient,
and the latents that they would need never turn to them. With a focus each token's part of the loss is weighted by its squared error to a power,
as in focal loss (Lin et al. 2017, arXiv 1708.02002) and in importance sampling by loss (Katharopoulos & Fleuret 2018, arXiv 1803.00942), here without
undoing the weights: the weighted loss is what is meant. It needs no labels: what was added to the data is what an inherited dictionary explains worst.
Weights are constants of a step (no gradient goes through them) and 1 on average over its batch, so rates and penalties keep their meaning.
"""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from stagediff.sae.parallel import Team

__all__ = ["MOST", "weights"]

MOST = 16.0
"""Times the batch's median error that count at most: a few tokens of massive norm must not be all of a step."""
TINY = 1e-6
"""Errors below this, and shares of the median, are none; where all errors are, all tokens count alike."""


def weights(squares: Tensor, power: float, team: "Team") -> Tensor:
    """[n] weight of each token of this rank's slice from its squared error, [n]; 1 on average over the whole batch."""
    batch = team.everyones(squares)
    median = batch.median().clamp_min(TINY)

    def share(of: Tensor) -> Tensor:
        return (of / median).clamp(TINY, MOST) ** power

    return share(squares) / share(batch).mean()
