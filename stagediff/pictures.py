"""Where a command's `--out` goes: checked before anything is computed."""

import os
from pathlib import Path

from stagediff.errors import UserError

__all__ = ["checked"]


def checked(out: Path) -> Path:
    """`out`, its folder made. Raises UserError where no file can be written there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise UserError(
            f"The picture cannot be written to {out} ({error.strerror}). Give a file in a folder that can be written: --out."
        ) from None
    return out
