"""Ctrl-C and a terminal that closes, which every process of the command gets, and SIGTERM: it ends at once, leaves nothing behind, and goes on."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from tiny import tiny_config

pytestmark = pytest.mark.integration
COMMAND = Path(sys.executable).parent / "stagediff"


@pytest.fixture(autouse=True)
def hangs_up():
    """These tests may themselves have been started by nohup, whose children ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_what_ends_the_command_ends_everything_and_the_run_goes_on(tmp_path, how):
    config = tmp_path / "tiny.yaml"
    tokens = 64_000 if how == "SIGINT" else 500_000_000  # hours, so that nothing ends by itself
    config.write_text(yaml.safe_dump(tiny_config(str(tmp_path / "store"), train={"tokens": tokens, "batch": 1024, "lr": 1e-3})))
    words = [str(COMMAND), "run", str(config), "--jobs", "2", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | {"PREFECT_HOME": str(tmp_path / "prefect")}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([*words, "--json"], stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    while "train-S" not in (tmp_path / "said").read_text():
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert family, "Prefect's temporary server at least"
    start = time.monotonic()
    if how == "SIGTERM":  # a scheduler's, for the command alone
        process.terminate()
    else:
        os.killpg(process.pid, getattr(signal, how))
        if how == "SIGHUP":  # the shell's to its jobs, and the kernel's when the shell is gone
            time.sleep(0.02)
            os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 130
    assert time.monotonic() - start < 30
    assert "the same command goes on from there" in (tmp_path / "said").read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    if how != "SIGINT":
        return  # the rest would take hours
    done = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=True)
    computed = json.loads(done.stdout)["computed"]
    assert "report" in computed
    assert "organism" not in computed


def test_a_terminal_that_closes_ends_everything_though_bars_are_drawn_in_it(tmp_path):
    """What is drawn in a dead terminal fails, which must not be taken for a fault of the moment: the run would be tried again and go on unseen."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(str(tmp_path / "store"))))
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "TERM": "xterm",
    }
    number, terminal = pty.fork()
    if not number:
        os.execve(COMMAND, [str(COMMAND), "run", str(config), "--device", "cpu"], environment)
    said, deadline = b"", time.monotonic() + 300
    while b"documents/s" not in said:  # in the bar of the first step, which takes seconds
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 1 << 16)
    command = psutil.Process(number)
    family = command.children(recursive=True)
    assert family, "Prefect's temporary server at least"
    os.close(terminal)
    _, alive = psutil.wait_procs([command, *family], timeout=30)
    assert not alive
    assert not (tmp_path / "store" / "tokens").exists(), "nothing was begun after it"
