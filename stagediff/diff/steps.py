"""Registers the diff, null and align steps and the `stagewise` kind of run."""

from stagediff.diff import spec
from stagediff.steps import RunKind, Step, register, register_command, register_kind

register(
    Step(
        "diff",
        spec.DiffSpec,
        "stagediff.diff.rotations:compute",
        section="stagediff.diff.section:section",
        estimate="stagediff.diff.estimate:diff",
    )
)
register(
    Step(
        "align",
        spec.AlignSpec,
        "stagediff.diff.aligned:compute",
        section="stagediff.diff.section.aligned:section",
        estimate="stagediff.diff.estimate:align",
    )
)
register(
    Step(
        "null",
        spec.NullSpec,
        "stagediff.diff.null:compute",
        section="stagediff.diff.section.null:section",
        estimate="stagediff.diff.estimate:null",
    )
)
register_kind(RunKind("stagewise", "stagediff.diff.config:StagewiseConfig", "stagediff.diff.stages:plan"))
register_command("findings", "stagediff.diff.findings:command")
