"""One server per folder, what a killed one left running, and who may reach it; with stand-ins for PostgreSQL and Prefect.

`tests/integration/test_server.py` kills a real one.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.server.folder import MARK, ServerError, end_leftovers, lock
from infra.server.plain import Server, is_loopback, main


def heed_interrupts() -> None:
    """Undoes what a shell does to the programs that it starts in the background: PostgreSQL heeds SIGINT anyway, a shell that stands in for it would not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts a shell that waits for its end, under the name and with the arguments and environment given."""
    made: list[subprocess.Popen] = []

    def shell(*line: str, code: str = "read -r word", **env: str) -> subprocess.Popen:
        command = [line[0], "-c", f"{code}; true", *line[1:]]
        made.append(
            subprocess.Popen(
                command,
                executable="/bin/bash",
                env=os.environ | env,
                stdin=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=heed_interrupts,
            )
        )
        return made[-1]

    yield shell
    for process in made:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture
def sent(monkeypatch) -> list[tuple[int, int]]:
    """Every signal sent: process id and number. (Whoever waits for a process takes its exit code, which would tell too.)"""
    made: list[tuple[int, int]] = []
    send = psutil.Process.send_signal
    monkeypatch.setattr(psutil.Process, "send_signal", lambda self, number: (made.append((self.pid, number)), send(self, number)))
    monkeypatch.setattr(psutil.Process, "kill", lambda self: self.send_signal(signal.SIGKILL))
    return made


def test_what_a_killed_server_left_is_ended_and_nothing_else(start, sent, tmp_path):
    folder, other = tmp_path / "server", tmp_path / "other"
    (tmp_path / "link").symlink_to(folder)
    ours = {
        "postgres": start("/usr/lib/postgresql/bin/postgres", "-D", str(folder / "postgres")),
        "prefect": start("python", **{MARK: str(folder)}),
        "prefect by another path": start("python", **{MARK: str(tmp_path / "link")}),
    }
    others = [
        start("postgres", "-D", str(other / "postgres")),
        start("psql", "-D", str(folder / "postgres")),
        start("python", **{MARK: str(other)}),
        start("python", "-D", str(folder / "postgres")),
    ]
    wait_for_bash(*ours.values(), *others)
    ended = end_leftovers(folder, folder / "postgres", grace=30)
    assert sorted(ended) == sorted(f"{name.split()[0]} {process.pid}" for name, process in ours.items())
    assert sorted(sent) == sorted((process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM) for name, process in ours.items())
    assert all(process.poll() is not None for process in ours.values())
    assert [process.poll() for process in others] == [None] * len(others)
    assert end_leftovers(folder, folder / "postgres", grace=30) == []


def test_what_does_not_end_when_asked_is_killed(start, sent, tmp_path):
    deaf = start("python", code="trap '' TERM; touch $READY; read -r word", READY=str(tmp_path / "ready"), **{MARK: str(tmp_path)})
    wait_for((tmp_path / "ready").exists)
    end_leftovers(tmp_path, tmp_path / "postgres", grace=0.3)
    assert sent == [(deaf.pid, signal.SIGTERM), (deaf.pid, signal.SIGKILL)]
    assert deaf.poll() is not None


def test_a_pid_file_whose_number_is_another_process_by_now_is_taken_away_and_no_other(start, tmp_path):
    folder, data = tmp_path, tmp_path / "postgres"
    data.mkdir()
    (folder / "socket").mkdir()
    files = [data / "postmaster.pid", folder / "socket" / ".s.PGSQL.5432.lock"]
    stranger = start("sleeper").pid
    gone = subprocess.Popen(["true"])
    gone.wait()
    now = int(time.time())
    for number, began, stays in ((stranger, now - 3600, False), (stranger, now, True), (gone.pid, now - 3600, True)):
        for file in files:
            file.write_text(f"{number}\n{data}\n{began}\n5432\n")
        end_leftovers(folder, data)
        assert [file.exists() for file in files] == [stays, stays]


def test_a_folder_has_one_server_at_a_time_and_a_killed_ones_is_free(tmp_path):
    code = "import sys; from pathlib import Path; from infra.server.folder import lock; held = lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(ServerError, match=rf"A server runs in .* already \(process {holder.pid}\).*stop it first"):
            lock(tmp_path)
        with pytest.raises(ServerError, match="already"), Server(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    for _ in range(2):
        lock(tmp_path).close()


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                                                ("::", False), ("192.0.2.7", False), ("", False), ("n" * 70, False)])  # fmt: skip
def test_what_only_this_machine_reaches(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("password", [None, "", " ", ":"])
def test_an_open_api_without_a_password_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, password):
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    if password is not None:
        monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", password)
    assert main([str(tmp_path / "server"), "--host=0.0.0.0"]) == 1
    said = capsys.readouterr().err
    assert "--host 0.0.0.0 opens the API" in said
    assert "export PREFECT_SERVER_API_AUTH_STRING=" in said
    assert not (tmp_path / "server").exists()
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "lab:secret")
    Server(tmp_path / "server", host="0.0.0.0")


def wait_for_bash(*processes: subprocess.Popen) -> None:
    """Until each has become what it is to be: between fork and exec it is still this one."""
    wait_for(lambda: all(Path(f"/proc/{process.pid}/exe").resolve().name == "bash" for process in processes))


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
