"""A whole run, started as a user starts it (the command, through Prefect), killed with SIGKILL again and again, and started again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import tiny_config

from stagediff.config import load_config, make_plan
from stagediff.plan import Plan
from stagediff.spec import Ref
from stagediff.store import Store

COMMAND = "from stagediff.cli import main; main()"
MINUTES = 10


def start(config: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a process group of its own: Prefect's temporary server dies with it. One thread, so that both stores are of one numerics class."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "run", str(config), "--store", str(store), "--device", "cpu", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def complete(plan: Plan, store: Store) -> dict[Ref, str]:
    """What is done, and when it was made."""
    return {n.ref: store.artifact(n.ref).manifest.created for n in plan if store.artifact(n.ref).is_complete}


def run_with_kills(config: Path, where: Path, kills: int, seed: int) -> tuple[Plan, Store]:
    """Kills at random moments spread over the run; asserts that nothing that was complete is ever computed again."""
    chance, store = random.Random(seed), Store(where)
    plan = make_plan(load_config(config), store)
    done: dict[Ref, str] = {}
    for kill in range(kills):
        process = start(config, where)
        # each kill falls into its own part of the run, some time after a step of it was finished
        target, deadline = int((kill + chance.random()) * len(plan.nodes) / (kills + 1)), time.monotonic() + 60 * MINUTES
        while process.poll() is None and len(complete(plan, store)) <= target and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        now = complete(plan, store)
        assert {ref: now.get(ref) for ref in done} == done, "a finished artifact was touched"
        done = now
    assert len(done) < len(plan.nodes), "the kills came too late: the run was over"
    process = start(config, where)
    output, _ = process.communicate(timeout=60 * MINUTES)
    assert process.returncode == 0, output
    now = complete(plan, store)
    assert {ref: now[ref] for ref in done} == done
    return plan, store


def compare(config: Path, tmp_path: Path, kills: int, seed: int) -> None:
    undisturbed = tmp_path / "undisturbed"
    if not undisturbed.exists():
        process = start(config, undisturbed, "--runner", "plain")
        output, _ = process.communicate(timeout=60 * MINUTES)
        assert process.returncode == 0, output
    plan, killed = run_with_kills(config, tmp_path / f"killed-{seed}", kills, seed)
    assert plan.missing(killed) == []
    for node in plan:
        artifact = killed.artifact(node.ref)
        assert artifact.manifest.data() == Store(undisturbed).artifact(node.ref).manifest.data(), node.name
        assert artifact.verify() == []


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config("unused")))
    return path


@pytest.mark.integration
def test_a_run_that_is_killed_and_started_again_gives_the_bytes_of_an_undisturbed_one(config, tmp_path):
    compare(config, tmp_path, kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_kills(config, tmp_path, seed):
    compare(config, tmp_path, kills=8, seed=seed)
