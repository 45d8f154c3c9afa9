"""Several processes on one step: shares of a harvest, slices of a training's batches; death, cancel and mistakes among them."""

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load

from stagediff import ranks, steps
from stagediff.errors import UserError
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec
from stagediff.store import Store

pytestmark = pytest.mark.slow

TWO = """
import json, sys
from stagediff import ranks, steps
from stagediff.store import Store
ranks.run(steps.spec_from_json(sys.argv[1], json.loads(sys.argv[2])), Store(sys.argv[3]), device="cpu", ranks=2)
"""


def tools():
    path = Path(__file__).parents[1] / "sae" / "conftest.py"
    spec = importlib.util.spec_from_file_location("sae_tools", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torchrun's default for each rank
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def planted():
    return tools().planted_activations(4096, 16, 24)[0]


def training(data, architecture: str = "relu", steps_: int = 60, **changes) -> TrainSpec:
    auxk = 8 if "topk" in architecture else None
    dictionary = DictionaryConfig(architecture=architecture, features=48, k=4, auxk=auxk, dead_after=512)
    options = {"compute": "fp32", "checkpoint_tokens": 64 * 20, **changes}
    return TrainSpec(data=data, budget=Budget(tokens=64 * steps_, batch=64, lr=1e-3), dictionary=dictionary, **options)


def weights(store: Store, ref: str) -> dict[str, torch.Tensor]:
    return load((Path(store.root) / ref / "sae_weights.safetensors").read_bytes())


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_two_ranks_train_what_one_trains(architecture, planted, tmp_path):
    """fp32, 60 steps: weights agree to 2e-4 of their largest, figures to 1e-3; and two ranks twice agree bit by bit."""
    stores = [Store(tmp_path / name) for name in ("one", "two", "again")]
    datas = [tools().store_activations(store, planted) for store in stores]
    spec = training(datas[0], architecture)
    steps.run(spec, stores[0], device="cpu")
    for store in stores[1:]:
        assert ranks.run(spec, store, device="cpu", ranks=2) == spec.ref
    one, two, again = (store.artifact(spec.ref).manifest for store in stores)
    assert (one.numerics["world_size"], two.numerics["world_size"]) == (1, 2)
    for name, expected in weights(stores[0], spec.ref).items():
        found = weights(stores[1], spec.ref)[name]
        assert float((found - expected).abs().max()) <= 2e-4 * float(expected.abs().max()), name
    for name in ("loss", "ev", "l0", "dead"):
        assert two.figures[name] == pytest.approx(one.figures[name], rel=1e-3, abs=1e-3), name
    assert two.data() == again.data()


def test_two_ranks_finetune_from_a_start_with_its_optimiser_and_revived_features(planted, tmp_path):
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    for store in stores:
        data = tools().store_activations(store, planted)
        start = training(data, steps_=30, keep_optimiser=True)
        steps.run(start, store, device="cpu")
    spec = FinetuneSpec(
        data=data,
        budget=Budget(tokens=64 * 40, batch=64, lr=1e-4),
        start=start.ref,
        compute="fp32",
        optimiser="carried",
        anchor=0.1,
        revive="resample",
        revive_tokens=2048,
        checkpoint_tokens=64 * 20,
    )
    steps.run(spec, stores[0], device="cpu")
    ranks.run(spec, stores[1], device="cpu", ranks=2)
    for name, expected in weights(stores[0], spec.ref).items():
        found = weights(stores[1], spec.ref)[name]
        assert float((found - expected).abs().max()) <= 2e-4 * float(expected.abs().max()), name
    files = [(Path(store.root) / spec.ref / "revived.parquet").read_bytes() for store in stores]
    assert files[0] == files[1]


@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "torchrun", "launcher"])
def test_a_killed_training_of_two_ranks_resumes_to_the_same_bytes(victim, planted, tmp_path):
    hit, undisturbed = Store(tmp_path / "hit"), Store(tmp_path / "undisturbed")
    data = tools().store_activations(hit, planted)
    tools().store_activations(undisturbed, planted)
    spec = training(data, steps_=1500, checkpoint_tokens=64 * 50)
    ranks.run(spec, undisturbed, device="cpu", ranks=2)
    process = started(spec, hit)
    checkpoints = Path(hit.root) / spec.ref / "_work" / "training"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), process)
    tree = {name: member for member in psutil.Process(process.pid).children(recursive=True) for name in [role(member)] if name}
    assert tree.keys() == {"torchrun", "rank 0", "rank 1"}
    (process if victim == "launcher" else tree[victim]).kill()
    out, _ = process.communicate(timeout=200)
    assert process.returncode == (-signal.SIGKILL if victim == "launcher" else 1)
    if victim != "launcher":
        assert "RankLostError" in out
    gone, left = psutil.wait_procs(tree.values(), timeout=100)
    assert left == [], f"nothing is left behind; gone are {gone}"
    assert not hit.artifact(spec.ref).is_complete
    ranks.run(spec, hit, device="cpu", ranks=2)
    found, expected = (store.artifact(spec.ref).manifest for store in (hit, undisturbed))
    assert found.data() == expected.data()
    assert found.notes["tokens_this_run"] < spec.budget.tokens


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_training_leaves_no_process(number, planted, tmp_path):
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), steps_=100_000)
    handler = "import signal\ndef end(*_): raise SystemExit(7)\nsignal.signal(signal.SIGTERM, end); signal.signal(signal.SIGINT, end)\n"
    process = started(spec, store, before=handler)
    checkpoints = Path(store.root) / spec.ref / "_work" / "training"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.iterdir()), process)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == 7
    assert not any(member.is_running() for member in tree)


def test_a_harvest_is_shared_out_by_shards_to_the_same_bytes(finished_run, tmp_path, caplog):
    plan, store = finished_run
    node = next(n for n in plan if n.spec.step == "harvest")
    other = Store(tmp_path / "store")
    copy_inputs(plan, node, store, other)
    caplog.set_level(logging.INFO, "stagediff")
    ranks.run(node.spec, other, device="cpu", ranks=2)
    found, expected = (s.artifact(node.ref).manifest for s in (other, store))
    assert found.data() == expected.data()
    assert found.figures == expected.figures
    assert len(found.writers) == 2
    assert found.numerics["world_size"] == 1, "a share's bytes do not depend on how many there are"
    assert any("[rank 1]" in record.getMessage() for record in caplog.records), "the ranks' lines reach the log"


def test_a_forced_step_is_set_aside_once_and_compared(planted, tmp_path):
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted))
    ranks.run(spec, store, device="cpu", ranks=2)
    ranks.run(spec, store, device="cpu", ranks=2, force=True)
    assert store.artifact(spec.ref).manifest.same_bytes is True


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("batchtopk", {}, "batchtopk chooses its active features over the whole batch"),
        ("relu", {"batch": 63}, "cannot be shared out evenly to 2"),
    ],
)
def test_a_users_mistake_in_a_rank_is_a_users_mistake(architecture, changes, said, planted, tmp_path):
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), architecture)
    spec = spec.model_copy(update={"budget": spec.budget.model_copy(update=changes)})
    with pytest.raises(UserError, match=said):
        ranks.run(spec, store, device="cpu", ranks=2)


def test_without_a_word_a_step_runs_in_this_process(planted, tmp_path, monkeypatch):
    monkeypatch.delenv(ranks.RANKS, raising=False)
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), steps_=5)
    ranks.run(spec, store, device="cpu")
    assert store.artifact(spec.ref).manifest.numerics["world_size"] == 1
    monkeypatch.setenv(ranks.RANKS, "several")
    with pytest.raises(UserError, match="STAGEDIFF_RANKS is 'several'"):
        ranks.run(spec, store, device="cpu")


def started(spec, store: Store, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", before + TWO, spec.step, spec.model_dump_json(), store.root]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def role(process: psutil.Process) -> str | None:
    """Which part of the tree a process is."""
    try:
        line = process.cmdline()
        if "stagediff.ranks.torchrun" in line:
            return "torchrun"
        return f"rank {process.environ()['RANK']}" if "stagediff.ranks" in line else None
    except psutil.Error:
        return None


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def copy_inputs(plan, node, store: Store, other: Store) -> None:
    """Everything that a node needs, from one store to another."""
    wanted = {node.ref}
    for n in reversed(plan.nodes):
        if n.ref in wanted:
            wanted.update(n.spec.refs())
    for ref in wanted - {node.ref}:
        shutil.copytree(Path(store.root) / ref, Path(other.root) / ref)
