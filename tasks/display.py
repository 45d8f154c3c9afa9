"""What a step shows in Prefect's UI while it runs and when it is done: small artifacts, made beside the computation, never in its way.

A server that is slow or away must not slow a step down or fail it: progress is sent from a thread of its own, a few times a minute, the latest
state only; what cannot be sent is left out, and the log says so once.
"""

import contextvars
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_progress_artifact, update_progress_artifact

from stagediff import progress
from stagediff.spec import Ref
from stagediff.store import Store

__all__ = ["Reporter", "link", "show_result", "slug"]

log = logging.getLogger("stagediff")

EVERY = 5.0
"""Seconds between two updates of a progress artifact."""
PATIENCE = 10.0
"""Seconds that the end of a step waits for its last update to arrive."""


class Reporter:
    """Sends the progress of one step to the UI; a listener for `stagediff.progress.Progress`. Use it in a `with` statement, within a run."""

    def __init__(self, name: str, key: str, every: float = EVERY):
        self._name, self._key, self._every = name, key, every
        self._latest: dict[str, tuple[float, str]] = {}
        self._sent: dict[str, tuple[float, str]] = {}
        self._ids: dict[str, UUID] = {}
        self._failed = False
        self._end = threading.Event()
        context = contextvars.copy_context()  # the run that the artifacts belong to
        self._thread = threading.Thread(target=context.run, args=(self._loop,), name=f"progress of {name}", daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(PATIENCE)

    def __call__(self, task: progress.Task) -> None:
        share = min(100 * task.done / max(task.total, 1e-9), 100.0)
        words = f"{self._name}: {task.name}, {share:.0f} % of {task.total:,.0f} {task.unit}, {task.rate:,.0f} {task.unit}/s {task.note}"
        self._latest[task.name] = (share, words.rstrip())

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(self._every)
            for work, state in list(self._latest.items()):
                if self._sent.get(work) != state and _try(partial(self._send, work, *state), quiet=self._failed):
                    self._sent[work] = state
                elif self._sent.get(work) != state:
                    self._failed = True

    def _send(self, work: str, share: float, words: str) -> None:
        if work in self._ids:
            update_progress_artifact(self._ids[work], progress=share, description=words)
        else:
            self._ids[work] = create_progress_artifact(share, key=slug(f"progress-{self._name}-{work}-{self._key[:8]}"), description=words)  # type: ignore[assignment]


def show_result(name: str, ref: Ref, store: Store, how: str, report: str | None = None) -> None:
    """The step's key figures, and links to its artifact and to the run's report."""
    manifest = store.artifact(ref).manifest
    rows = "\n".join(f"| {key} | {_short(value)} |" for key, value in {**manifest.figures, **manifest.notes}.items())
    place = link(store, ref)
    lines = [f"**{name}**: {how}", f"data: `{place}`", *([f"report: `{link(store, report)}/index.html`"] if report else [])]
    text = "\n\n".join(lines) + f"\n\n| figure | value |\n|---|---|\n{rows}\n"
    suffix = ref.key[:8]
    _try(lambda: create_markdown_artifact(text, key=slug(f"{name}-{suffix}"), description=name))
    _try(lambda: create_link_artifact(place, link_text=ref, key=slug(f"data-{name}-{suffix}"), description=f"{name}: its artifact"))
    if report:
        page = f"{link(store, report)}/index.html"
        _try(
            lambda: create_link_artifact(
                page, link_text="report", key=slug(f"link-report-{Ref(report).key[:8]}"), description="the run's report"
            )
        )


def link(store: Store, ref: str) -> str:
    """Where an artifact lies, as a URL."""
    place = store.objects.describe(Ref(ref))
    return place if "://" in place else Path(place).resolve().as_uri()


def slug(text: str) -> str:
    """A key that Prefect takes: lower case, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _try(send: Callable[[], Any], quiet: bool = False) -> bool:
    """Whether it arrived. What is shown is not worth a failed step."""
    try:
        send()
    except Exception as fault:
        log.log(
            logging.DEBUG if quiet else logging.WARNING,
            "the UI could not be told (%s: %.200s); the step goes on",
            type(fault).__name__,
            fault,
        )
        return False
    return True


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)[:200]
