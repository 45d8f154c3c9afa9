"""Registers the evidence steps and the settings that add them to a run, in the order in which the report shows them."""

from stagediff.evidence.decomposition.spec import DecompositionSpec
from stagediff.evidence.interventions.spec import AblateSpec, SteerSpec
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.evidence.rivals.spec import BaselineSpec, CrosscoderSpec, DifferenceSpec, LatentsSpec, RivalsSpec
from stagediff.evidence.verdict.spec import VerdictSpec
from stagediff.steps import Extension, Resources, Step, register, register_command, register_extension

_DECOMPOSITION = "stagediff.evidence.decomposition"
_LABELS = "stagediff.evidence.labels"
_INTERVENTIONS = "stagediff.evidence.interventions"
_RIVALS = "stagediff.evidence.rivals"
_VERDICT = "stagediff.evidence.verdict"


def _extend(name: str, config: str, plan: str) -> None:
    for kind in ("stagewise", "both"):
        register_extension(Extension(kind, name, config, plan))


# Decomposition: what one path alone could have told.
register(
    Step(
        "decomposition",
        DecompositionSpec,
        f"{_DECOMPOSITION}.mixing:compute",
        section=f"{_DECOMPOSITION}.section:section",
        estimate=f"{_DECOMPOSITION}.stages:estimate",
    )
)
_extend("decomposition", f"{_DECOMPOSITION}.spec:DecompositionConfig", f"{_DECOMPOSITION}.stages:plan")

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

# Rivals: other methods on the same rows, and the published baseline.
register(Step("crosscoder", CrosscoderSpec, f"{_RIVALS}.train:compute", Resources(gpus=1), estimate=f"{_RIVALS}.estimate:training"))
register(
    Step(
        "difference-sae", DifferenceSpec, f"{_RIVALS}.train:compute_difference", Resources(gpus=1), estimate=f"{_RIVALS}.estimate:training"
    )
)
register(Step("rival-latents", LatentsSpec, f"{_RIVALS}.latents:compute", Resources(gpus=1), estimate=f"{_RIVALS}.estimate:latents"))
register(Step("rivals", RivalsSpec, f"{_RIVALS}.table:compute", section=f"{_RIVALS}.section:section", estimate=f"{_RIVALS}.estimate:table"))
register(
    Step(
        "baseline",
        BaselineSpec,
        f"{_RIVALS}.baseline:compute",
        section=f"{_RIVALS}.baseline_section:section",
        estimate=f"{_RIVALS}.estimate:baseline",
    )
)
_extend("rivals", f"{_RIVALS}.config:RivalsConfig", f"{_RIVALS}.stages:plan")

# Verdict: all of it on one card per named feature. Last, since its plan names the steps of the others.
register(
    Step(
        "verdict",
        VerdictSpec,
        f"{_VERDICT}.compute:compute",
        section=f"{_VERDICT}.section:section",
        estimate=f"{_VERDICT}.stages:estimate",
    )
)
_extend("verdict", f"{_VERDICT}.spec:VerdictConfig", f"{_VERDICT}.stages:plan")

register_command("seeds", "stagediff.evidence.seeds:command")
