"""The offline labeller: a feature is related to a topic when enough of its top examples hold the topic's words."""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stagediff.evidence.labels.labeller import Answer, Question

__all__ = ["Keywords", "Topic"]


class Topic:
    """Something to look for in a text: words (any case, any white space between them, not within longer words), or a regular expression "/.../".

    A regular expression is taken as it is; "/.../i" ignores case. Raises ValueError for one that is empty, does not compile, or finds the empty text
    (it would be found everywhere).
    """

    def __init__(self, said: str):
        self.said = said
        expression = re.fullmatch(r"/(.+)/(i?)", said.strip(), re.S)
        try:
            self.pattern = re.compile(expression[1], re.I if expression[2] else 0) if expression else _words(said)
        except re.error as error:
            raise ValueError(f"topic {said!r} is not a regular expression ({error}); without the slashes it is taken as words") from None
        if self.pattern.search(""):
            raise ValueError(f"topic {said!r} is found in the empty text, and so in every text")

    def is_in(self, text: str) -> bool:
        return self.pattern.search(text) is not None


class Keywords:
    """Flags a feature when at least `share` of its examples hold one of the topics. Its label says on which token the examples are strongest."""

    at_once = 1
    is_costly = False

    def __init__(self, topics: Sequence[str], share: float):
        self.topics = [Topic(t) for t in topics]
        self.share = share

    def label(self, question: Question) -> Answer:
        holds = np.array([[topic.is_in(e.text) for topic in self.topics] for e in question.excerpts], bool).reshape(-1, len(self.topics))
        related = np.flatnonzero(holds.any(1))
        foremost = int(holds.sum(0).argmax())
        needed = max(1, math.ceil(self.share * len(question.excerpts) - 1e-9))
        return Answer(
            label=_strongest_token(question),
            flagged=len(related) >= needed,
            topic=self.topics[foremost].said if len(related) else "",
            examples=tuple(int(i) for i in related),
        )


def _words(said: str) -> re.Pattern[str]:
    words = said.split()
    if not words:
        raise ValueError("a topic is empty; expected words, or a regular expression between slashes")
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return re.compile(before + r"\s+".join(re.escape(w) for w in words) + after, re.I)


def _strongest_token(question: Question) -> str:
    """ "' HATE' in 14 of 20": the commonest strongest token; of equally common ones that of the stronger example."""
    peaks = [e.tokens[int(np.argmax(e.activations))] for e in question.excerpts if e.tokens]
    if not peaks:
        return ""
    token, count = Counter(peaks).most_common(1)[0]
    return f"{token!r} in {count} of {len(question.excerpts)}"
