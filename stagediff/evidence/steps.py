"""Registers the evidence steps and the settings that add them to a run."""

from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.steps import Extension, Step, register, register_extension

# Labels: what a labeller says of the found features, blind, against random ones.
register(
    Step(
        "labels",
        LabelsSpec,
        "stagediff.evidence.labels.compute:compute",
        section="stagediff.evidence.labels.section:section",
        estimate="stagediff.evidence.labels.cost:estimate",
        check="stagediff.evidence.labels.compute:check",
    )
)
for kind in ("stagewise", "both"):
    register_extension(
        Extension(kind, "labels", "stagediff.evidence.labels.config:LabelsConfig", "stagediff.evidence.labels.config:add_labels")
    )
