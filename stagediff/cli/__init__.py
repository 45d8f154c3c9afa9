"""The command `stagediff`. Exit codes: 0 done, 1 failed, 2 wrong input.

`app` puts the sub-commands together: `runs` (run, demo, plan, report), `looking` (ls, show, feature), `keeping` (verify, gc, export, import), and those
that rooms registered. `options` holds what several of them take, `output` how sizes, times and JSON are printed.
"""

from stagediff.cli.app import app, main
from stagediff.cli.runs import builtin_config

__all__ = ["app", "builtin_config", "main"]
