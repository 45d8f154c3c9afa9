"""Runs one command as one Slurm job and shares its fate: its log lines, its exit code, its cancellation.

    python -m infra.slurm.launch --gpus=1 --memory=64G --time-limit=720 -- python -m prefect.engine

This is the command of a *process* work pool (infra/pools/slurm.json): to Prefect the job is a local process. A failed node, a time limit or
too little memory ends it with a code other than 0 and one line that says so, which Prefect sees as a crash. SIGTERM (a cancel in the UI),
SIGINT and SIGHUP cancel the job; and should this process be killed outright, a guard process, which only waits for that, cancels it. A
controller that does not answer is waited for, and asked whether it has the job before it is given it a second time.

The log is a file below --log-dir, which the nodes must see (a shared file system). Options left empty are Slurm's defaults.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from infra.slurm import jobs
from infra.slurm.jobs import Fate, Log, SlurmError

__all__ = ["main", "run", "sbatch_options"]

GUARD = """
read -r word; [ "$word" = done ] && exit
for i in $(seq 240); do
  scancel --quiet --name="$0" && taken=$((taken + 1))
  [ "${taken:-0}" -ge 3 ] && exit
  sleep 5
done
"""
"""Waits for the launcher's end. Without its word "done" (it was killed), cancels what runs under the name: three times over, as a submission
may have been under way, and for 20 minutes where the controller is away."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ended(SystemExit):
    """A signal asked for the end, or patience with the controller did."""


class _Silence:
    """For how long the controller has not answered."""

    def __init__(self, patience: float):
        self._patience = patience
        self._since: float | None = None

    def ends(self) -> None:
        self._since = None

    def goes_on(self, what: str) -> None:
        """One more question without an answer; raises Ended, which says that `what` is given up, where patience is at its end."""
        self._since = self._since or time.monotonic()
        seconds = time.monotonic() - self._since
        if seconds > self._patience:
            raise Ended(f"Slurm's controller has not answered for {seconds:.0f} s; {what} is given up.")


def run(
    command: Sequence[str], options: Sequence[str], *, name: str, log_dir: Path, poll: float, patience: float, say: Callable[[str], Any]
) -> Fate:
    """Submits, follows and judges one job.

    Parameters
    ----------
    options
        For sbatch. `name` is made unique, since jobs are found and cancelled by it.
    poll, patience
        Seconds between two looks, and how long the controller may be silent before the job is given up (and cancelled, once it answers).
    """
    name = f"{re.sub('[^A-Za-z0-9._-]+', '-', name).strip('-') or 'stagediff'}-{uuid.uuid4().hex[:8]}"
    log_dir.mkdir(parents=True, exist_ok=True)
    script = "#!/bin/bash\nexec " + shlex.join(command) + "\n"
    fixed = ["--no-requeue", "--export=ALL", "--open-mode=append", f"--job-name={name}", f"--output={log_dir / '%x-%j.log'}"]
    job: str | None = None
    guard = subprocess.Popen(
        ["bash", "-c", GUARD, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # it may outlive this process, whose reader waits for the end of the pipe
        text=True,
        start_new_session=True,
    )
    try:
        job, orders = _submit(script, [*fixed, *options], name, poll, patience, say)
        say(f"Slurm job {job} ({name}): {shlex.join(command)}")
        fate = _follow(job, Log(log_dir / f"{name}-{job}.log"), poll, patience, say)
        if orders > 1:  # one that was given up as lost may have become a job after all
            jobs.cancel(name)
    except SlurmError:
        _release(guard)
        raise
    except BaseException:
        for number in SIGNALS:  # a second one must not stop the cancelling
            signal.signal(number, signal.SIG_IGN)
        say(f"cancelling Slurm job {job or name}")
        if jobs.cancel(name, job=job):
            _release(guard)
        raise  # where Slurm did not take the order, the guard goes on asking
    _release(guard)
    return fate


def _release(guard: "subprocess.Popen[str]") -> None:
    guard.communicate("done\n")


def _submit(script: str, options: Sequence[str], name: str, poll: float, patience: float, say: Callable[[str], Any]) -> tuple[str, int]:
    """The job's id, and how often it was ordered: once more only where the controller, answering again, knows of no job of this name."""
    silence, orders = _Silence(patience), 0
    while True:
        orders += 1
        job = jobs.submit(script, options, jobs.environment())
        if job is not None:
            return job, orders
        if orders == 1:
            say("Slurm's controller does not answer; waiting for it to take the job")
        there = None
        while there is None:
            silence.goes_on(f"the job {name}, which was not submitted as far as is known,")
            time.sleep(poll)
            there = jobs.named(name)
        if there:
            return there[0], orders


def _follow(job: str, log: Log, poll: float, patience: float, say: Callable[[str], Any]) -> Fate:
    """Mirrors the log until the job has ended."""
    told, silence = "", _Silence(patience)
    while True:
        now = jobs.status(job)
        for line in log.lines():
            say(line)
        if now is None:
            silence.goes_on(f"job {job}")
            news = "Slurm's controller does not answer; the job goes on, waiting for it"
        else:
            silence.ends()
            if now.is_final:
                break
            waits = f", waiting: {now.reason}" if now.state == "PENDING" and now.reason else ""
            news = f"Slurm job {job} is {now.state}{waits}" + (f" on {now.nodes}" if now.nodes else "")
        if news != told:
            say(news)
            told = news
        time.sleep(poll)
    fate = jobs.fate_of(job, now)
    if fate.code:
        time.sleep(min(poll, 1.0))  # the last lines may still be on their way through a shared file system
    for line in log.lines(last=True):
        say(line)
    return fate


def sbatch_options(given: argparse.Namespace) -> list[str]:
    """sbatch's options for what was asked for; what was left empty is left out."""
    options = []
    if given.gpus not in ("", "0"):
        options.append(f"--gres=gpu:{given.gpus}")
    for value, option in (
        (given.cpus, "--cpus-per-task"),
        (given.memory, "--mem"),
        (given.time_limit, "--time"),
        (given.partition, "--partition"),
        (given.account, "--account"),
        (given.directory, "--chdir"),
    ):
        if value:
            options.append(f"{option}={value}")
    return [*options, *shlex.split(given.options)]


def _arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m infra.slurm.launch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--name", default="", help="of the job; a unique ending is added. Default: the flow's name, where Prefect gives one"
    )
    parser.add_argument("--gpus", default="", help="on the one node: a number, or type:number")
    parser.add_argument("--cpus", default="")
    parser.add_argument("--memory", default="", help="as sbatch --mem: 64G")
    parser.add_argument("--time-limit", default="", help="as sbatch --time: minutes, or 2-00:00:00")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--directory", default="", help="where the command runs; default: here")
    parser.add_argument("--options", default="", help='further options of sbatch, as one text: "--constraint=a100 --exclusive"')
    parser.add_argument("--log-dir", default="", help="folder that the nodes see; default: $STAGEDIFF_SLURM_LOGS or ~/.stagediff/slurm")
    parser.add_argument("--poll", type=float, default=2.0, help="seconds between two looks at the job")
    parser.add_argument("--patience", type=float, default=1200.0, help="seconds the controller may be silent")
    argv = list(argv)
    if "--" not in argv or not argv[argv.index("--") + 1 :]:
        parser.error("the command to run is missing: … -- COMMAND")
    at = argv.index("--")
    return parser.parse_args(argv[:at]), argv[at + 1 :]


def _say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line. Where nobody reads any more (the worker was killed), the job goes on all the same."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given, command = _arguments(sys.argv[1:] if argv is None else argv)

    def end(number: int, _frame: Any) -> None:
        raise Ended(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)
    log_dir = Path(given.log_dir or os.environ.get("STAGEDIFF_SLURM_LOGS") or Path.home() / ".stagediff" / "slurm").absolute()
    try:
        fate = run(
            command,
            sbatch_options(given),
            name=given.name or os.environ.get("PREFECT__FLOW_NAME", ""),
            log_dir=log_dir,
            poll=given.poll,
            patience=given.patience,
            say=_say,
        )
    except SlurmError as error:
        _say(str(error), sys.stderr)
        return 2
    if fate.text:
        _say(fate.text, sys.stderr)
    return fate.code


if __name__ == "__main__":
    sys.exit(main())
