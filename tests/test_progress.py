"""Bars of steps that run side by side, on the one terminal there is."""

import pytest

from stagediff.progress import Progress, _screen


def test_bars_stay_open_as_long_as_one_step_runs():
    one, other = Progress(interactive=True), Progress(interactive=True)
    with one.shown():
        with other.shown(), other.task("second", 10) as second:
            second.advance(3)
            bars = _screen.bars
            assert [task.completed for task in bars.tasks] == [3]
        assert _screen.bars is bars
        with one.task("first", 10) as first:
            first.advance(7)
            assert [task.description for task in bars.tasks] == ["first"]
    assert _screen.bars is None


def test_one_progress_may_show_steps_that_overlap():
    """As `lanes.execute_plan` hands the same one to every step: the first to end does not take the others' bars away."""
    progress = Progress(interactive=True)
    first, second = progress.shown(), progress.shown()
    first.__enter__()
    second.__enter__()
    with progress.task("second", 10) as task:
        first.__exit__(None, None, None)
        task.advance(4)
        assert [t.completed for t in _screen.bars.tasks] == [4]
    second.__exit__(None, None, None)
    assert _screen.bars is None


def test_a_step_that_fails_leaves_no_bars():
    progress = Progress(interactive=True)
    with pytest.raises(OSError, match="full"), progress.step("train"), progress.task("train", 10):
        raise OSError("disk full")
    assert _screen.bars is None
    with progress.step("again"), progress.task("again", 2):
        assert [t.description for t in _screen.bars.tasks] == ["again"]


def test_without_a_terminal_there_are_none():
    progress = Progress(interactive=False)
    with progress.shown(), progress.task("train", 10) as task:
        task.advance(1)
        assert _screen.bars is None
