"""What can happen to a planted feature along the checkpoints, and how many features it happens to."""

from dataclasses import dataclass

__all__ = ["ROLES", "SHARES", "Role"]


@dataclass(frozen=True)
class Role:
    """A feature's fate. Kinds as in `stagediff.track.spec.KINDS`, patterns as in its PATTERNS."""

    before: str | None
    """Kind before the event (all along, where there is none); None: not there yet."""
    after: str | None
    """Kind after the event; None: gone."""
    pattern: str | None = None
    """What tracking should call the event; None: nothing happens, the feature is maintained."""
    moves: bool = False
    """Its direction turns steadily."""
    merges: bool = False
    """Its direction and another feature's come together. Planted in pairs: one topic's words are shared out between two concepts."""


ROLES = {
    "stays token": Role("token", "token"),
    "stays concept": Role("concept", "concept"),
    "stays noise": Role("noise", "noise"),
    "moves token": Role("token", "token", moves=True),
    "moves concept": Role("concept", "concept", moves=True),
    "born token": Role(None, "token", "appearing"),
    "born concept": Role(None, "concept", "appearing"),
    "vanishes token": Role("token", None, "vanishing"),
    "vanishes concept": Role("concept", None, "vanishing"),
    "token to token": Role("token", "token", "token_to_token"),
    "token to concept": Role("token", "concept", "token_to_concept"),
    "concept to token": Role("concept", "token", "concept_to_token"),
    "noise to token": Role("noise", "token", "grouping"),
    "noise to concept": Role("noise", "concept", "grouping"),
    "token to noise": Role("token", "noise", "losing"),
    "merges": Role("concept", "concept", merges=True),
}

SHARES = {
    "stays token": 0.16,
    "stays concept": 0.07,
    "stays noise": 0.13,
    "moves token": 0.07,
    "moves concept": 0.04,
    "born token": 0.09,
    "born concept": 0.05,
    "vanishes token": 0.05,
    "vanishes concept": 0.03,
    "token to token": 0.07,
    "token to concept": 0.06,
    "concept to token": 0.04,
    "noise to token": 0.04,
    "noise to concept": 0.04,
    "token to noise": 0.02,
    "merges": 0.04,
}
"""Role -> share of the planted features."""
