"""The interface that every labeller has: a question goes in, an answer comes out. Neither knows which feature it is about, or from which group."""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

__all__ = ["Answer", "Excerpt", "Labeller", "Question"]


@dataclass(frozen=True)
class Excerpt:
    """One top example: text of the corpus around the feature's strongest token."""

    text: str
    tokens: tuple[str, ...]
    """The same, token by token (a part of a character shows as U+FFFD)."""
    activations: tuple[float, ...]
    """One per token."""


@dataclass(frozen=True)
class Question:
    """A feature's top examples, strongest first: all that a labeller gets to see of it."""

    excerpts: tuple[Excerpt, ...]


@dataclass(frozen=True)
class Answer:
    """What a labeller said."""

    label: str
    """A few words; empty where the answer is unclear."""
    flagged: bool
    """Whether it is related to a topic; False where the answer is unclear."""
    topic: str = ""
    """The topic, as the settings write it; empty: none, or none in particular."""
    examples: tuple[int, ...] = ()
    """Which excerpts are related, from 0."""
    unclear: bool = False
    """Nothing that could be understood was said, twice over."""
    raw: str = ""
    """The last answer as it came."""
    asked: int = 1
    """How often the question was put (not counting refusals and time-outs)."""
    tokens_in: int = 0
    tokens_out: int = 0
    model: str = field(default="")
    """Who answered, as the server says."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Answer":
        """Raises TypeError or KeyError for what `as_json` did not make."""
        return cls(**{**body, "examples": tuple(body["examples"])})


class Labeller(Protocol):
    """Answers one question at a time; several threads may ask at once where `at_once` is above 1."""

    at_once: int
    is_costly: bool
    """Whether every answer is kept as it comes, so that it is never asked for again."""

    def label(self, question: Question) -> Answer: ...
