"""Asks about one feature after the other, some at a time, and keeps every answer as it comes: what was answered is never asked again."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from stagediff.errors import DamagedError
from stagediff.evidence.labels.labeller import Answer, Labeller, Question

if TYPE_CHECKING:
    from stagediff.store import Writer

__all__ = ["Kept", "ask_all"]

log = logging.getLogger("stagediff")

FOLDER = "answers"


class Kept:
    """Answers in the artifact: `answers/<feature>.json`, one file each."""

    def __init__(self, writer: "Writer"):
        self._writer = writer
        writer.training.latest()  # waits for another process that labels the same: nothing is to be asked by both
        self._known = {name for name in writer.receipts(FOLDER) if writer.has(f"{FOLDER}/{name}")}

    def get(self, feature: int) -> Answer | None:
        """The answer of an earlier run, if it is whole."""
        name = _name(feature)
        if name not in self._known:
            return None
        try:
            return Answer.from_json(json.loads(self._writer.read_bytes(f"{FOLDER}/{name}")))
        except (DamagedError, ValueError, TypeError, KeyError):
            log.warning("the answer about one feature (%s) is damaged; it is asked for again", name)
            return None

    def put(self, feature: int, answer: Answer) -> None:
        self._writer.write_json(f"{FOLDER}/{_name(feature)}", answer.as_json())


def ask_all(
    labeller: Labeller, features: Sequence[int], question: Callable[[int], Question], keep: Callable[[int, Answer], None]
) -> Iterator[tuple[int, Answer]]:
    """Yields (feature, answer) as they come. Questions are put in the order given, `labeller.at_once` on their way at a time.

    Where one fails, no further one is put; those on their way are waited for and kept, then the error is raised.
    """
    if labeller.at_once == 1:
        for feature in features:
            answer = labeller.label(question(feature))
            keep(feature, answer)
            yield feature, answer
        return
    waiting, going, failed = iter(features), dict[Future[Answer], int](), None
    with ThreadPoolExecutor(labeller.at_once, "labeller") as pool:
        while True:
            while failed is None and len(going) < labeller.at_once and (following := next(waiting, None)) is not None:
                going[pool.submit(labeller.label, question(following))] = following
            if not going:
                break
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                feature = going.pop(done)
                if (error := done.exception()) is not None:
                    failed = failed or error
                    continue
                keep(feature, done.result())
                yield feature, done.result()
    if failed is not None:
        raise failed


def _name(feature: int) -> str:
    return f"{feature:07d}.json"
