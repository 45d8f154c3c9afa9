"""Registers the evidence steps and the settings that add them to a run."""

from stagediff.evidence.interventions.spec import AblateSpec, SteerSpec
from stagediff.steps import Extension, Resources, Step, register, register_command, register_extension

# Interventions: steering and ablation
_INTERVENTIONS = "stagediff.evidence.interventions"
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
for _kind in ("stagewise", "both"):
    register_extension(Extension(_kind, "steering", f"{_INTERVENTIONS}.config:SteeringConfig", f"{_INTERVENTIONS}.config:plan_steering"))
    register_extension(Extension(_kind, "ablation", f"{_INTERVENTIONS}.config:AblationConfig", f"{_INTERVENTIONS}.config:plan_ablation"))
register_command("steer", f"{_INTERVENTIONS}.command:command")
register_command("interventions", f"{_INTERVENTIONS}.seeds:command")
