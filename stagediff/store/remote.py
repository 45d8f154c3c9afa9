"""Blobs behind a URL, through fsspec: s3://bucket/prefix above all.

An S3 PUT is atomic by itself, and create-only with `If-None-Match: *`. A reply can get lost after the PUT has taken effect; the retry is then told 412
although it won, so before a refusal is believed the stored bytes are compared. Listings are never cached. Single faults are retried inside s3fs; a fault that
lasts is retried here with growing pauses, but only once the store has answered at all: a wrong bucket, endpoint or key is an error at once.

fsspec's client does not survive a fork: it is opened lazily, in each process anew.
"""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from stagediff.errors import StagediffError, UserError
from stagediff.store.objects import Entry, Objects

__all__ = ["RemoteObjects"]

log = logging.getLogger("stagediff")

T = TypeVar("T")

_AT_ONCE = 16
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_UPLOAD = "?uploadId="
_LASTING = {errno.EINVAL, errno.ENOSYS, errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""Error numbers that trying again does not change."""
_WRONG_SETTINGS = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoRegionError", "ProfileNotFound"}


class RemoteObjects(Objects):
    """Objects below a bucket and prefix.

    Parameters
    ----------
    retry_seconds
        How long a fault is retried before it is raised.
    options
        For fsspec's file system.
    """

    is_local = False

    def __init__(self, root: str, retry_seconds: float = 300.0, **options: Any):
        self._protocol, _, path = root.partition("://")
        self._base = path.strip("/")
        self.root = f"{self._protocol}://{self._base}"
        self._retry_seconds, self._options = retry_seconds, options
        self._opened: tuple[int, Any] | None = None
        if "@" in self._base.partition("/")[0]:  # not shown: it may be a secret
            raise UserError(
                f"The store's URL ({self._protocol}://…@…) must not hold credentials: it is written into manifests and logs. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
            )
        if not self._base:
            raise UserError(f"The store {root!r} names no bucket. Expected something like {self._protocol}://bucket/prefix.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.root, self._retry_seconds, self._options)

    @property
    def _fs(self) -> Any:
        """The client of this process; the first use checks that the bucket can be listed."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            try:
                fs = fsspec.filesystem(self._protocol, use_listings_cache=False, skip_instance_cache=True, **self._options)
            except (ValueError, ImportError, TypeError) as error:
                raise UserError(
                    f"The store {self.root!r} cannot be opened: {_short(error)}. Use a local path or s3://bucket/prefix."
                ) from error
            try:
                self._check(fs)
            except ValueError as error:  # botocore's word for an address that is none
                raise UserError(
                    f"The store {self.root} cannot be opened: {_short(error)}. Expected AWS_ENDPOINT_URL to be a URL like http://host:9000, or not set."
                ) from error
            except Exception as error:
                raise self._explained(error, "open") from error
            self._opened = (os.getpid(), fs)
        return self._opened[1]

    def _check(self, fs: Any) -> None:
        """One small listing: it tells a missing bucket, refused credentials and a dead endpoint apart, which a HEAD does not."""
        if self._is_s3:
            bucket, _, prefix = self._base.partition("/")
            fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)

    @property
    def _is_s3(self) -> bool:
        return self._protocol in ("s3", "s3a")

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base

    def _call(self, what: str, action: Callable[[Any], T]) -> T:
        """Runs an action on the client, again while faults are of the passing kind and time is left."""
        fs = self._fs
        deadline, pause = time.monotonic() + self._retry_seconds, _FIRST_PAUSE
        while True:
            try:
                return action(fs)
            except (FileNotFoundError, FileExistsError, EOFError):
                raise
            except Exception as error:
                if not _may_pass(error) or time.monotonic() + pause > deadline:
                    raise self._explained(error, what) from error
                log.warning("%s: could not %s (%s); trying again in %.0f s", self.root, what, _short(error), pause)
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)

    def _explained(self, error: Exception, what: str) -> Exception:
        names = {type(e).__name__ for e in (error, error.__cause__) if e is not None}
        code = _code(error)
        bucket = self._base.partition("/")[0]
        if "NoCredentialsError" in names or "PartialCredentialsError" in names:
            return UserError(
                f"No credentials for {self.root} were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile in ~/.aws), then run again."
            )
        if code == "NoSuchBucket" or (what == "open" and isinstance(error, FileNotFoundError)):
            return UserError(f"The bucket {bucket!r} of the store {self.root} does not exist. Create it, or correct the store's URL.")
        if isinstance(error, PermissionError):
            return UserError(
                f"The store {self.root} refused to {what} ({code or 'access denied'}: {_short(error)}). "
                "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, and that they may list, read, write and delete in this bucket."
            )
        if "EndpointConnectionError" in names or "ConnectTimeoutError" in names or (what == "open" and _may_pass(error)):
            return UserError(
                f"The store {self.root} does not answer ({_short(error)}). Check the network and AWS_ENDPOINT_URL, then run again: what is done is kept."
            )
        if code in ("InvalidBucketName",) or "ParamValidationError" in names:
            return UserError(f"{bucket!r} in {self.root} cannot be a bucket's name ({_short(error)}). Correct the store's URL.")
        if _may_pass(error):
            return StagediffError(
                f"The store {self.root} could not {what} for {self._retry_seconds:.0f} seconds ({_short(error)}). "
                "Run again when it works: what is done is kept."
            )
        return error

    def put(self, key: str, *parts: Any) -> None:
        body = _joined(parts)
        self._call(f"write {key}", lambda fs: fs.pipe_file(self._path(key), body))

    def create(self, key: str, *parts: Any, durable: bool = True) -> bool:
        body = _joined(parts)
        try:
            self._call(f"write {key}", lambda fs: _create(lambda: fs.pipe_file(self._path(key), body, mode="create")))
        except FileExistsError:
            return self.size(key) == len(body) and self.get(key) == body
        return True

    def create_file(self, key: str, path: Path) -> bool:
        try:
            self._call(f"write {key}", lambda fs: _create(lambda: fs.put_file(str(path), self._path(key), mode="create")))
        except FileExistsError:
            return False  # the caller compares contents
        return True

    def put_made(self, folder: str, make: Callable[[Path], str]) -> str:
        with tempfile.TemporaryDirectory(prefix="stagediff-") as temporary:
            path = Path(temporary) / "object"
            key = f"{folder}/{make(path)}"
            self._call(f"write {key}", lambda fs: fs.put_file(str(path), self._path(key)))
        return key

    def get(self, key: str) -> bytes:
        return self._call(f"read {key}", lambda fs: fs.cat_file(self._path(key)))

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        flat = [b.cast("B") for b in buffers]
        total = sum(b.nbytes for b in flat)
        if not total:
            return

        def read(fs: Any) -> bytes:
            try:
                body = fs.cat_file(self._path(key), start=offset, end=offset + total)
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):
                    raise EOFError(f"{self.describe(key)} ends before byte {offset}") from error
                raise
            if len(body) < total:
                raise EOFError(f"{self.describe(key)} ends at byte {offset + len(body)}")
            return body

        body = memoryview(self._call(f"read {key}", read))
        start = 0
        for buffer in flat:
            buffer[:] = body[start : start + buffer.nbytes]
            start += buffer.nbytes

    def size(self, key: str) -> int | None:
        def head(fs: Any) -> int:
            if self._is_s3:  # fs.info would ask a second time, for a folder
                bucket, _, name = self._path(key).partition("/")
                return int(fs.call_s3("head_object", Bucket=bucket, Key=name)["ContentLength"])
            return int(fs.info(self._path(key))["size"])

        try:
            return self._call(f"look up {key}", head)
        except FileNotFoundError:
            return None

    def entries(self, prefix: str) -> dict[str, Entry]:
        path = self._path(prefix)
        try:
            found = self._call(f"list {prefix or 'the store'}", lambda fs: fs.find(path, detail=True))
        except FileNotFoundError:
            return {}
        start = len(path) + 1
        names = {name: name.lstrip("/")[start:] for name in found if not name.endswith("/")}
        return {
            key: Entry(int(found[name]["size"] or 0), _modified(found[name]), str(found[name].get("ETag", "")))
            for name, key in names.items()
            if key
        }

    def folders(self, prefix: str) -> list[str]:
        path = self._path(prefix)
        try:
            found = self._call(f"list {prefix or 'the store'}", lambda fs: fs.ls(path, detail=True))
        except FileNotFoundError:
            return []
        return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._call(f"delete {key}", lambda fs: fs.rm_file(self._path(key)))

    def delete_tree(self, prefix: str, first: Sequence[str] = ()) -> None:
        for key in first:
            self.delete(f"{prefix}/{key}")
        self._at_once(lambda key: self.delete(f"{prefix}/{key}"), self.entries(prefix))

    def move_tree(self, source: str, target: str, first: Sequence[str] = ()) -> None:
        def copy(key: str) -> None:
            self._call(f"copy {source}/{key}", lambda fs: fs.cp_file(self._path(f"{source}/{key}"), self._path(f"{target}/{key}")))

        stored = self.entries(source)
        for key in first:
            if key in stored:
                copy(key)
                self.delete(f"{source}/{key}")
        rest = [key for key in stored if key not in first]
        self._at_once(copy, rest)
        self._at_once(lambda key: self.delete(f"{source}/{key}"), rest)

    def _at_once(self, action: Callable[[str], None], keys: Any) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(action, list(keys)))

    def leftovers(self) -> dict[str, Entry]:
        if not self._is_s3:
            return {}
        bucket, _, prefix = self._base.partition("/")
        answer = self._call(
            "list unfinished uploads", lambda fs: fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "")
        )
        start = len(prefix) + 1 if prefix else 0
        return {f"{u['Key'][start:]}{_UPLOAD}{u['UploadId']}": Entry(0, u["Initiated"].timestamp()) for u in answer.get("Uploads", [])}

    def delete_leftover(self, key: str) -> None:
        name, _, upload = key.rpartition(_UPLOAD)
        bucket, _, path = self._path(name).partition("/")
        with suppress(FileNotFoundError):
            self._call(
                f"abort the upload of {name}", lambda fs: fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=path, UploadId=upload)
            )

    def free_bytes(self) -> None:
        return None

    def local_path(self, key: str) -> None:
        return None

    def download(self, key: str, path: Path) -> None:
        self._call(f"read {key}", lambda fs: fs.get_file(self._path(key), str(path)))

    def describe(self, key: str = "") -> str:
        return f"{self.root}/{key}" if key else self.root


def _open(root: str, retry_seconds: float, options: dict[str, Any]) -> RemoteObjects:
    return RemoteObjects(root, retry_seconds, **options)


def _joined(parts: Sequence[Any]) -> bytes:
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)


def _create(put: Callable[[], Any]) -> None:
    """A create-only PUT, with "somebody was faster" always as FileExistsError."""
    try:
        put()
    except OSError as error:
        if _code(error) in ("PreconditionFailed", "412"):
            raise FileExistsError(*error.args) from error
        raise


def _code(error: BaseException) -> str | None:
    """The S3 error code behind an exception that s3fs translated."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
    return None


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may help: everything but refusals, wrong requests and a full local disk."""
    if isinstance(error, PermissionError | FileNotFoundError | FileExistsError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _LASTING
    module = type(error).__module__
    if module.startswith(("botocore", "aiobotocore")):
        return type(error).__name__ not in _WRONG_SETTINGS
    return module.startswith(("aiohttp", "urllib3", "fsspec"))


def _short(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _modified(info: dict[str, Any]) -> float:
    when: Any = info.get("LastModified") or info.get("created") or info.get("mtime")
    return when.timestamp() if hasattr(when, "timestamp") else float(when or 0.0)
