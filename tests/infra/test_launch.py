"""The launcher without a Slurm: what a final state means, what sbatch is asked for, what a job inherits."""

import pytest

from infra.slurm.jobs import Log, Status, environment, fate_of
from infra.slurm.launch import _arguments, sbatch_options


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (Status("COMPLETED"), 0, ""),
        (Status("FAILED", "3:0"), 3, "exit code 3"),
        (Status("FAILED", "0:9"), 137, "signal 9"),
        (Status("NODE_FAIL", "0:0", nodes="n7"), 75, "on n7: the node failed"),
        (Status("BOOT_FAIL"), 75, "the node failed"),
        (Status("TIMEOUT", "0:15"), 124, "time limit"),
        (Status("DEADLINE"), 124, "time limit"),
        (Status("OUT_OF_MEMORY", "0:125"), 137, "more memory"),
        (Status("PREEMPTED"), 75, "PREEMPTED"),
        (Status("CANCELLED", "0:15"), 143, "cancelled"),
        (Status("UNKNOWN"), 75, "forgotten"),
        (Status("FAILED", "0:0"), 1, "FAILED"),
        (Status("A_STATE_OF_TOMORROW", "0:0"), 1, "A_STATE_OF_TOMORROW"),
    ],
)
def test_only_completed_is_success(status, code, said):
    assert status.is_final
    fate = fate_of("17", status)
    assert fate.code == code
    assert said in fate.text


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED"])
def test_a_job_on_its_way_is_not_final(state):
    assert not Status(state).is_final


def test_what_is_left_empty_is_not_asked_for():
    given, command = _arguments(["--gpus=", "--cpus=4", "--memory=", "--options=", "--", "python", "-m", "prefect.engine"])
    assert sbatch_options(given) == ["--cpus-per-task=4"]
    assert command == ["python", "-m", "prefect.engine"]


def test_every_option_reaches_sbatch():
    asked = [
        "--gpus=h100:2",
        "--cpus=8",
        "--memory=64G",
        "--time-limit=1-00:00:00",
        "--partition=gpu",
        "--account=lab",
        "--directory=/data",
    ]
    given, _ = _arguments([*asked, "--options=--constraint='a100 & ib' --exclusive", "--", "true"])
    assert sbatch_options(given) == [
        *("--gres=gpu:h100:2", "--cpus-per-task=8", "--mem=64G", "--time=1-00:00:00", "--partition=gpu", "--account=lab", "--chdir=/data"),
        *("--constraint=a100 & ib", "--exclusive"),
    ]


@pytest.mark.parametrize("argv", [[], ["--"], ["--gpus=1"], ["--gpu_s=1", "--", "true"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        _arguments(argv)
    assert ended.value.code == 2
    assert "error" in capsys.readouterr().err


def test_an_allocation_around_the_worker_and_its_control_port_are_not_inherited(monkeypatch):
    for name in ("SLURM_MEM_PER_NODE", "SLURM_JOB_ID", "PREFECT__CONTROL_PORT", "SLURM_CONF", "PREFECT__FLOW_RUN_ID"):
        monkeypatch.setenv(name, "x")
    env = environment()
    assert {"SLURM_CONF", "PREFECT__FLOW_RUN_ID"} <= env.keys()
    assert not {"SLURM_MEM_PER_NODE", "SLURM_JOB_ID", "PREFECT__CONTROL_PORT"} & env.keys()


def test_a_log_is_read_line_by_line_as_it_grows(tmp_path):
    log = Log(tmp_path / "log")
    assert log.lines() == []
    with (tmp_path / "log").open("wb") as file:
        for part, expected in ((b"one\ntw", ["one"]), (b"o\r\nthree \xff\nfo", ["two", "three \ufffd"]), (b"ur", [])):
            file.write(part)
            file.flush()
            assert log.lines() == expected
    assert log.lines(last=True) == ["four"]
    assert log.lines(last=True) == []
