"""The Hugging Face hub, or its local cache where the hub does not answer: which commit a name means, and small files.

huggingface_hub is imported when a hub name is met, not before: local folders need none of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stagediff.errors import UserError

__all__ = ["ask", "commit", "file"]

T = TypeVar("T")


def commit(name: str, revision: str | None) -> str:
    """The commit that a branch or tag of a hub repository stands at; offline, the one in the local cache."""
    import huggingface_hub

    def online(offline: bool) -> str:
        if offline:
            config = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
            return Path(config).parent.name
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=15).sha or ""

    return ask(name if revision is None else f"{name}@{revision}", online)


def file(name: str, path: str, revision: str | None) -> Path:
    """A file of a hub repository at a commit, in the local cache."""
    import huggingface_hub

    return Path(ask(name, lambda offline: huggingface_hub.hf_hub_download(name, path, revision=revision, local_files_only=offline)))


def ask(what: str, question: Callable[[bool], T]) -> T:
    """Asks the hub, and its local cache when the hub does not answer. Raises UserError when neither knows it."""
    from huggingface_hub import constants, errors

    reason: Exception | None = None
    if not constants.is_offline_mode():
        try:
            return question(False)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"{what!r} is neither a folder here nor a repository (or revision) of the Hugging Face hub that you may read: {first} "
                "Check the name, the revision and your login."
            ) from error
        except Exception as error:  # no network, in one of many forms: the cache may still know
            reason = error
    try:
        return question(True)
    except Exception as error:
        said = (
            str(reason).strip().splitlines()[0]
            if reason is not None and str(reason).strip()
            else "offline mode is on"
            if reason is None
            else type(reason).__name__
        )
        raise UserError(
            f"{what!r} is no folder here, the Hugging Face hub does not answer ({said}), and its local cache does not hold it. "
            "Give the path of a model folder, or connect to the hub once so that it is cached."
        ) from error
