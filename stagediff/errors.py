"""Errors meant for people: one paragraph that says what was given, what was expected and what to do."""

__all__ = ["DamagedError", "StagediffError", "UserError"]


class StagediffError(Exception):
    """Base of all errors raised on purpose. The command prints its text without a traceback and exits with `exit_code`."""

    exit_code = 1


class UserError(StagediffError):
    """The input is wrong (a missing file, a bad column, shapes that do not fit). Trying again changes nothing."""

    exit_code = 2


class DamagedError(StagediffError):
    """Stored data does not match its recorded size or checksum. Computing the artifact again (`force`) heals it."""
