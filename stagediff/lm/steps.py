"""Registers the steps of this room."""

from stagediff.lm import spec
from stagediff.steps import Resources, Step, register

register(Step("tokenizer", spec.TokenizerSpec, "stagediff.lm.tokenizer:compute", check="stagediff.lm.tokenizer:check"))
register(Step("tokens", spec.TokensSpec, "stagediff.lm.tokens:compute", estimate="stagediff.lm.estimate:tokens"))
register(Step("mix", spec.MixSpec, "stagediff.lm.mix:compute"))
register(
    Step(
        "harvest",
        spec.HarvestSpec,
        "stagediff.lm.harvest:compute",
        Resources(gpus=1, sharded=True),
        estimate="stagediff.lm.estimate:harvest",
        check="stagediff.lm.models:check_harvest",
    )
)
