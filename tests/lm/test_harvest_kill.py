"""What a harvest killed with SIGKILL loses: on a CPU the shard at hand and no more."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.lm import harvest, sources
from stagediff.lm.spec import HarvestSpec, HookPoint
from stagediff.store.arrays import ArrayWriter

CONTEXT, SHARD_ROWS = 12, 8

SERVER = """
import os, signal, sys
import transformers.models.gpt_neox.modeling_gpt_neox  # what every attempt needs; no torch operation may run before the fork
from stagediff import steps
from stagediff.lm import harvest
from stagediff.lm.spec import HarvestSpec
from stagediff.store import Store

store, spec = Store(sys.argv[1]), HarvestSpec.model_validate_json(sys.argv[2])
log = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
forward_shard = harvest.forward_shard

def logged(*args, **options):
    os.write(log, b".")
    return forward_shard(*args, **options)

harvest.forward_shard = logged
for order in map(str.strip, sys.stdin):
    if order == "start":
        pid = os.fork()
        if not pid:
            steps.run(spec, store, device="cpu")
            os._exit(0)
        continue
    if order == "kill":
        os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Attempts:
    """Harvests of one spec in forked processes, so that an attempt costs no start-up; each logs a dot for every shard it begins."""

    def __init__(self, store: Any, spec: HarvestSpec, folder: Path):
        self.log = folder / "log"
        self.log.touch()
        self.shards = Path(store.root) / spec.ref / "data" / "c"
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, store.root, spec.model_dump_json(), str(self.log)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def begun(self) -> int:
        """Shards begun in all attempts."""
        return self.log.stat().st_size

    def there(self) -> int:
        """Shards stored."""
        return len(list(self.shards.glob("*/0")))

    def start(self) -> None:
        self._say("start")

    def end(self, how: str) -> int:
        """Waits for the attempt ("wait"), or kills it ("kill"); returns its exit code."""
        self._say(how)
        code = int(self.process.stdout.readline())
        assert code in (0, -9), Path(self.errors.name).read_text()
        return code

    def _say(self, order: str) -> None:
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        self.errors.close()


@pytest.fixture
def spec_of(save_tiny: Any, put_rows: Any) -> Callable[[int], HarvestSpec]:
    """spec_of(shards): a harvest of so many shards."""

    def make(shards: int) -> HarvestSpec:
        rows = shards * SHARD_ROWS - 3
        tokens = put_rows(np.random.default_rng(1).integers(0, 97, (rows, CONTEXT)).astype(np.int32))
        model = sources.resolve_model(name=str(save_tiny("gpt_neox")))
        return HarvestSpec(model=model, tokens=tokens, rows=rows, hook=HookPoint(layer=2), batch_rows=4, shard_rows=SHARD_ROWS)

    return make


@pytest.fixture
def attempts_at(store: Any, tmp_path: Path) -> Iterator[Callable[[HarvestSpec], Attempts]]:
    made: list[Attempts] = []

    def make(spec: HarvestSpec) -> Attempts:
        made.append(Attempts(store, spec, tmp_path))
        return made[0]

    yield make
    for one in made:
        one.close()


def kill_often(attempts: Attempts, artifact: Any, shards: int, most: int) -> int:
    """Kills attempts a moment after they have begun a random number of shards, then lets one finish; returns the kills."""
    chance, kills = random.Random(most), 0
    while not artifact.is_complete and kills < most:
        begun, there = attempts.begun(), attempts.there()
        wanted = begun + chance.randint(1, shards // most)
        attempts.start()
        deadline = time.monotonic() + 60
        while attempts.begun() < wanted and not artifact.is_complete and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.005))
        if attempts.end("kill") == 0:  # it was done before
            continue
        assert attempts.begun() > begun or artifact.is_complete, "no shard was begun in 60 s"
        kills += 1
        lost = attempts.begun() - begun - (attempts.there() - there)
        assert lost <= 1, f"kill {kills} lost {lost} shards"
    attempts.start()
    assert attempts.end("wait") == 0
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "most"), [(150, 15), pytest.param(3000, 300, marks=pytest.mark.soak)])
def test_kills_at_random_moments_cost_one_shard_each_at_most(spec_of: Any, attempts_at: Any, store: Any, shards: int, most: int) -> None:
    spec = spec_of(shards)
    attempts, artifact = attempts_at(spec), store.artifact(spec.ref)
    attempts.start()
    assert attempts.end("wait") == 0
    undisturbed = artifact.manifest.data()
    assert attempts.begun() == shards
    store.remove(spec.ref)

    artifact = store.artifact(spec.ref)
    kills = kill_often(attempts, artifact, shards, most)
    computed = attempts.begun() - shards
    print(f"{kills} kills, {computed - shards} of {shards} shards computed twice")
    assert kills >= 5
    assert computed <= shards + kills
    assert artifact.manifest.data() == undisturbed
    assert artifact.verify() == []


def test_on_a_cpu_every_shard_is_written_before_the_next_is_computed(spec_of: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, events = spec_of(6), []

    def noted(what: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            events.append(what)
            return result

        return call

    monkeypatch.setattr(harvest, "forward_shard", noted("computed", harvest.forward_shard))
    monkeypatch.setattr(ArrayWriter, "write_shard", noted("written", ArrayWriter.write_shard))
    steps.run(spec, store, device="cpu")
    assert events == ["computed", "written"] * 6


def test_on_cuda_one_shard_is_written_while_the_next_is_computed_and_never_two() -> None:
    first, written, blocks, unfinished = threading.Event(), [], set(), []

    class Slow:
        def write_json(self, name: str, value: Any) -> None: ...

        def write_shard(self, shard: int, block: np.ndarray) -> None:
            assert first.wait(30)
            written.append(shard)

    with harvest._Writer(Slow(), Slow(), harvest.AHEAD_ON_CUDA) as writer:
        for shard in range(6):
            block = writer.block(2, 4, pinned=False)
            blocks.add(block.data_ptr())
            writer.put(shard, block, torch.ones(2))
            unfinished.append(shard + 1 - len(written))
            first.set()
    assert unfinished[0] == 1
    assert max(unfinished) == 1
    assert written == list(range(6))
    assert len(blocks) == 2
