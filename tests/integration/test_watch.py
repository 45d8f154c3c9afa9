"""A training run in one process, a Prefect server, a worker and a watch beside it, each of them killed once: every checkpoint is tracked once, in order.

The training dies in the middle of saving a checkpoint and is started again from the one before; the server is killed while a pipeline runs and started
again on its old database; the pipeline's process is killed. What counts is what the store has in the end: one commit per artifact, by one
writer unless that one was killed, in the order of the steps, and the report on the whole chain.
"""

import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_prefect import Server, local_prefect, until
from watch.runs import tiny_watch

from stagediff.config import load_config
from stagediff.store import State, Store
from stagediff.watch.watcher import Due, Watcher

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
RUN = "training"


class Training:
    """The training process: started, gone on with, checked."""

    def __init__(self, folder: Path, server: Server):
        self.folder, self.server, self.log = folder, server, folder / "training.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, last: int, torn: int = 0) -> None:
        command = [sys.executable, str(ROOT / "tests/watch/training_run.py"), str(self.folder / "lm"), RUN, str(last)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder / "gate"), str(torn)], stdout=log, stderr=log, env=self.server.environment, cwd=ROOT
            )

    def has_saved(self, step: int) -> bool:
        return (self.folder / f"lm/checkpoint-{step}/trainer_state.json").exists()

    def go_on(self, step: int) -> None:
        (self.folder / f"gate-{step}").touch()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(300)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Commits:
    """Every manifest as it was first seen; a second commit of the same artifact would change it."""

    def __init__(self, store: Path):
        self._store = store
        self.bodies: dict[str, bytes] = {}

    def look(self) -> None:
        for file in self._store.glob("[a-z]*/*/manifest.json"):
            body = file.read_bytes()
            known = self.bodies.setdefault(str(file.parent.relative_to(self._store)), body)
            assert body == known, f"{file} was committed twice"


def command(server: Server, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=server.environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pipelines(server: Server) -> list[dict[str, Any]]:
    """The pipeline's runs, oldest first."""
    found = server.ask("/flow_runs/filter", flow_runs={"tags": {"all_": [f"watch:{RUN}"]}})
    return sorted(found, key=lambda run: run["created"])


def running(server: Server, *steps: int) -> str | None:
    """The pipeline's run for these checkpoints, once it computes."""
    runs = [run for run in pipelines(server) if tuple(run["parameters"]["config"]["checkpoints"]["steps"]) == steps]
    return runs[0]["id"] if runs and runs[0]["state_type"] == "RUNNING" else None


def on_one_machine(server: Server) -> None:
    """The pipeline's steps all in one process, which a kill ends all at once; and no watch but the one under test."""

    def deployment(name: str) -> str:
        return f"/deployments/{server.client.get(f'/deployments/name/{name}').raise_for_status().json()['id']}"

    server.client.patch(deployment("sae-track/stagediff"), json={"parameters": {"mode": "inline"}}).raise_for_status()
    server.client.delete(deployment("watch/stagediff")).raise_for_status()


def kill_run(run: str) -> None:
    """SIGKILL to the process of a flow run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_it = f"PREFECT__FLOW_RUN_ID={run}".encode() in (process / "environ").read_bytes().split(b"\0")
            if is_it and b"prefect.engine" in (process / "cmdline").read_bytes():
                return os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # gone, or another user's
            continue
    raise AssertionError("the pipeline's process was not found")


def chain_of(config: Path, store: Store) -> Due | None:
    """The run of everything that was taken so far, done or not."""
    watcher = Watcher(load_config(config), store)
    return next(iter(watcher.runs(watcher.look())), None)


def is_done(config: Path, store: Store, *steps: int) -> bool:
    """Whether the chain of these checkpoints is complete, its report included."""
    chain = chain_of(config, store)
    return chain is not None and tuple(chain.config["checkpoints"]["steps"]) == steps and not chain.missing


def seconds_to_look(server: Server) -> list[float]:
    """From each announced checkpoint to the scheduled run of the watch that its event triggered."""
    events = {e["id"]: e["occurred"] for e in server.ask("/events/filter", filter={"event": {"name": ["checkpoint.created"]}})["events"]}
    looks = server.ask("/flow_runs/filter", flows={"name": {"any_": ["watch"]}}, limit=200)
    return [
        (datetime.fromisoformat(run["created"]) - datetime.fromisoformat(events[run["parameters"]["event"]])).total_seconds()
        for run in looks
        if run["parameters"].get("event") in events
    ]


@pytest.mark.slow
def test_every_checkpoint_of_a_training_run_is_tracked_once_whatever_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("STAGEDIFF_CACHE", str(tmp_path / "cache"))
    body = tiny_watch(tmp_path, name=RUN, watch={"source": str(tmp_path / "lm"), "every": 20})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(body))
    store, commits = Store(tmp_path / "store"), Commits(tmp_path / "store")
    with local_prefect(tmp_path / "prefect", STAGEDIFF_CACHE=str(tmp_path / "cache")) as server:
        training = Training(tmp_path, server)
        command(server, "-m", "flows.deploy", "--pool", "stagediff=process")
        on_one_machine(server)
        worker = server.worker()
        try:
            server.wait_for_worker(worker)
            print(command(server, "-c", "from stagediff.cli import main; main()", "watch", str(config), "--deploy", "stagediff"))

            training.start(last=40, torn=30)
            until(lambda: training.has_saved(10), f"the first checkpoint, see {training.log}")
            training.go_on(10)
            until(lambda: training.has_saved(20), "the second checkpoint")
            # a pipeline for two checkpoints begins; the server goes away in the middle of it
            until(lambda: store.refs("activations"), "a pipeline that computes", seconds=900)
            server.stop(signal.SIGKILL)
            training.go_on(20)
            assert training.wait() == -signal.SIGKILL  # it has died in mid-save
            assert (tmp_path / "lm/checkpoint-30/config.json").exists()
            server.start()
            until(lambda: is_done(config, store, 10, 20), "the chain of two; half a checkpoint is none", seconds=900, every=2)
            (first,) = pipelines(server)
            server.wait(first["id"])
            commits.look()

            # the training goes on from the last whole one
            training.start(last=40)
            for step in (30, 40):
                until(lambda step=step: training.has_saved(step), f"checkpoint {step}, see {training.log}")
                training.go_on(step)
            assert training.wait() == 0

            # the pipeline that takes the last one dies, and is started again in its place
            last = until(lambda: running(server, 10, 20, 30, 40), "a pipeline for all four", seconds=900, every=0.1)
            kill_run(last)
            until(lambda: is_done(config, store, 10, 20, 30, 40), "the chain of four", seconds=900, every=2)
            for run in pipelines(server):
                server.wait(run["id"])
            assert server.flow_run(last)["run_count"] == 2
            commits.look()
            print(f"from an announced checkpoint to a scheduled look: {[f'{s:.1f} s' for s in seconds_to_look(server)]}")
        finally:
            training.stop()
            worker.end()

    chain = chain_of(config, store)
    assert chain is not None
    made = [store.artifact(chain.plan[name].ref).manifest for name in ("train-step10", "follow-step20", "follow-step30", "follow-step40")]
    times = [datetime.fromisoformat(manifest.created) for manifest in made]
    assert times == sorted(times)
    dictionaries = sorted(store.artifact(ref).manifest.step for ref in store.refs("dictionaries"))
    assert dictionaries == ["finetune"] * 4 + ["train"]  # one from scratch, three that follow, one null: nothing was made a second time
    assert {store.artifact(ref).state for ref in store.refs()} == {State.COMPLETE}
    assert not (tmp_path / "store/_quarantine").exists()
    assert sum(len(store.artifact(node.ref).manifest.writers) - 1 for node in chain.plan) <= 1  # what the killed pipeline was at
    assert store.artifact(chain.plan["report"].ref).local("index.html").is_file()
