"""Registers the planted steps and the commands `stagediff planted` and `stagediff classical`."""

from stagediff.steps import Resources, Step, register, register_command
from stagediff.synthetic import diff_spec, spec

register(Step("planted-tokenizer", spec.PlantedTokenizerSpec, "stagediff.synthetic.rows:tokenizer"))
register(Step("planted-tokens", spec.PlantedTokensSpec, "stagediff.synthetic.rows:tokens", estimate="stagediff.synthetic.estimate:tokens"))
register(
    Step(
        "planted-harvest",
        spec.PlantedHarvestSpec,
        "stagediff.synthetic.harvest:compute",
        Resources(sharded=True),
        estimate="stagediff.synthetic.estimate:harvest",
    )
)
register(Step("planted-track", spec.PlantedTrackSpec, "stagediff.synthetic.judge:compute", estimate="stagediff.synthetic.estimate:track"))
register(
    Step(
        "planted-diff-tokens",
        diff_spec.PlantedDiffTokensSpec,
        "stagediff.synthetic.diff_rows:tokens",
        estimate="stagediff.synthetic.estimate:tokens",
    )
)
register(
    Step(
        "planted-diff-harvest",
        diff_spec.PlantedDiffHarvestSpec,
        "stagediff.synthetic.diff_rows:harvest",
        Resources(sharded=True),
        estimate="stagediff.synthetic.estimate:harvest",
    )
)
register(Step("planted-diff", diff_spec.PlantedDiffSpec, "stagediff.synthetic.diff_judge:compute"))
register_command("planted", "stagediff.synthetic.command:command")
register_command("classical", "stagediff.synthetic.classical.command:command")
