"""Progress for the UI: the latest state is sent, rarely, and a server that is away neither fails nor holds up a step."""

import threading
import time

import pytest

from stagediff.progress import Progress
from tasks import display


@pytest.fixture
def sent(monkeypatch):
    """What would have reached the UI."""
    calls = []
    monkeypatch.setattr(
        display, "create_progress_artifact", lambda share, key, description: calls.append((share, key, description)) or len(calls)
    )
    monkeypatch.setattr(display, "update_progress_artifact", lambda id, progress, description: calls.append((progress, id, description)))
    return calls


def work(reporter, steps=100, pause=0.0):
    with reporter, Progress(interactive=False, listener=reporter).task("train", 1000, "tokens") as task:
        for _ in range(steps):
            task.advance(1000 / steps, note="loss 1.2")
            time.sleep(pause)


def test_the_last_state_arrives_with_its_rate(sent):
    work(display.Reporter("finetune-D", "3f2ab77c00", every=60))
    ((share, key, words),) = sent
    assert share == 100
    assert key == "progress-finetune-d-train-3f2ab77c"
    assert "100 % of 1,000 tokens" in words
    assert "tokens/s loss 1.2" in words


def test_a_hundred_advances_are_few_messages(sent):
    work(display.Reporter("finetune-D", "3f2ab77c00", every=0.2), pause=0.01)
    shares = [share for share, *_ in sent]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert 2 <= len(sent) < 50


def test_a_server_that_refuses_does_not_fail_the_step_and_is_told_once(monkeypatch, caplog):
    def refuse(*_, **__):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(display, "create_progress_artifact", refuse)
    work(display.Reporter("finetune-D", "3f2ab77c00", every=0.05), pause=0.01)
    assert [r.getMessage() for r in caplog.records if "nobody there" in r.getMessage() and r.levelname == "WARNING"].__len__() == 1


def test_a_server_that_never_answers_does_not_hold_up_the_step(monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(display, "PATIENCE", 0.2)
    monkeypatch.setattr(display, "create_progress_artifact", lambda *_, **__: silent.wait())
    work(display.Reporter("finetune-D", "3f2ab77c00", every=0.01))  # returns
    silent.set()
