"""A training process killed with SIGKILL at random moments, run again until it is done: the bytes of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stagediff import steps
from stagediff.sae.spec import Budget, DictionaryConfig, TrainSpec
from stagediff.store import Store

PROCESS = """
import sys, torch
torch.set_num_threads(1)
from stagediff import steps
from stagediff.progress import Progress
from stagediff.sae.spec import TrainSpec
from stagediff.store import Store
steps.run(TrainSpec.model_validate_json(sys.argv[1]), Store(sys.argv[2]), device="cpu", progress=Progress(interactive=False))
"""
KILLS = 2


def checkpoints(root: Path, spec: TrainSpec) -> set[str]:
    return {p.name for p in (root / spec.ref).rglob("*.safetensors") if "training" in p.parts}


def files(store: Store, spec: TrainSpec) -> dict[str, tuple[int, str]]:
    return {f.path: (f.bytes, f.crc32c) for f in store.artifact(spec.ref).manifest.files if f.path != "spec.json"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu"])
def test_a_killed_training_that_is_run_again_gives_the_same_bytes(architecture, tmp_path, stored, planted, quiet):
    x, _ = planted(4096, 16, 24)
    paths = tmp_path / "a", tmp_path / "b"
    undisturbed, killed = (Store(str(path)) for path in paths)
    data = stored(undisturbed, x)
    stored(killed, x)
    auxk = 8 if "topk" in architecture else 0
    dictionary = DictionaryConfig(architecture=architecture, features=48, k=4, auxk=auxk, dead_after=512)
    spec = TrainSpec(data=data, budget=Budget(tokens=32 * 1500, batch=32, lr=1e-3), dictionary=dictionary, checkpoint_tokens=32 * 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed ones: the number of threads belongs to the numerics class
    steps.run(spec, undisturbed, device="cpu", progress=quiet)
    torch.set_num_threads(threads)

    chance, kills = random.Random(architecture), 0
    while not killed.artifact(spec.ref).is_complete:
        before = checkpoints(paths[1], spec)
        process = start(spec, paths[1])
        while process.poll() is None and checkpoints(paths[1], spec) <= before:
            time.sleep(0.005)  # it has begun once there is a new checkpoint
        if kills < KILLS:
            time.sleep(chance.uniform(0, 0.2))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.read()
    assert kills >= 1
    assert files(killed, spec) == files(undisturbed, spec)
    assert killed.artifact(spec.ref).verify() == []
    assert len(killed.artifact(spec.ref).manifest.writers) == kills + 1, "each process left its trace, and each went on from the one before"


def start(spec: TrainSpec, root: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, spec.model_dump_json(), str(root)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
