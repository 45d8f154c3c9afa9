"""Sizes of trainings, statistics and quality measurements for `stagediff plan`."""

from functools import partial
from typing import Any

from stagediff.estimate import Estimate
from stagediff.lm.estimate import activation_shape, layer_flops, model_dims, reading_flops, spec_of
from stagediff.plan import Plan
from stagediff.sae.spec import DictionaryConfig, FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref

__all__ = ["dictionary_of", "features_of", "figures_memory", "quality", "statistics", "step_memory", "training", "training_memory"]

STATE = 32
"""Bytes of an encoder's and a decoder's number together, in fp32: weights 8, Adam's moments 16, gradients 8."""
CHUNK = 512 << 20
"""Of topk's pre-activations, on a GPU (`sae.sparse.engine.CHUNK_BYTES`)."""
AT_ONCE = (1024, 1 << 22)
"""Tokens at least, or activations, that are looked at together for a finished dictionary's figures (`sae.train`)."""
PER_ACTIVATION = {"topk": 13, "relu": 13, "batchtopk": 17, "jumprelu": 17}
"""Bytes that each of these activations takes then."""
PRE = {"batchtopk": 1, "relu": 2, "jumprelu": 5}
"""How many tensors of a batch's pre-activations [B, F] are held at once."""


def training(spec: TrainSpec | FinetuneSpec, plan: Plan) -> Estimate:
    _, d, _ = activation_shape(spec.data, plan)
    features = features_of(spec.ref, plan)
    dictionary = dictionary_of(spec, plan)
    memory = partial(training_memory, spec, dictionary, d) if dictionary else None
    stored = 24 if spec.keep_optimiser else 8  # fp32 encoder and decoder, and two moments of each
    flops = (10.0 * d * features + reading_flops(spec.data, plan)) * spec.budget.tokens
    return Estimate(tokens=spec.budget.tokens, bytes=stored * d * features, flops=flops, memory=memory)


def training_memory(spec: TrainSpec | FinetuneSpec, dictionary: DictionaryConfig, d: int, ranks: int = 1, shard: str = "batch") -> int:
    """Bytes on the fullest of `ranks` GPUs over the training of a dictionary of width d.

    `shard`: what the ranks share out, features or every batch. The part of AuxK that is dense over dead features, what the allocator holds back, and the
    model's weights where activations are not stored, come on top.
    """
    return max(step_memory(spec, dictionary, d, ranks, shard), figures_memory(dictionary, d))


def figures_memory(dictionary: DictionaryConfig, d: int) -> int:
    """Bytes on the first GPU when a training is over: the whole dictionary in fp32, and activations of the tokens on which its figures are taken."""
    features = dictionary.features
    tokens = max(AT_ONCE[0], AT_ONCE[1] // max(1, features))
    return 8 * features * d + PER_ACTIVATION[dictionary.architecture] * tokens * features


def step_memory(spec: TrainSpec | FinetuneSpec, dictionary: DictionaryConfig, d: int, ranks: int = 1, shard: str = "batch") -> int:
    """Bytes on each GPU during a step: weights, moments, gradients, copies, and a batch's own tensors."""
    resolved_auxk = d // 2 if dictionary.auxk is None and dictionary.architecture in ("topk", "batchtopk") else dictionary.auxk or 0
    split = ranks if shard == "features" else 1
    own = dictionary.features // split
    tokens = spec.budget.batch // (1 if shard == "features" else ranks)
    wide = 2 if spec.compute == "bf16" else 4
    anchored = isinstance(spec, FinetuneSpec) and spec.anchor > 0
    state = STATE + (2 * wide if wide == 2 else 0) + (8 if anchored else 0)
    if dictionary.architecture == "topk":
        pre = min(tokens * own * wide, CHUNK)
    else:
        pre = tokens * own * wide * PRE[dictionary.architecture]
    gathered = 0
    if split > 1 and dictionary.architecture in ("topk", "batchtopk"):
        gathered = 8 * tokens * max(dictionary.k, resolved_auxk) * (2 * ranks + 2)  # keys: own, everyone's, these side by side
    return state * own * d + pre + tokens * d * (4 * 5 + 2 * wide) + gathered


def dictionary_of(spec: TrainSpec | FinetuneSpec, plan: Plan) -> DictionaryConfig | None:
    """What is trained; None where the start was made elsewhere."""
    found: Any = spec
    while hasattr(found, "start"):
        found = spec_of(found.start, plan)
    return getattr(found, "dictionary", None)


def statistics(spec: StatisticsSpec, plan: Plan) -> Estimate:
    n, d, _ = activation_shape(spec.data, plan)
    features = features_of(spec.dictionary, plan)
    return Estimate(tokens=n, bytes=features * (8 * spec.top + 60), flops=(4.0 * d * features + reading_flops(spec.data, plan)) * n)


def quality(spec: QualitySpec, plan: Plan) -> Estimate:
    _, _, per_row = activation_shape(spec.data, plan)
    d, layers = model_dims(spec.model, plan)
    read = spec.rows * per_row
    return Estimate(tokens=read, bytes=2**14, flops=3.0 * read * layers * layer_flops(d))


def features_of(ref: Ref, plan: Plan) -> int:
    """Width of the dictionary that `ref` names; 0 for an imported one, whose width the plan does not know."""
    spec = spec_of(ref, plan)
    while hasattr(spec, "start"):
        spec = spec_of(spec.start, plan)
    return spec.dictionary.features if hasattr(spec, "dictionary") else 0
