"""The command in this process, for tests of what it refuses and in which words."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.testing import CliRunner

from stagediff.cli import app

__all__ = ["refused", "stagediff"]


@contextmanager
def _own_log() -> Iterator[None]:
    """The command's log handler writes to a stream that ends with the call."""
    logger = logging.getLogger("stagediff")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers = []
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


def stagediff(*arguments: Any) -> Any:
    """Result of `stagediff --quiet <arguments>`: exit_code, stdout, stderr."""
    with _own_log():
        return CliRunner().invoke(app, ["--quiet", *map(str, arguments)])


def refused(result: Any, words: str, code: int = 2) -> str:
    """The error, after a check that it is one paragraph without a traceback, with these words (a regular expression) and this exit code."""
    assert isinstance(result.exception, SystemExit), result.exception
    paragraph = result.stderr.strip()
    assert result.exit_code == code, paragraph
    assert paragraph.startswith("Error: ")
    assert "\n" not in paragraph
    assert "Traceback" not in result.stdout + paragraph
    assert re.search(words, paragraph), paragraph
    return paragraph
