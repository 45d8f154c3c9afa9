"""One Prefect server, with everything deployed and a worker, for all tests here that need one."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_prefect import ROOT, Server, Worker, local_prefect, until
from one_host_slurm import whole_cluster
from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.plan import Plan
from stagediff.store import Store

SECRET = "planted-4f1c9b7e-secret"
"""In the environment of server and worker, as an S3 key would be. It must show up nowhere else."""


@dataclass
class Case:
    """A copy of a finished run, some of it taken away."""

    store: Store
    plan: Plan
    config: dict[str, Any]
    whole: Store
    """The undisturbed run."""

    def is_as_the_whole(self) -> bool:
        """Whether every artifact is there, with the bytes of the undisturbed run."""
        data = lambda store, node: store.artifact(node.ref).manifest.data()  # noqa: E731
        return not self.plan.missing(self.store) and all(data(self.store, node) == data(self.whole, node) for node in self.plan)


@dataclass
class Deployed:
    """The server with all deployments, whose steps are those of `tests/observed_steps.py`, and its worker."""

    server: Server
    worker: Worker
    folder: Path
    whole: Store
    plan: Plan
    watched: dict[str, str]
    """The worker's environment beside the server's."""
    secret: str = SECRET

    def restart_worker(self) -> None:
        self.worker = self.server.worker(**self.watched)
        self.server.wait_for_worker(self.worker)

    def processes_of(self, runs: Sequence[str]) -> list[int]:
        """The processes that compute these flow runs now."""
        return [pid for run in runs for pid in self.server.processes(f"PREFECT__FLOW_RUN_ID={run}")]

    def case(self, name: str, *without: str) -> Case:
        root = self.folder / "stores" / name
        shutil.copytree(self.whole.root, root)
        store = Store(root)
        config = tiny_config(str(root))
        plan = make_plan(parse_config(config), store)
        for step in without:
            store.remove(plan[step].ref)
        return Case(store, plan, config, self.whole)

    def start(self, case: Case, **parameters: Any) -> str:
        return self.server.run("stagewise/stagediff", config=case.config, device="cpu", **parameters)

    def fault(self, step: str) -> Path:
        """While the file is there, the step fails."""
        file = self.folder / "faults" / step
        file.touch()
        return file

    def hold(self, step: str) -> Path:
        """While the file is there, the step waits before it computes."""
        file = self.folder / "hold" / step
        file.touch()
        return file

    def events(self, case: Case) -> list[dict[str, Any]]:
        log = self.folder / "computed.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line["store"] == case.store.root]

    def begun(self, case: Case) -> list[str]:
        """The steps whose computation began, in order."""
        return [e["name"] for e in self.events(case) if e["event"] == "begin"]

    def done(self, case: Case) -> Counter[str]:
        """How often each step was computed to its end."""
        return self.noted(case, "done")

    def noted(self, case: Case, event: str) -> Counter[str]:
        """How many such events each step of a case had."""
        return Counter(e["name"] for e in self.events(case) if e["event"] == event)


@pytest.fixture(scope="session")
def deployed(tmp_path_factory, finished_run) -> Iterator[Deployed]:
    plan, whole = finished_run
    folder = tmp_path_factory.mktemp("deployed")
    for name in ("faults", "hold", "stores"):
        (folder / name).mkdir()
    secrets = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET}
    watched = {
        "OBSERVED_LOG": str(folder / "computed.jsonl"),
        "OBSERVED_FAULTS": str(folder / "faults"),
        "OBSERVED_HOLD": str(folder / "hold"),
        "STAGEDIFF_GPU_DEVICES": "0,1",
    }
    with local_prefect(folder / "prefect", **secrets) as server:
        server.environment["OBSERVED_STEPS"] = ",".join(sorted({node.spec.step for node in plan}))
        deploy(server, "--gpus", "2", program=["tests/observed_steps.py"])
        made = Deployed(server, server.worker(**watched), folder, whole, plan, watched)
        try:
            server.wait_for_worker(made.worker)
            yield made
        finally:
            made.worker.end()


@pytest.fixture(scope="session")
def lab(deployed, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The pool `lab`, of type slurm, with its worker, beside the process pool on which pipelines run."""
    with whole_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        server, folder = deployed.server, deployed.folder
        options = ["--pool=stagediff", "--pool=lab=slurm", "--gpus=lab=1", f"--variable=lab:python={sys.executable}"]
        options += [f"--variable=lab:working_dir={ROOT}", "--variable=lab:cpus=1", "--variable=lab:memory=1G"]
        deploy(server, *options, program=["tests/observed_steps.py"])
        watched = {"OBSERVED_LOG": folder / "computed.jsonl", "OBSERVED_FAULTS": folder / "faults", "OBSERVED_HOLD": folder / "hold"}
        logs = cluster.folder / "jobs"
        extra = {
            **cluster.env,
            "STAGEDIFF_SLURM_LOGS": str(logs),
            **{name: str(path) for name, path in watched.items()},
        }
        worker = server.worker("lab", **extra)
        try:
            until(lambda: server.ask("/work_pools/lab/workers/filter"), f"the worker is up, see {worker.log}")
            yield SimpleNamespace(cluster=cluster, worker=worker, logs=logs)
        finally:
            worker.end()


@pytest.fixture(autouse=True)
def nothing_is_held_back(request) -> Iterator[None]:
    """A step that a failed test has left waiting or failing goes on, and takes no place from the next test's."""
    deployed = request.getfixturevalue("deployed") if "deployed" in request.fixturenames else None
    yield
    if deployed is not None:
        for file in (*(deployed.folder / "hold").iterdir(), *(deployed.folder / "faults").iterdir()):
            file.unlink(missing_ok=True)


def deploy(server: Server, *options: str, program: Sequence[str] = ("-m", "flows.deploy")) -> str:
    """`make deploy` without make: what it prints."""
    done = subprocess.run([sys.executable, *program, *options], env=server.environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
