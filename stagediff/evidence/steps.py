"""Registers the evidence steps and the settings that add them to a run."""

from stagediff.evidence.decomposition.spec import DecompositionSpec
from stagediff.evidence.rivals.spec import BaselineSpec, CrosscoderSpec, DifferenceSpec, LatentsSpec, RivalsSpec
from stagediff.steps import Extension, Resources, Step, register, register_extension

# --- decomposition and rivals ---------------------------------------------------------------------------------------------------------------
_DECOMPOSITION, _RIVALS = "stagediff.evidence.decomposition", "stagediff.evidence.rivals"
register(
    Step(
        "decomposition",
        DecompositionSpec,
        f"{_DECOMPOSITION}.mixing:compute",
        section=f"{_DECOMPOSITION}.section:section",
        estimate=f"{_DECOMPOSITION}.stages:estimate",
    )
)
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
for _kind in ("stagewise", "both"):
    register_extension(Extension(_kind, "decomposition", f"{_DECOMPOSITION}.spec:DecompositionConfig", f"{_DECOMPOSITION}.stages:plan"))
    register_extension(Extension(_kind, "rivals", f"{_RIVALS}.config:RivalsConfig", f"{_RIVALS}.stages:plan"))
