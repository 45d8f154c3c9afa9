"""`infra.server.plain`: a real Prefect server on a real PostgreSQL, and a run through it that outlives a restart of both.

Needs Debian's postgresql. STAGEDIFF_INTEGRATION=0 switches these tests off; a missing PostgreSQL is a failure, not a skip.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tiny import tiny_config

from infra.server.folder import end_leftovers
from infra.server.plain import Server, ServerError, program
from stagediff.store import Store

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("STAGEDIFF_INTEGRATION") == "0", reason="STAGEDIFF_INTEGRATION=0"),
]
PASSWORD = "lab:of-the-test"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's own: its path is too long for a socket, and closed to the user postgres."""
    try:
        program("initdb")
    except ServerError as error:
        pytest.fail(f"{error} STAGEDIFF_INTEGRATION=0 leaves these tests out.")
    with tempfile.TemporaryDirectory(prefix="pg-") as path:
        Path(path).chmod(0o711)
        yield Path(path) / "server"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def runs(url: str, auth: str | None = PASSWORD) -> list[dict]:
    """The flow runs that the server knows."""
    request = urllib.request.Request(f"{url}/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
    if auth:
        request.add_header("Authorization", "Basic " + base64.b64encode(auth.encode()).decode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def test_a_run_through_a_server_on_postgresql_outlives_a_restart(folder, finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", PASSWORD)
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "store")
    copy = Store(tmp_path / "store")
    copy.remove(plan["diff"].ref)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config("unused")))
    port = free_port()
    with Server(folder, port=port) as server:
        env = os.environ | {
            "PREFECT_API_URL": server.url,
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "PREFECT_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-c",
            "from stagediff.cli import main; main()",
            "run",
            str(tmp_path / "tiny.yaml"),
            "--store",
            copy.root,
            "--device",
            "cpu",
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        assert copy.artifact(plan["diff"].ref).manifest.data() == store.artifact(plan["diff"].ref).manifest.data()
        assert [run["state_name"] for run in runs(server.url)] == ["Completed"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            runs(server.url, auth=None)
        tables = [program("psql"), f"--host={folder / 'socket'}", "--username=prefect", "--tuples-only", "--no-align"]
        counted = subprocess.run([*tables, "--command=select count(*) from flow_run"], capture_output=True, text=True)
        assert counted.stdout.strip() == "1", "the run is in PostgreSQL"
    with Server(folder, port=port) as server:
        assert [run["state_name"] for run in runs(server.url)] == ["Completed"]


@pytest.fixture
def command(folder, monkeypatch) -> Iterator[Callable[[int], "subprocess.Popen[str]"]]:
    """Starts the command on a port; what still runs of it afterwards is ended."""
    monkeypatch.delenv("PREFECT_SERVER_API_AUTH_STRING", raising=False)
    made = []

    def start(port: int) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", "infra.server.plain", str(folder), f"--port={port}"]
        made.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]))
        return made[-1]

    yield start
    for process in made:
        process.terminate()
        try:
            process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    end_leftovers(folder, folder / "postgres")


def is_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    said = process.stdout.readline()
    assert said.startswith("ready: export PREFECT_API_URL=http://127.0.0.1:"), said + "".join(process.communicate())


def test_the_command_runs_until_it_is_told_to_stop_and_leaves_nothing(folder, command):
    process = command(free_port())
    is_ready(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 0
    assert not (folder / "postgres" / "postmaster.pid").exists()
    end = time.monotonic() + 60
    while subprocess.run([program("pg_isready"), f"--host={folder / 'socket'}", "--quiet"]).returncode == 0:
        assert time.monotonic() < end


def test_a_killed_command_is_started_again_and_a_second_one_beside_it_is_refused(folder, command):
    port = free_port()
    first = command(port)
    is_ready(first)
    known = len(runs(f"http://127.0.0.1:{port}/api", auth=None))
    first.kill()
    first.wait()
    database = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
    assert psutil.pid_exists(database), "its database goes on"
    assert len(runs(f"http://127.0.0.1:{port}/api", auth=None)) == known, "and so does its Prefect"

    again = command(port)
    is_ready(again)
    assert not psutil.pid_exists(database)
    second = command(free_port())
    assert second.wait(100) == 1
    assert "A server runs in" in second.stderr.read()
    assert len(runs(f"http://127.0.0.1:{port}/api", auth=None)) == known
    again.terminate()
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0
    assert f"ended what a killed server had left running in {folder}: prefect " in said
    assert f"postgres {database}" in said


def test_what_does_not_start_says_why(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match="prefect does not start"), Server(folder, port=taken.getsockname()[1]):
            pass
