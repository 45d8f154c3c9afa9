"""Prefect server on PostgreSQL as plain processes, for a machine without containers.

    python -m infra.server.plain DIR [--port 4200]

Makes the database in DIR on the first start, and runs both until it gets SIGTERM or SIGINT; started again, it goes on with what is there, and
ends first what it left running where it was killed. The database listens on a socket in DIR only, a folder that nobody else can enter, so there
is no password to keep. The API listens on this machine only unless --host says otherwise, and then it must have a password
(PREFECT_SERVER_API_AUTH_STRING in the environment). PostgreSQL does not run as root: started by root, it runs as the user `postgres` that its
package makes.
"""

import argparse
import ipaddress
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from infra.server.folder import MARK, SIGNALS, ServerError, end_leftovers, lock

__all__ = ["Server", "ServerError", "main"]

START_SECONDS = 300.0
SOCKET_LONGEST = 90
"""Characters of a folder in which a socket can lie: the system's limit for its whole path is 107."""
PASSWORD = "PREFECT_SERVER_API_AUTH_STRING"


def program(name: str) -> str:
    """A program of PostgreSQL: on PATH, or where Debian puts the newest version's."""
    candidates = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: float(p.parts[-3]))
    found = str(candidates[-1]) if candidates else shutil.which(name)
    if found is None:
        raise ServerError(f"PostgreSQL's {name} was not found. apt-get install postgresql (14.9 or newer), or put its bin folder on PATH.")
    return found


def check_host(host: str) -> None:
    """Raises ServerError where the API would be open to other machines without a password."""
    if is_loopback(host) or os.environ.get(PASSWORD, "").strip(" :"):
        return
    raise ServerError(
        f"--host {host} opens the API to other machines, and it has no password: whoever reaches it could run commands here. Give it one first: "
        f"export {PASSWORD}=NAME:$(openssl rand -hex 24), and the same as PREFECT_API_AUTH_STRING wherever a command or worker runs. "
        "Or leave --host out: then only this machine reaches it."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there: an address, or a name of which all addresses are so."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)} if host else set()
    except (OSError, UnicodeError):  # an unknown name: the server will say so itself, if it can't listen there
        addresses = set()
    return bool(addresses) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


class Server:
    """PostgreSQL and a Prefect server in a folder. Use it in a `with` statement; leaving it stops both."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 4200, python: str = sys.executable):
        self.folder, self.host, self.port, self._python = folder.absolute(), host, port, python
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: TextIO | None = None
        check_host(host)
        if len(str(self.folder / "socket")) > SOCKET_LONGEST:
            raise ServerError(f"{self.folder} is too long a path for the database's socket; choose one of at most 80 characters.")

    @property
    def url(self) -> str:
        """The API's address, for PREFECT_API_URL on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}/api"

    def __enter__(self) -> "Server":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        try:
            if ended := self._end_leftovers():
                print(f"ended what a killed server had left running in {self.folder}: {', '.join(ended)}", file=sys.stderr)
            self._start_database()
            self._start_prefect()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The server first, then the database; then the folder is free again."""
        for name, number in SIGNALS.items():
            process = self._running.pop(name, None)
            if process is None or process.poll() is not None:
                continue
            process.send_signal(number)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._lock is not None:
            self._end_leftovers()  # of a process that was killed, what it had started
            self._lock.close()
            self._lock = None

    def ended(self) -> str | None:
        """The name of a process that has ended by itself."""
        return next((name for name, process in self._running.items() if process.poll() is not None), None)

    @property
    def _data(self) -> Path:
        return self.folder / "postgres"

    def _end_leftovers(self) -> list[str]:
        return end_leftovers(self.folder, self._data)

    def _start_database(self) -> None:
        data, sockets = self._data, self.folder / "socket"
        for path in (self.folder, data, sockets):
            path.mkdir(parents=True, exist_ok=True)
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                raise ServerError("PostgreSQL does not run as root, and there is no user `postgres`. Start this as another user.") from None
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            for path in (data, sockets):
                os.chown(path, user.pw_uid, user.pw_gid)
            self.folder.chmod(0o711)  # the user postgres passes through
        for path in (data, sockets):
            path.chmod(0o700)
        if not (data / "PG_VERSION").exists():
            initdb = [program("initdb"), f"--pgdata={data}", "--username=prefect", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            self._once("initdb", initdb, as_user)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={sockets}", "-c", "unix_socket_permissions=0700"]
        self._spawn("postgres", [program("postgres"), "-D", str(data), *options, "-c", "max_connections=200"], as_user)
        ready = [program("pg_isready"), f"--host={sockets}", "--username=prefect", "--dbname=postgres", "--quiet"]
        self._await("postgres", lambda: subprocess.run(ready).returncode == 0)
        known = [program("psql"), f"--host={sockets}", "--username=prefect", "--dbname=postgres", "--tuples-only", "--no-align"]
        found = subprocess.run([*known, "--command=select 1 from pg_database where datname = 'prefect'"], capture_output=True, text=True)
        if found.stdout.strip() != "1":
            self._once("createdb", [program("createdb"), f"--host={sockets}", "--username=prefect", "prefect"], {})

    def _start_prefect(self) -> None:
        home = self.folder / "prefect"
        home.mkdir(exist_ok=True)
        home.chmod(0o700)
        env = {
            MARK: str(self.folder),
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect@/prefect?host={self.folder / 'socket'}",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        command = [self._python, "-m", "prefect", "server", "start", "--host", self.host, "--port", str(self.port)]
        inherited = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_PROFILE")}
        self._spawn("prefect", command, {"env": inherited | env})
        self._await("prefect", self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return bool(response.status == 200)
        except urllib.error.HTTPError:  # it wants a password: it is there
            return True
        except OSError:
            return False

    def _spawn(self, name: str, command: Sequence[str], options: dict[str, Any]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", start_new_session=True, **options
            )

    def _once(self, name: str, command: Sequence[str], options: dict[str, Any]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **options)
        if done.returncode:
            raise ServerError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")

    def _await(self, name: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            if self._running[name].poll() is not None or time.monotonic() > end:
                tail = "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-10:])
                raise ServerError(f"{name} does not start; its log ({self.folder / f'{name}.log'}) ends so:\n{tail}")
            time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both until told to stop; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.server.plain", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4200)
    given = parser.parse_args(argv)

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        with Server(given.folder, given.host, given.port) as server:
            print(f"ready: export PREFECT_API_URL={server.url}", flush=True)
            while (name := server.ended()) is None:
                time.sleep(1)
            print(f"{name} has ended by itself; see {server.folder / f'{name}.log'}", file=sys.stderr)
            return 1
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
