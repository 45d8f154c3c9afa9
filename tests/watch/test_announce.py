"""Announcing a checkpoint harms no training: without an API, with one that is away, or one that hangs."""

import socket
import time
from types import SimpleNamespace

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.announce import AnnounceCheckpoints, announce, event_id


def test_without_an_api_nothing_happens():
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert announce("run", 1, "folder") is False


def test_an_api_that_is_away_is_no_error(caplog):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert announce("run", 1, "folder") is False
    assert "could not be announced" in caplog.text


def test_an_api_that_hangs_costs_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{silent.getsockname()[1]}/api"}):
            begin = time.monotonic()
            assert announce("run", 1, "folder", seconds=0.5) is False
        assert time.monotonic() - begin < 60  # without a limit of its own it is Prefect's minute, several times


def test_nothing_it_is_given_makes_it_raise():
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert announce("run", "no number", object()) is False  # type: ignore[arg-type]


def test_the_same_checkpoint_is_the_same_event():
    assert event_id("run", 1) == event_id("run", 1)
    assert len({event_id("run", 1), event_id("run", 2), event_id("other", 1)}) == 3


@pytest.mark.parametrize("is_first", [True, False])
def test_the_trainer_announces_what_it_saved_from_its_first_process(monkeypatch, tmp_path, is_first):
    said = []
    monkeypatch.setattr("flows.announce.announce", lambda *arguments: said.append(arguments))
    callback = AnnounceCheckpoints("run", seconds=1)
    state = SimpleNamespace(is_world_process_zero=is_first, global_step=50)
    callback.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)  # type: ignore[arg-type]
    assert said == ([("run", 50, tmp_path / "checkpoint-50", 1)] if is_first else [])
