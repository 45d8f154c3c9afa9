"""Several processes on one step: shares of a harvest, slices of a training's batches; death, cancel and mistakes among them."""

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load

from stagediff import ranks, steps
from stagediff.errors import UserError
from stagediff.progress import Progress, Task
from stagediff.ranks.launch import is_shared
from stagediff.sae.dictionary import ARCHITECTURES, resolved
from stagediff.sae.gradients import Context
from stagediff.sae.initial import fresh
from stagediff.sae.sharing import check
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


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a step on two ranks in a process of its own; it and all that it has started end with the test, however that ends."""
    made: list[subprocess.Popen] = []

    def start(spec, store: Store, before: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", before + TWO, spec.step, spec.model_dump_json(), store.root]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment))
        return made[-1]

    yield start
    for process in made:
        tree = []
        with suppress(psutil.NoSuchProcess):  # it has ended in the test
            tree = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        for member in tree:
            with suppress(psutil.NoSuchProcess):
                member.kill()


@pytest.fixture(scope="module")
def planted():
    return tools().planted_activations(4096, 16, 24)[0]


def training(data, architecture: str = "relu", steps_: int = 60, focus: float = 0.0, **changes) -> TrainSpec:
    auxk = 8 if "topk" in architecture else None
    dictionary = DictionaryConfig(architecture=architecture, features=48, k=4, auxk=auxk, dead_after=512)
    options = {"compute": "fp32", "checkpoint_tokens": 64 * 20, **changes}
    return TrainSpec(data=data, budget=Budget(tokens=64 * steps_, batch=64, lr=1e-3, focus=focus), dictionary=dictionary, **options)


def weights(store: Store, ref: str) -> dict[str, torch.Tensor]:
    return load((Path(store.root) / ref / "sae_weights.safetensors").read_bytes())


@pytest.fixture(scope="module")
def trained(planted, tmp_path_factory) -> tuple[TrainSpec, Store, Store]:
    """The same training by one process and by two ranks; with a focus, for which ranks tell each other their tokens' errors."""
    one, two = (Store(tmp_path_factory.mktemp("trained") / name) for name in ("one", "two"))
    for store in (one, two):
        data = tools().store_activations(store, planted)
    spec = training(data, focus=2.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps.run(spec, one, device="cpu")
    torch.set_num_threads(threads)
    assert ranks.run(spec, two, device="cpu", ranks=2) == spec.ref
    return spec, one, two


def assert_same_weights(found: Store, expected: Store, ref: str) -> None:
    theirs = weights(found, ref)
    for name, value in weights(expected, ref).items():
        assert float((theirs[name] - value).abs().max()) <= 2e-4 * float(value.abs().max()), name


def test_two_ranks_train_what_one_trains(trained):
    """fp32, 60 steps: weights agree to 2e-4 of their largest, figures to 1e-3."""
    spec, one, two = trained
    expected, found = (store.artifact(spec.ref).manifest for store in (one, two))
    assert (expected.numerics["world_size"], found.numerics["world_size"]) == (1, 2)
    assert_same_weights(two, one, spec.ref)
    for name in ("loss", "ev", "l0", "dead"):
        assert found.figures[name] == pytest.approx(expected.figures[name], rel=1e-3, abs=1e-3), name


def test_two_ranks_train_sparsely_what_one_trains(planted, tmp_path):
    """topk, whose encoder lies by feature. Rounding decides near-equal features: figures agree to 3 percent, and so do the weights' norms."""
    one, two = (Store(tmp_path / name) for name in ("one", "two"))
    for store in (one, two):
        data = tools().store_activations(store, planted)
    spec = training(data, "topk")
    steps.run(spec, one, device="cpu")
    ranks.run(spec, two, device="cpu", ranks=2)
    expected, found = (store.artifact(spec.ref).manifest.figures for store in (one, two))
    for name in ("loss", "ev", "l0"):
        assert found[name] == pytest.approx(expected[name], rel=0.03), name
    theirs = weights(two, spec.ref)
    for name, value in weights(one, spec.ref).items():
        assert float((theirs[name] - value).norm()) < 0.03 * float(value.norm()), name


def test_two_ranks_give_the_same_bytes_again_and_a_forced_step_is_set_aside_once(trained):
    spec, _, two = trained
    ranks.run(spec, two, device="cpu", ranks=2, force=True)
    assert two.artifact(spec.ref).manifest.same_bytes is True


def test_a_training_begun_by_one_process_is_continued_by_two(trained, planted, tmp_path):
    spec, one, _ = trained
    store = Store(tmp_path / "store")
    tools().store_activations(store, planted)

    def stop(task: Task) -> None:
        if task.name == "train" and task.done > spec.budget.tokens / 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        steps.run(spec, store, device="cpu", progress=Progress(listener=stop))
    ranks.run(spec, store, device="cpu", ranks=2)
    manifest = store.artifact(spec.ref).manifest
    assert 0 < manifest.notes["tokens_this_run"] < spec.budget.tokens
    assert [writer.numerics["world_size"] for writer in manifest.writers] == [1, 2], "the change of class is recorded"
    assert_same_weights(store, one, spec.ref)


@pytest.mark.parametrize(("architecture", "dead"), [("relu", False), ("topk", False), ("topk", True), ("jumprelu", False)])
def test_the_mean_of_the_slices_gradients_is_the_batchs(architecture, dead, planted):
    """float64, every architecture that can be shared out: equal to 1e-12."""
    config = resolved(DictionaryConfig(architecture=architecture, features=48, k=4, auxk=8 if architecture == "topk" else None), 16)
    sae = fresh(config, 1.0, planted.double().mean(0), seed=0)
    parameters = {name: getattr(sae, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture == "jumprelu":
        parameters["log_threshold"] = sae.threshold.double().log()
    context = Context(config, 3.0, torch.float64, torch.arange(0, 48, 5) if dead else None)
    x = planted[:64].double()
    gradient = ARCHITECTURES[architecture].gradient
    whole, parts = gradient(parameters, x, context), [gradient(parameters, part, context) for part in x.chunk(4)]
    for name, expected in whole.gradients.items():
        torch.testing.assert_close(torch.stack([p.gradients[name] for p in parts]).mean(0), expected, rtol=1e-12, atol=1e-12)
    for name in ("loss", "error", "sparsity"):
        torch.testing.assert_close(torch.stack([getattr(p, name) for p in parts]).mean(), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.stack([p.fired for p in parts]).any(0), whole.fired)


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
    assert_same_weights(stores[1], stores[0], spec.ref)
    files = [(Path(store.root) / spec.ref / "revived.parquet").read_bytes() for store in stores]
    assert files[0] == files[1]


@pytest.mark.integration
def test_a_training_of_two_ranks_killed_again_and_again_resumes_to_the_same_bytes(planted, started, tmp_path):
    """A rank, the other one, torchrun between them, and who launched it: nothing is left behind, and the next attempt goes on."""
    hit, undisturbed = Store(tmp_path / "hit"), Store(tmp_path / "undisturbed")
    data = tools().store_activations(hit, planted)
    tools().store_activations(undisturbed, planted)
    spec = training(data, steps_=1200, checkpoint_tokens=64 * 20)
    ranks.run(spec, undisturbed, device="cpu", ranks=2)
    checkpoints = Path(hit.root) / spec.ref / "_work" / "training"
    reached = 0
    for victim in ("rank 1", "rank 0", "torchrun", "launcher"):
        process = started(spec, hit)
        wait_for(lambda before=reached: newest(checkpoints) > before, process)
        tree = {name: member for member in psutil.Process(process.pid).children(recursive=True) for name in [role(member)] if name}
        assert tree.keys() == {"torchrun", "rank 0", "rank 1"}
        (process if victim == "launcher" else tree[victim]).kill()
        out, _ = process.communicate(timeout=200)
        assert process.returncode == (-signal.SIGKILL if victim == "launcher" else 1), out
        assert "RankLostError" in out or victim == "launcher", out
        _, left = psutil.wait_procs(tree.values(), timeout=100)
        assert left == [], f"{victim} was killed and left these behind"
        assert not hit.artifact(spec.ref).is_complete
        reached = newest(checkpoints)
    ranks.run(spec, hit, device="cpu", ranks=2)
    found, expected = (store.artifact(spec.ref).manifest for store in (hit, undisturbed))
    assert found.data() == expected.data()
    assert found.notes["tokens_this_run"] == spec.budget.tokens - reached * spec.budget.batch, "from the last checkpoint on"
    assert len(found.writers) == 5


def newest(checkpoints: Path) -> int:
    """The step of the newest training checkpoint."""
    return max((int(path.name.split("-")[0]) for path in checkpoints.glob("*.safetensors")), default=0) if checkpoints.is_dir() else 0


def test_a_cancelled_training_leaves_no_process(planted, started, tmp_path):
    """As Prefect cancels: SIGTERM, which becomes an exception in the main thread."""
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), steps_=100_000)
    handler = "import signal\ndef end(*_): raise SystemExit(7)\nsignal.signal(signal.SIGTERM, end)\n"
    process = started(spec, store, before=handler)
    wait_for(lambda: newest(Path(store.root) / spec.ref / "_work" / "training"), process)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.communicate(timeout=200)
    assert process.returncode == 7
    assert not any(member.is_running() for member in tree)


def test_a_harvest_is_shared_out_by_shards_to_the_same_bytes(finished_run, tmp_path, caplog):
    plan, store = finished_run
    node = next(n for n in plan if n.spec.step == "harvest")
    other = Store(tmp_path / "store")
    copy_inputs(plan, node, store, other)
    caplog.set_level(logging.INFO, "stagediff")
    seen: dict[str, Task] = {}
    ranks.run(node.spec, other, device="cpu", ranks=2, progress=Progress(listener=lambda task: seen.update({task.name: task})))
    assert sorted(seen) == ["harvest", "harvest (rank 1)"]
    assert sum(task.done for task in seen.values()) == store.artifact(node.ref).manifest.figures["tokens"]
    found, expected = (s.artifact(node.ref).manifest for s in (other, store))
    assert found.data() == expected.data()
    assert found.figures == expected.figures
    assert len(found.writers) == 2
    assert found.numerics["world_size"] == 1, "a share's bytes do not depend on how many there are"
    assert any("[rank 1]" in record.getMessage() for record in caplog.records), "the ranks' lines reach the log"


def test_a_harvest_that_is_not_stored_is_nobodys_to_share(finished_run):
    spec = next(node.spec for node in finished_run[0] if node.spec.step == "harvest")
    assert is_shared(spec, 2)
    assert not is_shared(spec.model_copy(update={"stored": False}), 2)


def test_a_users_mistake_in_a_rank_is_a_users_mistake(planted, tmp_path):
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), "batchtopk")
    with pytest.raises(UserError, match="batchtopk chooses its active features over the whole batch"):
        ranks.run(spec, store, device="cpu", ranks=2)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    odd, even = (SimpleNamespace(budget=Budget(tokens=64, batch=batch)) for batch in (63, 64))
    check(odd, "batchtopk", 16, 1, "batch")  # alone: anything goes
    check(even, "relu", 16, 2, "batch")
    with pytest.raises(UserError, match="63 tokens cannot be shared out evenly to 2 ranks"):
        check(odd, "relu", 16, 2, "batch")


def test_without_a_word_a_step_runs_in_this_process(planted, tmp_path, monkeypatch):
    monkeypatch.delenv(ranks.RANKS, raising=False)
    store = Store(tmp_path / "store")
    spec = training(tools().store_activations(store, planted), steps_=5)
    ranks.run(spec, store, device="cpu")
    assert store.artifact(spec.ref).manifest.numerics["world_size"] == 1
    monkeypatch.setenv(ranks.RANKS, "several")
    with pytest.raises(UserError, match="STAGEDIFF_RANKS is 'several'"):
        ranks.run(spec, store, device="cpu")


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
