"""A real Slurm on one host, without systemd or cgroups: a controller and nodes with fake GPUs, in a folder of their own and on free ports."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

__all__ = ["Cluster", "wait_for", "whole_cluster"]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,bf_interval=1
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=30
KillWait=5
OverTimeLimit=0
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES
"""


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Waits for an event; generous, as the machine may be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


@contextmanager
def whole_cluster(folder: Path) -> Iterator["Cluster"]:
    """Two nodes with a GPU each; a failure, not a skip, where that cannot be had. At the end nothing of any job is left."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.fail(
            f"The Slurm tests need root, and these programs: {', '.join(missing) or 'all there'}. "
            "apt-get install slurmctld slurmd slurm-client munge. STAGEDIFF_INTEGRATION=0 leaves them out."
        )
    with Cluster(folder) as cluster:
        yield cluster
        wait_for(lambda: not cluster.jobs(), "the last jobs to end", seconds=60)
        wait_for(lambda: not cluster.job_processes(), "the processes of all jobs to be gone", seconds=60)


class Cluster:
    """`nodes` nodes named n1, n2, … with `gpus` fake GPUs each. Use it in a `with` statement, which stops what it started, by process id."""

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 1):
        self.folder, self.gpus = folder, gpus
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self._running: dict[str, subprocess.Popen] = {}
        self.env = {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._write()
            self._start("munged", "--foreground", "--force", *(f"--{n}={self.folder}/munge/{f}" for n, f in MUNGE.items()))
            wait_for(lambda: (self.folder / "munge" / "socket").exists(), "munged")
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self._idle() == len(self.nodes), "the nodes to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._running:
            self.call("scancel", "--quiet", "--user=root")
        for process in self.job_processes():
            process.kill()
        for name in reversed(list(self._running)):
            self._stop(name, signal.SIGTERM)

    def call(self, *command: str) -> str:
        """A Slurm command's output; empty where the controller is away."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=120)
        return done.stdout if not done.returncode else ""

    def jobs(self) -> list[str]:
        """Ids of jobs that have not ended."""
        return self.call("squeue", "--noheader", "--format=%i").split()

    def node_of(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--format=%N", f"--job={job}").strip()

    def start_controller(self) -> None:
        self._start("slurmctld", "-D")

    @property
    def has_controller(self) -> bool:
        return "slurmctld" in self._running

    def stop_controller(self) -> None:
        self._stop("slurmctld", signal.SIGTERM)

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As a power cut would: its daemon, and every process of its jobs."""
        processes = self.job_processes(node)
        for process in processes:  # first still, so that nobody reports another's death
            process.suspend()
        self._stop(node, signal.SIGKILL)
        for process in processes:
            process.kill()

    def revive_node(self, node: str) -> None:
        self.start_node(node)
        wait_for(lambda: self._idle() == len(self.nodes), "the node to be back")

    def job_processes(self, node: str | None = None) -> list[psutil.Process]:
        """Step daemons and the processes of jobs, on one node or all; daemons first. (A daemon itself does not tell whose it is.)"""
        own = {process.pid for process in self._running.values()}
        found: dict[psutil.Process, None] = {}
        jobs = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                if env.get("SLURM_CONF") != self.env["SLURM_CONF"] or "SLURM_JOB_ID" not in env or process.pid in own:
                    continue
                if node is None or env.get("SLURMD_NODENAME") == node:
                    jobs.append(process)
                    found.update((p, None) for p in process.parents() if p.cmdline()[:1] == ["slurmstepd:"])
            except psutil.Error:
                continue
        return [*found, *jobs]

    def _idle(self) -> int:
        return len(set(self.call("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split()))

    def _start(self, program: str, *arguments: str, name: str = "") -> None:
        path = shutil.which(program)
        assert path is not None
        # setpriv: should the tests be killed, the daemons end too
        with (self.folder / "log" / f"{name or program}.log").open("ab") as log:
            self._running[name or program] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", path, *arguments],
                env=os.environ | self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _stop(self, name: str, number: int) -> None:
        process = self._running.pop(name)
        process.send_signal(number)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _write(self) -> None:
        for name in ("state", "spool", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for i in range(self.gpus):  # must be character devices: these are /dev/null
            os.mknod(self.folder / f"gpu{i}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        host = socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=64000 Gres=gpu:{self.gpus}"
            for node, port in zip(self.nodes, ports, strict=True)
        )
        text = CONFIGURATION.format(host=host, controller=controller, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text.lstrip())
        (self.folder / "cgroup.conf").write_text("ConstrainCores=no\n")
        devices = [f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu{i}\n" for i in range(self.gpus)]
        (self.folder / "gres.conf").write_text("".join(devices))


MUNGE = {"key-file": "key", "socket": "socket", "seed-file": "seed", "pid-file": "pid", "log-file": "log"}


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
