"""`stagediff bench`: what its scripts print becomes a table, and what cannot be measured is said."""

import json

import pytest

from stagediff.cli import bench as module
from stagediff.cli.app import main

SCRIPT = """
import json, sys
print("warming up {not json}")
print(json.dumps({"given": sys.argv[1:], "architecture": "topk", "d": 8, "features": 32, "k": 2, "batch": 4, "floor": 2000, "floor_best": 3000,
                  "kernels": {"numba": {"tokens_per_second": 1234, "best": 1500, "share_of_floor": 0.5}}}, indent=1))
"""


@pytest.fixture
def command(monkeypatch, tmp_path):
    def run(*words: str) -> int:
        monkeypatch.setattr(module, "SCRIPTS", tmp_path)
        monkeypatch.setattr("sys.argv", ["stagediff", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    (tmp_path / "train.py").write_text(SCRIPT)
    return run


def test_training_is_shown_with_the_floor_and_the_machine(command, capsys):
    assert command("bench", "train", "--case", "B", "--threads", "3") == 0
    shown = capsys.readouterr().out
    for part in ("d 8, F 32, k 2", "1,234", "1,500", "0.5", "floor", "2,000", "3,000", "cores"):
        assert part in shown
    assert command("bench", "train", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["case"], row["kernels"], row["best"]) for row in found["rows"]][:2] == [("A", "numba", 1500), ("A", "floor", 3000)]
    assert {row["case"] for row in found["rows"]} == {"A", "B", "C", "C, 64 active"}
    assert found["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("train", "--case", "Z"), 2, "none of A, B, C"),
        (("train", "--case", "gpu"), 2, "measures the cases A, B and C"),
        (("peers",), 2, "--peers-python"),
        (("harvest",), 2, "clone the repository"),
    ],
)
def test_what_cannot_be_measured_is_said(command, capsys, words, code, said):
    assert command("bench", *words) == code
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_script_that_fails_is_no_result(command, capsys, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    assert command("bench", "train", "--case", "A") == 1
    assert "ended with 3" in " ".join(capsys.readouterr().err.split())
