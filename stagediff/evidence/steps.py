"""Registers the evidence steps and the settings that add them to a run, in the order in which the report shows them."""

from stagediff.evidence.interventions.spec import AblateSpec, SteerSpec
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.steps import Extension, Resources, Step, register, register_command, register_extension

_LABELS = "stagediff.evidence.labels"
_INTERVENTIONS = "stagediff.evidence.interventions"


def _extend(name: str, config: str, plan: str) -> None:
    for kind in ("stagewise", "both"):
        register_extension(Extension(kind, name, config, plan))


# Labels: what a labeller says of the found features, blind, against random ones.
register(
    Step(
        "labels",
        LabelsSpec,
        f"{_LABELS}.compute:compute",
        section=f"{_LABELS}.section:section",
        estimate=f"{_LABELS}.cost:estimate",
        check=f"{_LABELS}.compute:check",
    )
)
_extend("labels", f"{_LABELS}.config:LabelsConfig", f"{_LABELS}.config:add_labels")

# Interventions: steering and ablation.
register(
    Step(
        "steer",
        SteerSpec,
        f"{_INTERVENTIONS}.steering:compute",
        resources=Resources(gpus=1),
        section=f"{_INTERVENTIONS}.section:section",
        estimate=f"{_INTERVENTIONS}.estimate:steer",
    )
)
register(
    Step(
        "ablate",
        AblateSpec,
        f"{_INTERVENTIONS}.ablation:compute",
        resources=Resources(gpus=1),
        section=f"{_INTERVENTIONS}.section:section",
        estimate=f"{_INTERVENTIONS}.estimate:ablate",
    )
)
_extend("steering", f"{_INTERVENTIONS}.config:SteeringConfig", f"{_INTERVENTIONS}.config:plan_steering")
_extend("ablation", f"{_INTERVENTIONS}.config:AblationConfig", f"{_INTERVENTIONS}.config:plan_ablation")
register_command("steer", f"{_INTERVENTIONS}.command:command")
register_command("interventions", f"{_INTERVENTIONS}.seeds:command")
