"""Faults of disks in words for people: a full disk, a place that may not be written."""

import errno
import shutil
from pathlib import Path

from stagediff.errors import UserError

__all__ = ["existing", "explained", "is_full"]

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed this process's or file system's size limit",
}


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room. Libraries that write in native code (safetensors) tell it in their text only."""
    return (isinstance(error, OSError) and error.errno in _FULL) or "No space left on device" in str(error)


def explained(error: BaseException, folder: Path) -> BaseException:
    """What to raise instead of an error of writing into `folder`: a UserError where its cause is known, else the error itself."""
    number = error.errno if isinstance(error, OSError) else None
    if is_full(error):
        free = shutil.disk_usage(existing(folder)).free
        what = _FULL.get(number or errno.ENOSPC, _FULL[errno.ENOSPC])
        return UserError(
            f"Could not write into {folder}: {what} ({free / 2**30:.1f} GiB free there). Nothing half-written was kept. "
            "Free some space (`stagediff gc` removes leftovers) or use another store, and run the same command again: it continues where it stopped."
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        assert isinstance(error, OSError)
        return UserError(
            f"Could not write into {folder}: {error.strerror}. Choose a store below a folder you may write to (--store), or change its permissions."
        )
    if number in (errno.ENOTDIR, errno.EEXIST) and not folder.is_dir():
        return UserError(
            f"The store needs the folder {folder}, but a file stands in its way: {existing(folder)}. Choose another store (--store), or move the file."
        )
    return error


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
