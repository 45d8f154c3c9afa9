"""The launcher and a controller that is away when the job is to be submitted. Programs of Slurm's names stand in for a cluster.

Each writes its arguments into a file and does what the next line of its plan says: "ok", "away" (nobody listens), "late" (the order arrives, its answer does
not). After the plan's end everything is "ok". `test_slurm.py` asks a real controller.
"""

import os
import stat
from pathlib import Path

import pytest

from infra.slurm import launch
from infra.slurm.jobs import SlurmError, named
from infra.slurm.launch import Ended

FAKE = """#!/bin/bash
cd "$FAKE_SLURM"
me=$(basename "$0")
echo "$@" >> $me.asked
word=$(sed -n "$(wc -l < $me.asked)p" $me.plan 2>/dev/null)
away() { echo "$me: error: $1" >&2; exit 1; }
case $me-$word in
  *-away) away "Unable to contact slurm controller (connect failure)";;
  sbatch-no) away "Batch job submission failed: Invalid partition name specified";;
  sbatch-late) echo $((16 + $(wc -l < sbatch.asked))) >> jobs; away "Batch job submission failed: Socket timed out on send/recv operation";;
  sbatch-*) id=$((16 + $(wc -l < sbatch.asked))); echo $id >> jobs; echo "$id;cluster";;
  squeue-*) cat jobs 2>/dev/null; exit 0;;
  scontrol-*) echo "JobId=17 JobState=COMPLETED Reason=None ExitCode=0:0 NodeList=n1";;
esac
"""


class Fakes:
    """A folder of stand-ins, first on PATH."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            file = folder / name
            file.write_text(FAKE)
            file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def plan(self, program: str, *words: str) -> None:
        (self.folder / f"{program}.plan").write_text("".join(f"{word}\n" for word in words))

    def asked(self, program: str) -> list[str]:
        file = self.folder / f"{program}.asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Fakes:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return Fakes(folder)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def submit(tmp_path, said):
    return lambda patience=60.0: launch.run(
        ["true"], ["--mem=1G"], name="train S", log_dir=tmp_path / "logs", poll=0.01, patience=patience, say=said.append
    )


def test_a_job_is_submitted_once_the_controller_is_back(slurm, submit, said):
    slurm.plan("sbatch", "away", "away")
    slurm.plan("squeue", "away", "away", "ok", "away")
    assert submit().code == 0
    assert len(slurm.asked("sbatch")) == 3
    assert len(slurm.asked("squeue")) == 5, "it is asked for the job before each further order, until it answers"
    assert len(set(slurm.asked("sbatch"))) == 1, "under the same name"
    assert sum("does not answer" in line for line in said) == 1
    assert any("Slurm job 19 (train-S-" in line for line in said)


def test_a_job_whose_submission_arrived_without_an_answer_is_followed_and_not_made_twice(slurm, submit, said):
    slurm.plan("sbatch", "late")
    assert submit().code == 0
    (order,) = slurm.asked("sbatch")
    name = next(word.removeprefix("--job-name=") for word in order.split() if word.startswith("--job-name="))
    assert f"--name={name}" in slurm.asked("squeue")[0].split()
    assert any(f"Slurm job 17 ({name})" in line for line in said)
    assert slurm.asked("scontrol")[-1].endswith("show job 17")


def test_an_order_that_arrives_after_the_second_one_leaves_no_job_behind(slurm, submit):
    slurm.plan("sbatch", "away")
    assert submit().code == 0
    assert len(slurm.asked("scancel")) == 1
    (slurm.folder / "sbatch.asked").unlink()
    slurm.plan("sbatch")
    assert submit().code == 0
    assert len(slurm.asked("scancel")) == 1, "with one order there is nothing to cancel"


def test_patience_ends_and_what_may_have_been_submitted_is_cancelled(slurm, submit):
    slurm.plan("sbatch", *["away"] * 1000)
    slurm.plan("squeue", *["away"] * 1000)
    with pytest.raises(Ended, match="has not answered for .* not submitted as far as is known, is given up"):
        submit(patience=0.2)
    assert len(slurm.asked("sbatch")) == 1
    assert slurm.asked("scancel")[0].startswith("--quiet --name=train-S-")


def test_a_refusal_is_not_asked_again(slurm, submit):
    slurm.plan("sbatch", "no")
    with pytest.raises(SlurmError, match="Slurm refused the job: Batch job submission failed: Invalid partition name"):
        submit()
    assert len(slurm.asked("sbatch")) == 1
    assert slurm.asked("squeue") == []


def test_the_oldest_of_several_jobs_comes_first(slurm):
    (slurm.folder / "jobs").write_text("101\n99\n")
    assert named("any") == ["99", "101"]
    slurm.plan("squeue", "ok", "away")
    assert named("any") is None
