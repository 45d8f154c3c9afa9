"""Ctrl-C in a terminal, which every process of the command gets: it ends at once, leaves nothing behind, and the same command goes on."""

import json
import os
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


def test_ctrl_c_ends_everything_and_the_run_goes_on(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config(str(tmp_path / "store"))))
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
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert time.monotonic() - start < 30
    assert "the same command goes on from there" in (tmp_path / "said").read_text()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    done = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=True)
    computed = json.loads(done.stdout)["computed"]
    assert "report" in computed
    assert "organism" not in computed
