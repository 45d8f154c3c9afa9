"""Who works on what: sessions with a heartbeat, and claims that refer to them.

Every writer of an artifact keeps one small object, its session: host, process, and the time of its last heartbeat. A claim ("I compute
shard 7") is the object `<what>/<epoch>`, made create-only, so that exactly one of several racers gets it; it names a session and
lives as long as that session does. A claim whose session is dead is not removed but outbid, by creating the next epoch.

A session is dead when it was closed, when its process is gone from this host (known at once, so that a killed run resumes without
waiting), or when its last heartbeat is older than the lease. Should a clock be wrong or a process be paused for longer than the lease, two
writers compute the same shard; nothing is damaged by that, since data objects are create-only and the manifest comes last.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from stagediff.store.names import SESSIONS
from stagediff.store.objects import Objects

__all__ = ["BEAT_SECONDS", "LEASE_SECONDS", "Claims", "Session", "is_alive"]

log = logging.getLogger("stagediff")

LEASE_SECONDS = 90.0
BEAT_SECONDS = 15.0


@cache
def _machine() -> str:
    """The same for processes that see one another's ids: host name, boot and (containers) process id namespace."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:  # not Linux
            continue
    return " ".join(parts)


def _process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot, so that a reused id is not taken for it; None: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"


class Session:
    """One writer's sign of life, kept in the artifact's `_work/writers/` until the artifact is committed."""

    def __init__(self, objects: Objects, artifact: str, numerics: dict[str, Any] | None = None):
        self.id = uuid.uuid4().hex
        self.host = socket.gethostname()
        self._objects = objects
        self._key = f"{artifact}/{SESSIONS}/{self.id}.json"
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._body = {
            "id": self.id,
            "machine": _machine(),
            "host": self.host,
            "pid": os.getpid(),
            "start": _process_start(os.getpid()),
            "started": time.time(),
            "numerics": numerics,
        }
        self._beat(closed=False)
        self._thread = threading.Thread(target=self._run, name=f"stagediff-heartbeat-{self.id[:8]}", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _beat(self, closed: bool) -> None:
        body = {**self._body, "beat": time.time(), "seconds": round(self.seconds, 3), "closed": closed}
        self._objects.put(self._key, json.dumps(body).encode())

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._beat(closed=False)
            except Exception as error:  # a missed beat costs at most a doubled shard; the work itself will meet the fault
                log.debug("heartbeat failed: %s", error)

    def close(self, keep: bool) -> None:
        """Ends the heartbeat; with `keep`, leaves word that this writer is gone, so that nobody waits for its lease."""
        self._stop.set()
        self._thread.join(timeout=BEAT_SECONDS)  # it may be caught in the retries of a store that does not answer
        if keep:
            try:
                self._beat(closed=True)
            except Exception as error:  # closing happens on the way out of another error, which matters more
                log.debug("could not close the session: %s", error)


def is_alive(body: dict[str, Any]) -> bool:
    """Whether a session's writer may still be at work."""
    if body.get("closed") or time.time() - body["beat"] > LEASE_SECONDS:
        return False
    return not (body["machine"] == _machine() and _process_start(body["pid"]) != body["start"])


class Claims:
    """Claims below one folder of an artifact: `<folder>/<what>/<epoch>`."""

    def __init__(self, objects: Objects, artifact: str, folder: str, session: Session):
        self._objects, self._artifact, self._session = objects, artifact, session
        self._folder = f"{artifact}/{folder}"
        self._dead: set[str] = set()
        self._seen: dict[str, int] | None = None

    def refresh(self) -> None:
        """Reads which epochs exist; `take` works on this picture and corrects itself when it is out of date."""
        self._seen = {}
        for key in self._objects.entries(self._folder):
            what, _, epoch = key.rpartition("/")
            self._seen[what] = max(self._seen.get(what, -1), int(epoch))

    def take(self, what: str) -> bool:
        """True when the claim is now this session's (or was already)."""
        if self._seen is None:
            self.refresh()
        assert self._seen is not None
        epoch = self._seen.get(what, -1)
        if epoch >= 0:
            owner = self._owner(what, epoch)
            if owner == self._session.id:
                return True
            if owner is not None and self.owner_alive(owner):
                return False
        if self._objects.create(f"{self._folder}/{what}/{epoch + 1:06d}", self._session.id.encode(), durable=False):
            self._seen[what] = epoch + 1
            return True
        self.refresh()
        return False

    def release(self, what: str) -> None:
        """Gives a claim back, by an epoch that nobody owns: epochs only count up, so that no two racers ever hold the same one."""
        if self._seen is not None and what in self._seen:
            self._objects.create(f"{self._folder}/{what}/{self._seen.pop(what) + 1:06d}", b"free", durable=False)
            self._seen = None

    def _owner(self, what: str, epoch: int) -> str | None:
        try:
            return self._objects.get(f"{self._folder}/{what}/{epoch:06d}").decode(errors="replace")
        except FileNotFoundError:
            return None

    def holder(self, what: str) -> dict[str, Any] | None:
        """The session that holds a claim, alive or not, as far as it can be read."""
        self.refresh()
        assert self._seen is not None
        owner = self._owner(what, self._seen[what]) if what in self._seen else None
        return self._read(owner) if owner else None

    def owner_alive(self, session: str) -> bool:
        if session in self._dead:
            return False
        body = self._read(session)
        alive = body is not None and is_alive(body)
        if not alive:
            self._dead.add(session)
        return alive

    def _read(self, session: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._objects.get(f"{self._artifact}/{SESSIONS}/{session}.json"))
        except (FileNotFoundError, ValueError):
            return None
