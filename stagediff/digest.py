"""Content digests of files (sha256), remembered so that an untouched rerun reads no big file again.

A remembered digest is trusted while the file's path, size, modification time (ns) and inode are what they were. Files below 1 MiB are
always read. A file changed within the last seconds is read too and not remembered: a second write within the clock's tick could leave
size and time as they are. The memory lies in the user's cache folder (`STAGEDIFF_CACHE`, else `XDG_CACHE_HOME/stagediff`, else
`~/.cache/stagediff`), one small file per path; it may be deleted at any time, and a folder that cannot be written only costs speed.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from stagediff.errors import UserError

__all__ = ["cache_folder", "file_digest", "files_digest"]

SMALL = 1 << 20
SETTLED_SECONDS = 2.0


def cache_folder() -> Path:
    """Where this user's stagediff caches lie."""
    if own := os.environ.get("STAGEDIFF_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagediff"


def file_digest(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a file's bytes. Raises UserError when the file is missing or cannot be read."""
    path = Path(path)
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
        if stat.st_size < SMALL:
            return hashlib.sha256(real.read_bytes()).hexdigest()
        known_as: list[str | int] = [str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = cache_folder() / "digests" / hashlib.sha256(os.fsencode(real)).hexdigest()
        if (digest := _remembered(entry, known_as)) is not None:
            return digest
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = real.stat()
    except OSError as error:
        raise UserError(
            f"The file {path} cannot be read ({error.strerror or error}). A file that can be read was expected; check its path and "
            "permissions."
        ) from error
    is_same = [after.st_size, after.st_mtime_ns, after.st_ino] == known_as[1:]
    if is_same and abs(time.time() - after.st_mtime) > SETTLED_SECONDS:
        _remember(entry, known_as, digest)
    return digest


def files_digest(paths: Iterable[str | os.PathLike[str]], root: str | os.PathLike[str] | None = None) -> str:
    """sha256 (hex) over several files: their names relative to `root` (None: no names count) and contents.

    With `root` the order of `paths` does not matter; without, it does.
    """
    named = [(Path(p).relative_to(root).as_posix() if root is not None else "", Path(p)) for p in paths]
    if root is not None:
        named.sort(key=lambda pair: pair[0])
    whole = hashlib.sha256()
    for name, path in named:
        whole.update(json.dumps([name, file_digest(path)]).encode() + b"\n")
    return whole.hexdigest()


def _remembered(entry: Path, known_as: list[str | int]) -> str | None:
    try:
        stored = json.loads(entry.read_text())
        return stored["sha256"] if stored["file"] == known_as else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(entry: Path, known_as: list[str | int], digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as file:
            json.dump({"file": known_as, "sha256": digest}, file)
        os.replace(file.name, entry)
    except OSError:
        return
