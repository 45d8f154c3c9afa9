"""Puts the sub-commands together, and prints errors meant for people without a traceback."""

import logging
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from stagediff import __version__, steps
from stagediff.cli import bench, compiling, keeping, looking, runs, watching
from stagediff.errors import StagediffError

__all__ = ["app", "main"]

FIRST_STEPS = (
    "First steps: `stagediff demo` runs a whole built-in case. Then copy a file of configs/, put your models and data in, look at "
    "`stagediff plan mine.yaml`, and start `stagediff run mine.yaml`. Exit codes: 0 done, 1 failed, 2 wrong input."
)


class Commands(TyperGroup):
    """The built-in sub-commands and those of the rooms, which are imported only when they are called (or listed)."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*self.commands, *(name for name in steps.commands() if name not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _of_a_room(cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StagediffError as error:
            paragraph = re.sub(r"\s*\n\s*", " ", str(error).strip())
            Console(stderr=True, soft_wrap=True).print(Text("Error: ", "bold red") + Text(paragraph, "default"))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            print("Interrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
            raise typer.Exit(130) from None


def _of_a_room(name: str) -> Any:
    """The sub-command that a room registered under this name, or None."""
    target = steps.commands().get(name)
    if target is None:
        return None
    found = steps.resolve(target)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="stagediff",
    cls=Commands,
    help="Which features of a language model a finetune or a stretch of training changed, with proof.",
    epilog=FIRST_STEPS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": runs.run,
    "demo": runs.demo,
    "plan": runs.plan,
    "watch": watching.watch,
    "report": runs.report,
    "ls": looking.ls,
    "show": looking.show,
    "feature": looking.feature,
    "bench": bench.bench,
    "compile": compiling.compile_,
    "verify": keeping.verify,
    "gc": keeping.gc,
    "export": keeping.export,
    "import": keeping.import_,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


TWICE = 5.0
"""Seconds within which signals that end a command count as one."""
_interrupted = -TWICE - 1


def main() -> None:
    """Entry point. A terminal that closes and SIGTERM end a command as Ctrl-C does: what it has started ends with it."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _hang_up)
    app(prog_name="stagediff")


def _terminate(number: int, frame: Any) -> None:
    """Interrupts, unless one has just done so: shells and schedulers send such a signal twice, and the second would come in the midst of ending."""
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > TWICE:
        raise KeyboardInterrupt


def _hang_up(number: int, frame: Any) -> None:
    """Interrupts where the terminal is gone. Nothing may be written to it any more: that fails, and a step would be tried again, as after a disk's fault."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
    _terminate(number, frame)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress lines.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    logger = logging.getLogger("stagediff")
    if not logger.handlers:
        logger.addHandler(_handler())
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def _handler() -> logging.Handler:
    """Log lines on standard error: coloured in a terminal, plain and unwrapped in a file."""
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%H:%M:%S]")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    return handler
