"""`stagediff watch` as its users meet it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from wrong import refused, stagediff

from stagediff.errors import UserError
from stagediff.store import Store

from .conftest import age
from .runs import tiny_watch


def written(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def once(config: Path, *more: str) -> dict[str, Any]:
    result = stagediff("watch", config, "--once", "--runner", "plain", "--device", "cpu", "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_once_runs_what_is_new_and_then_nothing(save, tmp_path):
    config = written(tiny_watch(tmp_path), tmp_path)
    found = once(config)
    assert found["ran"] == []
    assert found["waits_for"]
    save(10), save(20)
    found = once(config)
    assert [c["step"] for c in found["checkpoints"]] == [10, 20]
    (ran,) = found["ran"]
    assert ran["step"] == 20
    assert Path(ran["report"]).is_file()
    assert once(config)["ran"] == []
    assert "Nothing new." in stagediff("watch", config, "--once", "--runner", "plain").stdout


def test_it_goes_on_looking_and_goes_on_where_it_was_killed(save, tmp_path):
    """Left alone, the command takes checkpoints as they come; killed and started again, it takes the next ones, each once."""
    config = written(tiny_watch(tmp_path), tmp_path)
    command = [sys.executable, "-c", "from stagediff.cli import main; main()", "watch", str(config), "--runner", "plain", "--device", "cpu"]

    def watching(until: int) -> None:
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            end = time.monotonic() + 240
            while f"checkpoint {until}: done" not in (tmp_path / "log").read_text():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    save(10), save(20)
    watching(until=20)
    save(30)
    watching(until=30)
    store = Store(tmp_path / "store")
    steps = [store.artifact(ref).manifest.step for ref in store.refs("dictionaries")]
    assert sorted(steps) == ["finetune", "finetune", "finetune", "train"]  # one train, two follows, one null


def test_a_place_without_a_model_is_told(tmp_path):
    folder = tmp_path / "lm/checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x")
    age(folder)
    config = written(tiny_watch(tmp_path), tmp_path)
    refused(stagediff("watch", config, "--once"), r"No checkpoint in .* can be used\. .*checkpoint-5: it holds no config\.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"watch": {"source": "s3://absent-bucket/run"}}, "The bucket 'absent-bucket'.* does not exist"),
        ({"watch": {"sorce": "x"}}, "did you mean source"),
    ],
)
def test_what_cannot_be_watched_is_refused_in_one_paragraph(tmp_path, s3_root, changes, says):
    refused(stagediff("watch", written(tiny_watch(tmp_path, **changes), tmp_path), "--once"), says)


def test_a_bucket_without_rights_is_told(tmp_path, strict_s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", strict_s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    config = written(tiny_watch(tmp_path, watch={"source": "s3://somebodys/run"}), tmp_path)
    refused(stagediff("watch", config, "--once"), r"watch\.source 's3://somebodys/run.*refused to open.*Check AWS_ACCESS_KEY_ID")


def test_a_place_that_does_not_answer_for_a_while_is_looked_at_again(save, tmp_path, monkeypatch):
    from stagediff.cli import watching
    from stagediff.watch.watcher import Watcher

    save(10), save(20)
    looks: list[int] = []
    real = Watcher.look

    def look(self: Watcher) -> Any:
        looks.append(1)
        if len(looks) in (2, 3):
            raise UserError("watch.source 's3://x' does not answer.")
        if len(looks) == 5:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Watcher, "look", look)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    result = stagediff("watch", written(tiny_watch(tmp_path), tmp_path), "--runner", "plain", "--device", "cpu")
    assert result.exit_code == 130
    assert len(looks) == 5


def test_looking_once_and_deploying_contradict_each_other(tmp_path):
    refused(stagediff("watch", written(tiny_watch(tmp_path), tmp_path), "--once", "--deploy", "stagediff"), "Give one of them")


def test_deploying_needs_an_api_that_answers(tmp_path, monkeypatch):
    config = written(tiny_watch(tmp_path), tmp_path)
    command = [sys.executable, "-c", "from stagediff.cli import main; main()", "watch", str(config), "--deploy", "stagediff"]
    for url, says in (("http://127.0.0.1:9/api", "does not answer"), ("", "PREFECT_API_URL is not set")):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"PREFECT_HOME": str(tmp_path / "prefect")}
        environment |= {"PREFECT_API_URL": url} if url else {}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 2, result.stderr
        assert says in result.stderr
        assert "Traceback" not in result.stderr
