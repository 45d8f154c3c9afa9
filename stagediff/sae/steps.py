"""Registers the steps of this room."""

from stagediff.sae import spec
from stagediff.steps import Resources, Step, register

register(
    Step(
        "train",
        spec.TrainSpec,
        "stagediff.sae.train:compute",
        Resources(gpus=1),
        estimate="stagediff.sae.estimate:training",
        check_shared="stagediff.sae.sharing:check_planned",
        assist="stagediff.sae.train:assist",
    )
)
register(
    Step(
        "finetune",
        spec.FinetuneSpec,
        "stagediff.sae.train:compute",
        Resources(gpus=1),
        estimate="stagediff.sae.estimate:training",
        check_shared="stagediff.sae.sharing:check_planned",
        assist="stagediff.sae.train:assist",
    )
)
register(Step("import", spec.ImportSpec, "stagediff.sae.formats:compute"))
register(
    Step(
        "statistics",
        spec.StatisticsSpec,
        "stagediff.sae.statistics:compute",
        Resources(gpus=1),
        estimate="stagediff.sae.estimate:statistics",
    )
)
register(Step("quality", spec.QualitySpec, "stagediff.sae.quality:compute", Resources(gpus=1), estimate="stagediff.sae.estimate:quality"))
