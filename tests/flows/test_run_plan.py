"""What the terminal shows of Prefect's log when a step fails: the command prints the error itself, once."""

import logging

import pytest

from flows.run import _is_news


@pytest.mark.parametrize(
    ("name", "level", "text", "shown"),
    [
        ("prefect.flow_runs", logging.INFO, "View at http://localhost:4200/runs/flow-run/1", True),
        ("prefect.flow_runs", logging.INFO, "Finished in state Completed()", True),
        ("prefect.flow_runs", logging.INFO, "Finished in state Failed('Flow run encountered an exception: UserError: no')", False),
        ("prefect.flow_runs", logging.ERROR, "Encountered exception during execution: UserError('no')", False),
        ("prefect.task_runs", logging.ERROR, "Finished in state Failed('Task run encountered an exception')", False),
        ("prefect.task_runs", logging.WARNING, "will be retried", True),
        ("prefect.server", logging.ERROR, "the server failed", True),
    ],
)
def test_a_failed_run_is_told_once(name, level, text, shown):
    record = logging.LogRecord(name, level, "engine.py", 1, text, None, None)
    assert _is_news(record) is shown
