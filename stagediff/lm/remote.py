"""Model folders behind a URL (s3://bucket/run/checkpoint-100): copied whole into the user's cache, and from there on like any local folder.

A copy is known by its URL and by names, sizes, times and ETags of what was copied, so an upload that changed is copied again, and one that is there
costs one listing. It is listed again afterwards: what changed while it was copied is refused. The copies lie in `STAGEDIFF_CACHE`
(see `stagediff.digest`) and may be deleted at any time.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from stagediff.digest import cache_folder
from stagediff.errors import UserError
from stagediff.store.objects import Entry, Objects, open_objects

__all__ = ["copy_of", "in_place", "is_remote"]


def is_remote(name: str) -> bool:
    """Whether a model's name is a URL."""
    return "://" in name


def copy_of(url: str, wanted: Callable[[str], bool]) -> Path:
    """A local folder with those files directly below the URL whose names are wanted.

    Raises UserError when there are none, the place can't be read, or they change while they are copied.
    """
    objects = open_objects(url.rstrip("/"))
    try:
        before = _listed(objects, wanted)
        if not before:
            raise UserError(
                f"There is no model below {url}. The URL of a Hugging Face model folder (config.json, weights, tokenizer) was expected."
            )
        place = cache_folder() / "models" / _short(url.rstrip("/")) / _short(repr(sorted(before.items())))
        if not place.is_dir():
            _copy(objects, before, wanted, place, url)
    except UserError as error:
        raise UserError(in_place(error)) from error
    return place


def in_place(error: Exception) -> str:
    """What a store's error says, where the place is none."""
    return str(error).replace("The store ", "").replace("of the store ", "of ").replace("the store's URL", "the URL")


def _listed(objects: Objects, wanted: Callable[[str], bool]) -> dict[str, Entry]:
    return {name: entry for name, entry in objects.entries("").items() if "/" not in name and wanted(name)}


def _copy(objects: Objects, files: dict[str, Entry], wanted: Callable[[str], bool], place: Path, url: str) -> None:
    temporary = place.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        temporary.mkdir(parents=True)
        for name in files:
            objects.download(name, temporary / name)
        changed = _listed(objects, wanted) != files or any((temporary / name).stat().st_size != e.size for name, e in files.items())
        if changed:
            raise UserError(f"The model {url} changed while it was copied. Wait until its upload is finished, then run again.")
        try:
            os.rename(temporary, place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    except FileNotFoundError as error:
        raise UserError(
            f"The model {url} changed while it was copied ({error}). Wait until its upload is finished, then run again."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
