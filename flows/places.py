"""Which stores a machine's runs may touch.

A store is named by a parameter, and whoever may start runs may name any. A worker whose environment sets STAGEDIFF_STORES (folders or URLs, separated by
commas) accepts only those and what lies below them; links and `..` are followed first.
"""

import os
from pathlib import Path

from stagediff.errors import UserError

__all__ = ["STORES", "absolute", "check_store"]

STORES = "STAGEDIFF_STORES"


def absolute(store: str) -> str:
    """The store as every process names it, whatever its working directory: local paths in full."""
    return store if "://" in store else str(Path(store).expanduser().resolve())


def check_store(store: str) -> None:
    """Raises UserError where this machine's runs must not use the store."""
    allowed = [place.strip() for place in os.environ.get(STORES, "").split(",") if place.strip()]
    if allowed and not any(_is_within(store, place) for place in allowed):
        raise UserError(f"The store {store} is not one that this worker may use ({STORES} allows {', '.join(allowed)}).")


def _is_within(store: str, place: str) -> bool:
    if "://" in store or "://" in place:
        parts = store.split("/")
        return ".." not in parts and (f"{store.rstrip('/')}/").startswith(f"{place.rstrip('/')}/")
    return Path(absolute(store)).is_relative_to(absolute(place))
