"""What several ranks can train together: known from the spec, so that it is refused before any step of a run computes. Light: no torch."""

from typing import TYPE_CHECKING

from stagediff.errors import UserError
from stagediff.sae.estimate import dictionary_of
from stagediff.sae.spec import FinetuneSpec, TrainSpec

if TYPE_CHECKING:
    from stagediff.plan import Plan

__all__ = ["check", "check_planned"]


def check_planned(spec: TrainSpec | FinetuneSpec, plan: "Plan", ranks: int, shard: str) -> None:
    """As `check`, for a step of a plan; a dictionary that is taken in from elsewhere is looked at when it is there."""
    found = dictionary_of(spec, plan)
    if found is not None:
        check(spec, found.architecture, found.features, ranks, shard)


def check(spec: TrainSpec | FinetuneSpec, architecture: str, features: int, ranks: int, shard: str) -> None:
    """Raises UserError where `ranks` processes cannot share out what `shard` names of this training: every batch, or features."""
    if ranks == 1:
        return
    if shard == "features":
        _check_features(architecture, features, spec.budget.batch, ranks)
        _check_whole(spec, ranks)
    else:
        _check_batch(architecture, spec.budget.batch, ranks)


def _check_batch(architecture: str, batch: int, ranks: int) -> None:
    if architecture == "batchtopk":
        raise UserError(
            "batchtopk chooses its active features over the whole batch, which several ranks do not see. Train it on one GPU "
            "(resources: gpus: 1), split its features over them (resources: shard: features), or take topk."
        )
    if batch % ranks:
        raise UserError(f"The batch of {batch:,} tokens cannot be shared out evenly to {ranks} ranks. Choose a multiple of {ranks}.")


def _check_features(architecture: str, features: int, batch: int, ranks: int) -> None:
    if features % ranks:
        raise UserError(
            f"{features:,} features cannot be shared out evenly to {ranks} ranks (resources: shard: features). Choose a multiple of "
            f"{ranks} features, or another number of GPUs."
        )
    if architecture == "batchtopk" and batch * features > 1 << 32:
        raise UserError(
            f"batchtopk over {ranks} ranks compares {batch:,} x {features:,} activations, more than 2^32. Choose a smaller batch."
        )


def _check_whole(spec: TrainSpec | FinetuneSpec, ranks: int) -> None:
    """What needs the whole dictionary at once."""
    if not isinstance(spec, FinetuneSpec):
        return
    asked = {
        "revive: resample": spec.revive == "resample",
        "optimiser: carried": spec.optimiser == "carried",
        "paired": spec.paired is not None,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise UserError(
                f"This finetune asks for `{name}`, which needs the whole dictionary on one device, but its features are split over "
                f"{ranks} ranks (resources: shard: features). Leave it out, or share out batches (shard: batch)."
            )
