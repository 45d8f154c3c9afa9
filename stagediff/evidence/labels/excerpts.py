"""The text that a labeller sees of a feature: windows around its strongest tokens, which may grow to hold a text such as the trigger.

Growing looks at the text alone, never at the feature or its group, so it keeps the labelling blind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stagediff.evidence.labels.keywords import Topic
from stagediff.evidence.labels.labeller import Excerpt, Question
from stagediff.evidence.labels.spec import LabelsSpec

if TYPE_CHECKING:
    from stagediff.store import Store

__all__ = ["Place", "Shown", "grown", "read"]


@dataclass(frozen=True)
class Place:
    """Where an excerpt stands, so that the whole document can be found again."""

    row: int
    position: int
    """Of the strongest token in the row."""
    start: int
    """Of the excerpt's first token in the row."""
    tokens: int


@dataclass(frozen=True)
class Shown:
    """What is shown of one feature."""

    question: Question
    places: tuple[Place, ...]


def read(store: "Store", spec: LabelsSpec, features: Sequence[int]) -> dict[int, Shown]:
    """Feature -> its excerpts, strongest first (none for one that never fires). Memory: all their windows at once, so ask in blocks."""
    from stagediff.sae.examples import feature_examples

    wide = max(spec.window, spec.grow_to or 0)
    held = [Topic(text) for text in spec.hold] if wide > spec.window else []
    found = feature_examples(store, spec.statistics, features, window=spec.window, ranks=spec.examples)
    more = feature_examples(store, spec.statistics, features, window=wide, ranks=spec.examples) if held else found
    excerpts: dict[int, list[Excerpt]] = {f: [] for f in features}
    places: dict[int, list[Place]] = {f: [] for f in features}
    for near, far in zip(found.itertuples(index=False), more.itertuples(index=False), strict=True):
        start, excerpt = int(near.start), Excerpt(near.text, tuple(near.tokens), tuple(near.activations))
        if held:
            whole = Excerpt(far.text, tuple(far.tokens), tuple(far.activations))
            start, excerpt = grown(excerpt, start, whole, int(far.start), held)
        excerpts[int(near.feature)].append(excerpt)
        places[int(near.feature)].append(Place(int(near.row), int(near.position), start, len(excerpt.tokens)))
    return {f: Shown(Question(tuple(excerpts[f])), tuple(places[f])) for f in features}


def grown(near: Excerpt, start: int, far: Excerpt, far_start: int, held: Sequence[Topic]) -> tuple[int, Excerpt]:
    """`near` (which begins at `start` of its row), widened within `far` as little as needed to hold one of the texts; its start and itself.

    As it is where it holds one already, or where `far` does not either.
    """
    if any(topic.is_in(near.text) for topic in held):
        return start, near
    first, last = start - far_start, start - far_start + len(near.tokens)
    spans = [span for topic in held for m in topic.pattern.finditer(far.text) for span in [_tokens(far, m.start(), m.end())]]
    if not spans:
        return start, near
    a, b = min(((min(first, a), max(last, b)) for a, b in spans), key=lambda span: (span[1] - span[0], span))
    return far_start + a, Excerpt(_text(far, a, b), far.tokens[a:b], far.activations[a:b])


def _tokens(excerpt: Excerpt, begin: int, end: int) -> tuple[int, int]:
    """The tokens (first, end) that hold these characters; all of them where tokens by themselves do not add up to the text."""
    if "".join(excerpt.tokens) != excerpt.text:
        return 0, len(excerpt.tokens)
    ends = np.cumsum([len(t) for t in excerpt.tokens])
    return int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end, side="left")) + 1


def _text(excerpt: Excerpt, a: int, b: int) -> str:
    return excerpt.text if (a, b) == (0, len(excerpt.tokens)) else "".join(excerpt.tokens[a:b])
