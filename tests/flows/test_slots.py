"""GPU locks of one machine: never two holders of one GPU, and a killed holder's GPU is free."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from flows import slots
from stagediff.errors import UserError

HOLDER = """
import sys
from contextlib import ExitStack
from flows.slots import _lock
with ExitStack() as locks:
    print(*_lock(["0", "1"], 1, locks, 0.05), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(slots.tempfile, "tempdir", None)


@pytest.fixture
def holder() -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts processes that hold a GPU each; they end with the test, however it ends."""
    made: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        made.append(subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.communicate()


def gpu_of(process: subprocess.Popen) -> str:
    return process.stdout.readline().strip()


def test_holders_get_different_gpus_and_a_killed_ones_is_free(holder):
    first, second = holder(), holder()
    one, other = gpu_of(first), gpu_of(second)
    assert {one, other} == {"0", "1"}
    third = holder()
    first.send_signal(signal.SIGKILL)
    assert gpu_of(third) == one


def test_two_gpus_are_taken_together_or_not_at_all():
    with ExitStack() as held:
        assert slots._lock(["0", "1", "2"], 2, held, 0.05) == ["0", "1"]
        with ExitStack() as other:
            assert slots._lock(["0", "1", "2"], 1, other, 0.05) == ["2"]
    with ExitStack() as all_of_them:
        assert slots._lock(["0", "1", "2"], 3, all_of_them, 0.05) == ["0", "1", "2"]


def test_nothing_is_held_where_no_limit_is_set(monkeypatch):
    monkeypatch.delenv(slots.LIMIT, raising=False)
    with slots.gpu_slots(1) as devices:
        assert devices == []


def test_more_gpus_than_the_machine_has_are_refused(monkeypatch):
    class Held:
        def __enter__(self): ...
        def __exit__(self, *_): ...

    monkeypatch.setenv(slots.LIMIT, "pool-gpus")
    monkeypatch.setenv(slots.DEVICES, "0,1")
    monkeypatch.setattr(slots, "concurrency", lambda *_, **__: Held())
    with pytest.raises(UserError, match="wants 3 GPUs and this machine has 2"), slots.gpu_slots(3):
        pass
    with slots.gpu_slots(2) as devices:
        assert devices == ["0", "1"]
        assert slots.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_server_that_is_away_when_slots_are_taken_or_given_back_ends_no_step(monkeypatch, caplog):
    asked = []

    class Held:
        def __enter__(self):
            asked.append("take")
            if len(asked) == 1:
                raise slots.ConcurrencySlotAcquisitionError("Unable to acquire") from httpx.ConnectError("nobody there")

        def __exit__(self, *_):
            asked.append("give back")
            raise httpx.ReadTimeout("slow")

    monkeypatch.setenv(slots.LIMIT, "pool-gpus")
    monkeypatch.setenv(slots.DEVICES, "0")
    monkeypatch.setattr(slots, "concurrency", lambda *_, **__: Held())
    monkeypatch.setattr("flows.children.time.sleep", lambda _: None)
    with slots.gpu_slots(1) as devices:
        assert devices == ["0"]
    assert asked == ["take", "take", "give back"]
    assert "does not take the GPU slot back (ReadTimeout)" in caplog.text


def test_a_limit_that_is_not_there_is_not_waited_for(monkeypatch):
    class Held:
        def __enter__(self):
            raise slots.ConcurrencySlotAcquisitionError("must be created before acquiring slots")

    monkeypatch.setenv(slots.LIMIT, "pool-gpus")
    monkeypatch.setattr(slots, "concurrency", lambda *_, **__: Held())
    with pytest.raises(slots.ConcurrencySlotAcquisitionError, match="must be created"), slots.gpu_slots(1):
        pass


def test_a_step_without_gpus_sees_none(monkeypatch):
    monkeypatch.setenv(slots.LIMIT, "pool-gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with slots.gpu_slots(0) as devices:
        assert devices == []
        assert slots.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert slots.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
