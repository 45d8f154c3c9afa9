"""A Prefect server and workers of a test's own: real processes on a free loopback port, with their own home, ended by their process ids."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch

__all__ = ["Server", "Worker", "local_prefect", "until"]

ROOT = Path(__file__).parents[1]
PREFECT = str(Path(sys.executable).with_name("prefect"))


def until(question: Callable[[], Any], what: str, seconds: float = 600.0, every: float = 0.5) -> Any:
    """Waits until the question is answered with something true, and returns it; fails after `seconds`, which a slow machine does not reach."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := question():
            return answer
        time.sleep(every)
    raise AssertionError(f"after {seconds:.0f} s still not: {what}")


class _Process:
    """A process group with its output in a file."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path):
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(command, env=dict(environment), cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, sign: signal.Signals = signal.SIGTERM, wait: float = 30.0) -> None:
        """Ends the whole group; kills what does not go."""
        for chosen in (sign, signal.SIGKILL):
            try:
                os.killpg(self.pid, chosen)
            except ProcessLookupError:
                break
            try:
                self.process.wait(wait)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait(wait)


class Worker(_Process):
    """A process worker. What it starts belongs to its process group."""

    def __init__(self, pool: str, environment: Mapping[str, str], log: Path):
        super().__init__([PREFECT, "worker", "start", "--pool", pool, "--name", f"{pool}-{log.stem}"], environment, log)


class Server:
    """The server and its address. `client` asks its API; `environment` is for everything that is to use it."""

    def __init__(self, home: Path, extra: Mapping[str, str]):
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_CLIENT_MAX_RETRIES": "10",  # the worker's too: infra/README.md
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as in the runs that bytes are compared with
            **extra,
        }
        self.client = httpx.Client(base_url=f"{self.url}/api", timeout=60)
        self._process: _Process | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "infra.server.sqlite", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = _Process(command, self.environment, self.home / "server.log")
        until(self._is_up, f"server up, see {self.home}/server.log", seconds=240)

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.end(sign)
            self._process = None

    def processes(self, *words: str) -> list[int]:
        """The processes that were started with this server's home in their environment, and with each of these words ("NAME=value")."""
        wanted = {f"PREFECT_HOME={self.home}", *words}
        out = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            except OSError:  # gone, or not ours
                continue
            if wanted <= environment:
                out.append(int(folder.name))
        return out

    def worker(self, pool: str = "stagediff", **extra: str) -> Worker:
        """A worker; it is up once the pool shows it (`wait_for_worker`)."""
        log = self.home / f"worker-{time.monotonic_ns()}.log"
        return Worker(pool, {**self.environment, **extra}, log)

    def wait_for_worker(self, worker: Worker, pool: str = "stagediff") -> None:
        name = f"{pool}-{worker.log.stem}"
        until(lambda: any(w["name"] == name for w in self.ask(f"/work_pools/{pool}/workers/filter")), f"worker up, see {worker.log}", 120)

    # The API, as the UI uses it

    def request(self, method: str, path: str, **given: Any) -> Any:
        """The answer's JSON; asked again while the server says that its database is busy, and what only reads also where it is slow."""
        reads = method == "GET" or path.endswith("/filter")

        def answer() -> httpx.Response | None:
            try:
                response = self.client.request(method, path, **given)
            except httpx.ReadTimeout:
                if reads:
                    return None
                raise
            return None if response.status_code == 503 else response

        response = until(answer, f"{method} {path} is answered", 120)
        response.raise_for_status()
        return response.json() if response.content else None

    def ask(self, path: str, **body: Any) -> Any:
        return self.request("POST", path, json=body)

    def run(self, deployment: str, **parameters: Any) -> str:
        """Starts a deployment as the UI's form does; returns the flow run's id."""
        found = self.request("GET", f"/deployments/name/{deployment}")
        return self.ask(f"/deployments/{found['id']}/create_flow_run", parameters=parameters, state={"type": "SCHEDULED"})["id"]

    def flow_run(self, run: str) -> dict[str, Any]:
        return self.request("GET", f"/flow_runs/{run}")

    def children(self, run: str) -> list[dict[str, Any]]:
        return self.ask("/flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run]}}, sort="START_TIME_ASC")

    def wait(self, run: str, state: str = "COMPLETED", runs: int = 1, seconds: float = 600.0) -> dict[str, Any]:
        """Waits until the run has ended, in at least its `runs`-th start, in this state."""

        def ended() -> dict[str, Any] | None:
            now = self.flow_run(run)
            is_over = now["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and now["run_count"] >= runs
            return now if is_over else None

        last = until(ended, f"{run} ended (start {runs})", seconds)
        assert last["state_type"] == state, f"{last['name']}: {last['state']['type']}: {last['state']['message']}\n{self.log(run)}"
        return last

    def log(self, run: str) -> str:
        lines = self.ask("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC", limit=200)
        return "\n".join(line["message"] for line in lines)

    def _is_up(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            assert self._process is None or self._process.process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            return False


@contextmanager
def local_prefect(home: Path, **extra: str) -> Iterator[Server]:
    """A running server; stopped at the end."""
    home.mkdir(parents=True, exist_ok=True)
    server = Server(home, extra)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        server.client.close()
        for pid in server.processes():  # runs that a killed worker left behind
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
