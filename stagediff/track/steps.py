"""Registers the steps of SAE-Track and the `track` kind of run."""

from stagediff.steps import RunKind, Step, register, register_command, register_kind
from stagediff.track import spec

register(Step("kinds", spec.KindsSpec, "stagediff.track.kinds:compute", estimate="stagediff.track.estimate:kinds"))
register(Step("formation", spec.FormationSpec, "stagediff.track.formation:compute", estimate="stagediff.track.estimate:formation"))
register(Step("drift", spec.DriftSpec, "stagediff.track.drift:compute", estimate="stagediff.track.estimate:drift"))
register(Step("patterns", spec.PatternsSpec, "stagediff.track.patterns:compute", estimate="stagediff.track.estimate:patterns"))
register(Step("phases", spec.PhasesSpec, "stagediff.track.phases:compute", estimate="stagediff.track.estimate:phases"))
register(Step("umap", spec.UmapSpec, "stagediff.track.umap:compute", estimate="stagediff.track.estimate:umap"))
register(
    Step(
        "efficiency",
        spec.EfficiencySpec,
        "stagediff.track.efficiency:compute",
        section="stagediff.track.section:section",
        estimate="stagediff.track.estimate:efficiency",
    )
)
register_kind(RunKind("track", "stagediff.track.config:TrackConfig", "stagediff.track.chain:plan"))
register_command("compare", "stagediff.track.compare:command")
