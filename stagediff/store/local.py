"""Blobs as files of a local (or network) file system.

A write goes to a temporary file in the same folder, is fsynced, and takes its name by rename (replacing) or hard link (create-only:
the one operation of which exactly one racer succeeds); then the folder is fsynced. A killed writer leaves a `*.partial` file, never a
torn object. fsspec's own `file://` writes in place and tears, hence this class.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from stagediff.errors import UserError
from stagediff.store.faults import existing, explained
from stagediff.store.names import PARTIAL
from stagediff.store.objects import Entry, Objects

__all__ = ["LocalObjects"]

_COPY_BLOCK = 8 << 20
_IOV = 512
"""Buffers per preadv call; systems allow 1024."""
_TRIES = 5

P = ParamSpec("P")
R = TypeVar("R")


def _again_if_folder_goes(write: Callable[P, R]) -> Callable[P, R]:
    """Writes once more when another process removed the folder under the writer's feet (a commit drops `_work/`)."""

    @wraps(write)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_TRIES - 1):
            with suppress(FileNotFoundError):
                return write(*args, **kwargs)
        try:
            return write(*args, **kwargs)
        except FileNotFoundError as error:
            raise UserError(
                f"Could not write {error.filename}: its folder cannot be made, or goes away again and again. Choose another store (--store)."
            ) from error

    return wrapped


class LocalObjects(Objects):
    """Files below a root folder, which is made on the first write."""

    is_local = True

    def __init__(self, root: str):
        self.root = root
        self._base = Path(root).expanduser().absolute()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalObjects, (self.root,)

    def _path(self, key: str) -> Path:
        return self._base / key if key else self._base

    @contextmanager
    def _temporary(self, folder: Path) -> Iterator[Path]:
        """A free name in the folder; errors of the disk become clear, and the file is removed if it still has that name."""
        path = folder / f".{uuid.uuid4().hex}{PARTIAL}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            raise explained(error, folder) from error
        finally:
            with suppress(OSError):  # mostly it has another name by now
                path.unlink()

    def _write(self, path: Path, parts: Sequence[Any], durable: bool) -> None:
        with open(path, "wb", buffering=0) as f:
            for part in parts:
                view = memoryview(part).cast("B")
                while view.nbytes:
                    view = view[f.write(view) :]
            if durable:
                os.fsync(f.fileno())

    @_again_if_folder_goes
    def put(self, key: str, *parts: Any) -> None:
        path = self._path(key)
        with self._temporary(path.parent) as temporary:
            self._write(temporary, parts, durable=True)
            os.replace(temporary, path)
            _sync_folder(path.parent)

    @_again_if_folder_goes
    def create(self, key: str, *parts: Any, durable: bool = True) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        with self._temporary(path.parent) as temporary:
            self._write(temporary, parts, durable)
            return self._link(temporary, path, durable)

    def _link(self, temporary: Path, path: Path, durable: bool) -> bool:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise UserError(
                    f"The file system of {self._base} has no hard links, without which racing writers cannot be told apart. "
                    "Use a store on another file system, or on s3://."
                ) from error
            raise
        if durable:
            _sync_folder(path.parent)
        return True

    def create_file(self, key: str, path: Path) -> bool:
        target = self._path(key)
        if target.exists():
            return False
        with self._temporary(target.parent) as temporary:
            with open(path, "rb") as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, _COPY_BLOCK)
                copy.flush()
                os.fsync(copy.fileno())
            return self._link(temporary, target, durable=True)

    def put_made(self, folder: str, make: Callable[[Path], str]) -> str:
        place = self._path(folder)
        with self._temporary(place) as temporary:
            name = make(temporary)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, place / name)
            _sync_folder(place)
        return f"{folder}/{name}"

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        file = os.open(self._path(key), os.O_RDONLY)
        try:
            for start in range(0, len(buffers), _IOV):
                rest = [b.cast("B") for b in buffers[start : start + _IOV]]
                while rest:
                    n = os.preadv(file, rest, offset)
                    if n == 0 and any(b.nbytes for b in rest):
                        raise EOFError(f"{self._path(key)} ends at byte {offset}")
                    offset += n
                    while rest and n >= rest[0].nbytes:
                        n -= rest.pop(0).nbytes
                    if rest:
                        rest[0] = rest[0][n:]
        finally:
            os.close(file)

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def entries(self, prefix: str) -> dict[str, Entry]:
        return {key: entry for key, entry in self._walk(self._path(prefix)) if not key.endswith(PARTIAL)}

    def _walk(self, base: Path) -> Iterator[tuple[str, Entry]]:
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(base / folder) as found:
                    for item in found:
                        key = f"{folder}/{item.name}" if folder else item.name
                        if item.is_dir(follow_symlinks=False):
                            folders.append(key)
                            continue
                        try:
                            status = item.stat()
                        except FileNotFoundError:  # removed or renamed since
                            continue
                        yield key, Entry(status.st_size, status.st_mtime)
            except (FileNotFoundError, NotADirectoryError):
                continue

    def folders(self, prefix: str) -> list[str]:
        try:
            return sorted(item.name for item in os.scandir(self._path(prefix)) if item.is_dir())
        except FileNotFoundError:
            return []

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def delete_tree(self, prefix: str, first: Sequence[str] = ()) -> None:
        for key in first:
            self.delete(f"{prefix}/{key}")
        # A racing writer may add files while the tree goes; two passes leave nothing that was there at the start.
        shutil.rmtree(self._path(prefix), ignore_errors=True)
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def move_tree(self, source: str, target: str, first: Sequence[str] = ()) -> None:
        place = self._path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self._path(source), place)  # at once, so `first` needs no care
        _sync_folder(place.parent)

    def leftovers(self) -> dict[str, Entry]:
        return {key: entry for key, entry in self._walk(self._base) if key.endswith(PARTIAL)}

    def delete_leftover(self, key: str) -> None:
        self.delete(key)

    def free_bytes(self) -> int:
        return shutil.disk_usage(existing(self._base)).free

    def local_path(self, key: str) -> Path:
        return self._path(key)

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self._path(key), path)

    def describe(self, key: str = "") -> str:
        return str(self._path(key))


def _sync_folder(folder: Path) -> None:
    """Makes a new name survive a power loss."""
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
