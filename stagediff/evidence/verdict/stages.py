"""Adds the verdict to a run's plan, and its estimate."""

from typing import TYPE_CHECKING, Any

from stagediff.config import RunConfig
from stagediff.diff.spec import DiffSpec
from stagediff.estimate import Estimate
from stagediff.evidence.verdict.spec import VerdictConfig, VerdictSpec
from stagediff.lm.estimate import spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["NODES", "estimate", "plan"]

NODES = {"align": "align", "null": "retrain-null", "labels": "labels", "steer": "steer", "ablate": "ablate"}
"""The spec's field -> the node of the plan that it names."""


def plan(config: RunConfig, settings: dict[str, Any], into: Plan, store: "Store") -> None:
    """Names what the plan has: so this extension comes after those whose steps it reads."""
    given = VerdictConfig.model_validate(settings)
    diff = into["diff"].spec
    assert isinstance(diff, DiffSpec)
    parts = {field: into[node].ref for field, node in NODES.items() if node in into}
    into.add("verdict", VerdictSpec(diff=diff.ref, statistics=diff.statistics, **parts, level=given.level, chance=given.chance))


def estimate(spec: VerdictSpec, plan: Plan) -> Estimate:
    """Tables with a row per feature are read once; the result has a row per selected feature."""
    features = features_of(spec_of(spec.diff, plan).dictionaries["S"], plan)
    return Estimate(bytes=64 * 1024, seconds=1 + 2e-6 * features)
