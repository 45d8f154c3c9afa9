"""Adds the rivals to a stage-wise run's plan: they read the rows of its stages, found by what the diff compares."""

from typing import TYPE_CHECKING, Any, cast

from stagediff.config import RunConfig
from stagediff.diff.spec import Cut, DiffSpec
from stagediff.diff.stages import STAGE_START
from stagediff.errors import UserError
from stagediff.evidence.rivals.config import RivalsConfig
from stagediff.evidence.rivals.spec import BaselineSpec, CrosscoderSpec, DifferenceSpec, LatentsSpec, RivalsSpec
from stagediff.lm.estimate import spec_of
from stagediff.plan import Plan
from stagediff.sae.spec import DictionaryConfig
from stagediff.spec import Ref, Spec

if TYPE_CHECKING:
    from stagediff.diff.config import StagewiseConfig
    from stagediff.store import Store

__all__ = ["lineage", "plan", "rival_spec"]

BEHIND_THE_SCATTER = ("S", "D", "M", "F_D", "F_M")


def plan(config: RunConfig, settings: dict[str, Any], into: Plan, store: "Store") -> None:
    """Trainings, latents and the table. Raises UserError where a rival cannot be had for this run's dictionary."""
    given = RivalsConfig.model_validate(settings)
    run = cast("StagewiseConfig", getattr(config, "stagewise", config))
    diff = into["diff"].spec
    assert isinstance(diff, DiffSpec)
    trainings = {stage: lineage(ref, into) for stage, ref in diff.dictionaries.items()}
    tokens = given.tokens or _behind(trainings, into)
    d, m = (spec_of(diff.dictionaries[stage], into) for stage in ("D", "F_D"))
    held = [spec_of(diff.statistics[stage], into).data for stage in ("D", "F_D")]
    common: dict[str, Any] = {
        "base": d.data,
        "finetuned": m.data,
        "budget": _budget(into, diff, tokens),
        "order_seed": d.order_seed,
        "compute": d.compute,
        "checkpoint_tokens": max(d.budget.batch, tokens // 10),
        "seed": run.seed,
    }
    latents: dict[str, Ref] = {}
    for method in given.methods:
        made = into.add(method, rival_spec(method, given, run.dictionary, common))
        trainings[method] = (made,)
        top = spec_of(diff.statistics["F_D"], into).top
        spec = LatentsSpec(dictionary=made, base=held[0], finetuned=held[1], top=top, alive_firings=diff.alive_firings)
        latents[method] = into.add(f"latents-{method}", spec)
    into.add("rivals", RivalsSpec(diff=into["diff"].ref, align=into["align"].ref, latents=latents, trainings=trainings))
    if given.baseline:
        into.add("baseline", BaselineSpec(diff=into["diff"].ref, baseline=_baseline(diff, into)))


def _baseline(diff: DiffSpec, plan: Plan) -> Ref:
    """The run's stages once more, with the base model's activations wherever the finetuned model's are read; S and D are the run's own."""
    d = spec_of(diff.dictionaries["D"], plan).data
    plain = d.model_copy(update={"mix": None, "new": None})
    measured = spec_of(diff.statistics["D"], plan).data
    dictionaries = {stage: diff.dictionaries[stage] for stage in ("S", "D")}
    statistics = {stage: diff.statistics[stage] for stage in ("S", "D")}
    for stage in ("M", "F_D", "F_M", "F_direct"):
        start, data = dictionaries[STAGE_START[stage]], plain if stage == "M" else d
        spec = spec_of(diff.dictionaries[stage], plan).model_copy(update={"start": start, "data": data})
        dictionaries[stage] = plan.add(f"baseline-{stage}", spec)
        counted = spec_of(diff.statistics[stage], plan).model_copy(update={"dictionary": dictionaries[stage], "data": measured})
        statistics[stage] = plan.add(f"statistics-baseline-{stage}", counted)
    cut = diff.cut if diff.cut.kind != "fdr" else Cut()  # an fdr cut needs a null of its own
    changes = {"dictionaries": dictionaries, "statistics": statistics, "cut": cut, "null": None}
    return plan.add("baseline-diff", diff.model_copy(update=changes))


def lineage(ref: Ref, plan: Plan) -> tuple[Ref, ...]:
    """The dictionaries that `ref` was trained on from, first one first, and itself."""
    found = [ref]
    spec = spec_of(ref, plan)
    while hasattr(spec, "start"):
        found.append(spec.start)
        spec = spec_of(spec.start, plan)
    return tuple(reversed(found))


def _behind(trainings: dict[str, tuple[Ref, ...]], plan: Plan) -> int:
    """Tokens that all dictionaries behind the scatter were trained on."""
    refs = dict.fromkeys(ref for stage in BEHIND_THE_SCATTER for ref in trainings[stage])
    return sum(spec.budget.tokens for spec in (spec_of(ref, plan) for ref in refs) if hasattr(spec, "budget"))


def _budget(plan: Plan, diff: DiffSpec, tokens: int) -> Any:
    """S's learning rate and schedule (a rival is trained from scratch); a finetune's where S was trained elsewhere."""
    s = spec_of(diff.dictionaries["S"], plan)
    like = s if hasattr(s, "budget") else spec_of(diff.dictionaries["D"], plan)
    return like.budget.model_copy(update={"tokens": tokens})


def rival_spec(method: str, given: RivalsConfig, dictionary: DictionaryConfig, common: dict[str, Any]) -> Spec:
    """The training of one of `METHODS`, its dictionary after the run's. `common`: what the specs of all of them hold (`base`, `finetuned`, `budget`, …)."""
    changes: dict[str, Any] = {} if given.features is None else {"features": given.features}
    if method == "difference-sae":
        return DifferenceSpec(dictionary=dictionary.model_copy(update=changes), **common)
    own = {
        "architecture": "relu" if method == "crosscoder-l1" else "batchtopk",
        "decoder_norm": None,
        "initial_norm": None,
        "subtract_b_dec": None,
    }
    if method == "crosscoder-l1":
        changes |= {**own, "auxk": None, "l1": dictionary.l1 if given.l1 is None else given.l1}
        return CrosscoderSpec(dictionary=_checked(dictionary, changes), shared=given.shared, shared_l1=given.shared_l1, **common)
    changes |= {**own, "auxk": dictionary.auxk if dictionary.architecture in ("topk", "batchtopk") else None, "k": given.k or dictionary.k}
    return CrosscoderSpec(dictionary=_checked(dictionary, changes), **common)


def _checked(dictionary: DictionaryConfig, changes: dict[str, Any]) -> DictionaryConfig:
    """The dictionary's settings with these changes, validated."""
    features, k = changes.get("features", dictionary.features), changes.get("k", dictionary.k)
    if changes["architecture"] == "batchtopk" and k > features:
        raise UserError(f"rivals.k is {k}, but the crosscoder has {features} latents. Set rivals.k to between 1 and that number.")
    return DictionaryConfig.model_validate({**dictionary.model_dump(), **changes})
