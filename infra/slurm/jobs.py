"""One Slurm job: submit, watch, read its log, cancel. Needs sbatch, scontrol and scancel only, no accounting database and no REST service.

`srun` and `sbatch --wait` end with 0 when a node fails, so a job's fate is read from the controller's own record. A controller that does not
answer is no news about the job: it may be restarting, and the job runs on meanwhile.
"""

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = ["ENDED_WITHOUT_RECORD", "Fate", "Log", "SlurmError", "Status", "cancel", "environment", "fate_of", "named", "status", "submit"]

UNFINISHED = {
    "PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "REQUEUED", "REQUEUE_HOLD",
    "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT",
}  # fmt: skip
ENDED_WITHOUT_RECORD = "UNKNOWN"
"""Our name for a job that the controller has forgotten (it keeps ended jobs for MinJobAge seconds)."""
ANSWER_SECONDS = 60
"""How long one Slurm command may take before it counts as unanswered."""
UNANSWERED = (
    "unable to contact slurm controller", "socket timed out", "zero bytes were transmitted", "standby mode", "temporarily unable",
    "connection refused", "connection reset", "connection timed out", "communication connection failure", "not connected",
    "message send failure", "message receive failure", "send/recv",
)  # fmt: skip
"""What Slurm's commands say, in lower case, when the controller is away, starts anew or is too busy: the order may have arrived all the same."""


class SlurmError(RuntimeError):
    """Slurm refused something. The text says what and, where it can be known, what to do."""


class Status(NamedTuple):
    """What the controller says of a job."""

    state: str
    code: str = "0:0"
    """Exit code and signal, as "code:signal"."""
    reason: str = ""
    """Why it waits, where it does."""
    nodes: str = ""

    @property
    def is_final(self) -> bool:
        return self.state not in UNFINISHED


@dataclass(frozen=True)
class Fate:
    """How a job ended, as a process would: exit code, and what to tell (empty: all is well)."""

    code: int
    text: str = ""


def submit(script: str, options: Sequence[str], env: Mapping[str, str]) -> str | None:
    """Submits a batch script; returns the job's id. None when the controller does not answer: it may have the job, or not (`named` tells).

    Raises SlurmError, with Slurm's own words, when it refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options], input=script, text=True, capture_output=True, env=dict(env), timeout=ANSWER_SECONDS
        )
    except FileNotFoundError:
        raise SlurmError("There is no sbatch on PATH. Run this where Slurm's commands are (a login node, or the worker's host).") from None
    except subprocess.TimeoutExpired:
        return None
    if not done.returncode:
        return done.stdout.strip().split(";")[0]
    if any(words in done.stderr.lower() for words in UNANSWERED):
        return None
    said = done.stderr.strip().removeprefix("sbatch: error: ")
    raise SlurmError(f"Slurm refused the job: {said} (options: {' '.join(options)}). Correct the pool's or the step's job variables.")


def named(name: str) -> list[str] | None:
    """Ids of the jobs of that name, oldest first, ended ones too as long as the controller keeps them; None when it does not answer."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--states=all", "--format=%i", f"--name={name}"],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None
    return None if done.returncode else sorted(done.stdout.split(), key=int)


def status(job: str) -> Status | None:
    """The job's state; None when the controller does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, timeout=ANSWER_SECONDS, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return Status(ENDED_WITHOUT_RECORD) if "Invalid job id" in done.stderr else None
    found = {
        name: match[1] for name in ("JobState", "ExitCode", "Reason", "NodeList") if (match := re.search(rf"\b{name}=(\S*)", done.stdout))
    }
    nodes, reason = (found.get(name, "").replace("(null)", "").replace("None", "") for name in ("NodeList", "Reason"))
    return Status(found["JobState"].split("+")[0], found.get("ExitCode", "0:0"), reason, nodes)


def cancel(name: str, seconds: float = 120.0, job: str | None = None) -> bool:
    """Cancels the jobs of that name, asking again while the controller does not answer; whether it took the order.

    By name, so that a job is reached whose submission was under way. With `job`, waits until that one has ended, too.
    """
    end = time.monotonic() + seconds
    taken = False
    while True:
        taken = taken or _scancel(name)
        if taken and (job is None or ((now := status(job)) is not None and now.is_final)):
            return True
        if time.monotonic() > end:
            return taken
        time.sleep(0.5)


def _scancel(name: str) -> bool:
    try:
        return subprocess.run(["scancel", "--quiet", f"--name={name}"], capture_output=True, timeout=ANSWER_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def fate_of(job: str, last: Status) -> Fate:
    """What a final state means for who started the job."""
    code, _, signal = last.code.partition(":")
    where = f"Slurm job {job}" + (f" on {last.nodes}" if last.nodes else "")
    goes_on = "Run it again: it goes on from its last shard or training checkpoint."
    match last.state:
        case "COMPLETED":
            return Fate(0)
        case "NODE_FAIL" | "BOOT_FAIL":
            return Fate(75, f"{where}: the node failed ({last.state}). {goes_on}")
        case "TIMEOUT" | "DEADLINE":
            return Fate(124, f"{where}: its time limit was reached ({last.state}). Give the step a longer time_limit. {goes_on}")
        case "OUT_OF_MEMORY":
            return Fate(137, f"{where}: it used more memory than it had asked for. Give the step more `memory`. {goes_on}")
        case "PREEMPTED":
            return Fate(75, f"{where}: it made room for another job (PREEMPTED). {goes_on}")
        case "CANCELLED":
            return Fate(143, f"{where}: it was cancelled.")
        case "UNKNOWN":
            return Fate(75, f"{where}: it ended while nobody watched, and the controller has forgotten how. {goes_on}")
    if signal not in ("", "0"):
        killed = "; SIGKILL is often the memory limit" if signal == "9" else ""
        return Fate(128 + int(signal), f"{where}: it was ended by signal {signal} ({last.state}{killed}). {goes_on}")
    return Fate(int(code or 1) or 1, f"{where}: its command failed with exit code {code} ({last.state}); the lines above say why.")


def environment() -> dict[str, str]:
    """What the job inherits: this process' variables, less those of an allocation around it and of the worker's channel to its child.

    Prefect's process worker hands its child a loopback port to talk to; on another host nothing listens there.
    """
    own = ("SLURM_", "SLURMD_", "PREFECT__CONTROL_")
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(own)}


class Log:
    """The job's output file, read as it grows."""

    def __init__(self, path: Path):
        self.path = path
        self._at, self._rest = 0, b""

    def lines(self, last: bool = False) -> list[str]:
        """Whole lines since the last call; with `last`, also one that has no end."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._at)
                new = file.read()
        except OSError:  # not there yet, or the file system is away for a moment: the lines come with a later call
            new = b""
        self._at += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        if last and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace").rstrip("\r") for line in whole]
