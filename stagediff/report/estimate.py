"""Size of a report for `stagediff plan` (docs/results.md, "What the analysis costs")."""

from stagediff.estimate import Estimate
from stagediff.plan import Plan
from stagediff.report.spec import ReportSpec
from stagediff.sae.estimate import features_of
from stagediff.sae.spec import StatisticsSpec

__all__ = ["report"]

LARGEST = 40_000_000
"""Bytes: what the page shows of features and checkpoints is capped, so that it opens; what it reads is not."""


def report(spec: ReportSpec, plan: Plan) -> Estimate:
    """By the number of dictionaries with statistics and their features."""
    cells = sum(features_of(node.spec.dictionary, plan) for node in plan if isinstance(node.spec, StatisticsSpec))
    return Estimate(bytes=min(LARGEST, 2_000_000 + 330 * cells), seconds=8.0 + 5e-5 * cells)
