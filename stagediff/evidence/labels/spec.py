"""The spec of the labels step."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stagediff.spec import NotInKey, Ref, Spec, Value

__all__ = ["SERVERS", "LabelsSpec", "ModelSettings", "Prices", "Requests", "checked_url"]

SERVERS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
"""Labellers that ask a language model -> where they do so unless told otherwise. Their clients' own environment variables don't decide it."""


def checked_url(url: str) -> str:
    """A server's address without a closing slash. Raises ValueError for one that is none, or that holds a password (it is stored and shown)."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if whole and (parts.username or parts.password or parts.query):
        raise ValueError(
            "base_url holds a user name, a password or a query; it is stored with the results. Keys come from the environment only"
        )
    if not whole:
        raise ValueError(f"base_url is {url!r}; expected http://host:port/v1 or https://host/v1")
    return url.rstrip("/")


class ModelSettings(Value):
    """Which language model answers, and how."""

    name: str = Field(min_length=1)
    """As the server calls it. It stands for the answers in the key, so a name that stays while the model behind it changes hides that."""
    base_url: str
    temperature: float | None = Field(None, ge=0)
    """None: not sent (some models accept only their own)."""
    answer_tokens: int = Field(1000, ge=16)
    """An answer is cut off there. A model that reasons first needs more."""

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str) -> str:
        return checked_url(value)


class Prices(Value):
    """Money per million tokens, in any currency."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    currency: str = "USD"


class Requests(Value):
    """How a server is asked. Nothing here changes an answer."""

    key_variable: str | None = None
    """Environment variable that holds the key; None: OPENAI_API_KEY, ANTHROPIC_API_KEY."""
    parallel: int = Field(4, ge=1, le=64)
    """Questions on their way at a time."""
    timeout: float = Field(120.0, gt=0)
    """Seconds that one answer may take."""
    retries: int = Field(6, ge=0)
    """Further tries after a time-out, a refusal for now (429) or a server's fault (5xx)."""
    wait: float = Field(1.0, ge=0)
    """Seconds before the second try; doubled from try to try, up to a minute. A server's own "retry-after" goes first."""
    prices: Prices | None = None


class LabelsSpec(Spec):
    """Asks a labeller about the selected, the newborn and random alive features of a diff, without saying which is which."""

    step = "labels"
    kind = "labels"
    reads_bulk = False  # only held-out rows, which every plan keeps
    diff: Ref
    statistics: Ref
    """Of F via D on held-out rows: where the examples are."""
    topics: tuple[str, ...]
    """Words, or regular expressions between slashes (`stagediff.evidence.labels.keywords`)."""
    labeller: Literal["keywords", "openai", "anthropic"] = "keywords"
    model: ModelSettings | None = None
    """None: keywords."""
    share: float = Field(0.5, gt=0, le=1)
    """keywords: a feature is flagged when at least this share of its examples holds a topic."""
    most: int = Field(500, ge=1)
    """Selected features that are asked about at most, those with the lowest score; and so many newborn ones, drawn at random."""
    random: int = Field(500, ge=1)
    """Random alive features; all where there are fewer."""
    examples: int = Field(20, ge=1)
    window: int = Field(40, ge=1)
    """Tokens of an example, the strongest one in the middle."""
    grow_to: int | None = Field(None, ge=1)
    """Tokens up to which an example's window grows where it then holds one of `hold`; None: it does not grow."""
    hold: tuple[str, ...] = ()
    seed: int = 0
    requests: Annotated[Requests, NotInKey()] = Requests()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.model is None) != (self.labeller == "keywords"):
            raise ValueError(f"labeller {self.labeller} {'needs a model' if self.model is None else 'asks no model'}")
        return self
