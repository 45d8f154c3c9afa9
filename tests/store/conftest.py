"""Stores for the tests: a local folder, and a bucket of moto's S3 server in a process of its own."""

import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from pydantic import BaseModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

SERVER = """
import os, sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the tests are gone
os._exit(0)
"""


def start_server(**environment: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    yield from start_server()


@pytest.fixture(scope="session")
def strict_s3_endpoint() -> Iterator[str]:
    """A server that checks credentials."""
    yield from start_server(INITIAL_NO_AUTH_ACTION_COUNT="0")


@pytest.fixture
def s3_root(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a fresh bucket; the environment leads boto's clients to the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    # A plain request: a client would take longer to make than most tests last.
    with urlopen(Request(f"{s3_endpoint}/{bucket}", method="PUT")) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/runs/demo"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be: a test that takes this runs once on disk and once on S3."""
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGEDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Runner:
    """Starts the toy step in processes of their own, and kills them."""

    def __init__(self, folder: Path):
        self.log = folder / "log.txt"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, root: str, part: tuple[int, int] | None = None, limit_bytes: int | None = None, *, spec: BaseModel
    ) -> "subprocess.Popen[bytes]":
        def limit() -> None:
            import resource

            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        command = [sys.executable, str(HERE / "toystep.py"), root, spec.model_dump_json(), str(self.log), *map(str, part or ())]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limit
        )
        self._processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()

    def kill_often(
        self, root: str, kills: int, seed: int, before_rerun: Callable[[], None] = lambda: None, *, most: int, spec: BaseModel
    ) -> int:
        """Starts it again and again, each time killing it a random while after it has logged up to `most` lines, then lets it finish.

        Returns the kills that hit. Counting lines, not seconds, keeps the kills in the work however slow the machine is.
        """
        rng, hits = random.Random(seed), 0
        for _ in range(kills):
            begun, wanted = self._lines(), rng.randint(0, most)
            process = self.start(root, spec=spec)
            while process.poll() is None and self._lines() < begun + wanted:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            if process.poll() is not None:  # finished before
                self.finish(process)
                return hits
            process.kill()
            process.communicate()
            hits += 1
            before_rerun()
        self.finish(self.start(root, spec=spec))
        return hits

    def _lines(self) -> int:
        return self.log.read_text().count("\n") if self.log.exists() else 0

    def computed(self, what: str) -> list[int]:
        """What the processes logged, in order ("shard" or "train")."""
        lines = self.log.read_text().split("\n") if self.log.exists() else []
        return [int(line.split()[1]) for line in lines if line.startswith(what)]

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    found = Runner(tmp_path)
    yield found
    found.stop()
