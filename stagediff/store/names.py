"""Names inside the store: which names a file of an artifact may have, and what the store keeps for itself.

An artifact is the folder `<kind>/<key>/` below the store's root. Its user's files lie in it under relative names with "/" between
parts; `spec.json`, `manifest.json` and `_work/` (claims, receipts, training checkpoints of a running step) are the store's. Folders
of the root that start with "_" hold no artifacts: `_quarantine/`, `_scratch/`.
"""

import re

__all__ = [
    "FORCED",
    "LOCKS",
    "MANIFEST",
    "PARTIAL",
    "QUARANTINE",
    "RECEIPTS",
    "REPLACES",
    "SCRATCH",
    "SESSIONS",
    "SPEC",
    "TRAINING",
    "WORK",
    "check_name",
    "claims",
]

SPEC = "spec.json"
MANIFEST = "manifest.json"
WORK = "_work"
SESSIONS = f"{WORK}/writers"
RECEIPTS = f"{WORK}/receipts"
TRAINING = f"{WORK}/training"
LOCKS = f"{WORK}/locks"
REPLACES = f"{WORK}/replaces.json"
FORCED = f"{WORK}/forced"
QUARANTINE = "_quarantine"
SCRATCH = "_scratch"
PARTIAL = ".partial"
"""Ending of a local file that is being written; nothing reads such files."""

_PART = re.compile(r"[A-Za-z0-9_+=@,()\[\]-][A-Za-z0-9_.+=@,()\[\] -]*")


def claims(array: str) -> str:
    """Folder of the claims on an array's shards."""
    return f"{WORK}/claims/{array}"


def check_name(name: str) -> str:
    """The name itself, if a file of an artifact may have it.

    Raises
    ------
    ValueError
        For absolute names, "..", empty or hidden parts, and the store's own names.
    """
    parts = name.split("/")
    if not all(_PART.fullmatch(part) for part in parts) or name.endswith(PARTIAL):
        raise ValueError(
            f"{name!r} cannot be a file of an artifact: expected a relative name like 'features.parquet' or 'step512/model.safetensors'"
        )
    if parts[0] == WORK or name in (SPEC, MANIFEST):
        raise ValueError(f"{name!r} is a name the store keeps for itself; choose another")
    return name
