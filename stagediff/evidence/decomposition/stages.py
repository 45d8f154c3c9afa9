"""Adds the decomposition to a run's plan, and its estimate."""

from typing import TYPE_CHECKING, Any

from stagediff.config import RunConfig
from stagediff.estimate import Estimate
from stagediff.evidence.decomposition.spec import DecompositionConfig, DecompositionSpec
from stagediff.lm.estimate import spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["estimate", "plan"]


def plan(config: RunConfig, settings: dict[str, Any], into: Plan, store: "Store") -> None:
    given = DecompositionConfig.model_validate(settings)
    into.add("decomposition", DecompositionSpec(diff=into["diff"].ref, draws=given.draws, seed=config.seed))


def estimate(spec: DecompositionSpec, plan: Plan) -> Estimate:
    """Twenty-four bootstraps over all features: two multinomial draws of at most F counts each."""
    features = features_of(spec_of(spec.diff, plan).dictionaries["S"], plan)
    return Estimate(bytes=4096, seconds=0.3 + 24 * spec.draws * 6e-8 * features)
