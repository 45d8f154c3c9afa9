"""How the command runs a plan through Prefect: by itself on this machine, or seen in the UI where an API is configured."""

import logging
import os
from types import SimpleNamespace
from typing import Any

__all__ = ["run_plan"]

_ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "stagediff",  # the library's log lines reach the UI
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",  # or Prefect's client asks, in a terminal
}
_LEVELS = ("PREFECT_LOGGING_LEVEL", "PREFECT_INTERNAL_LOGGING_LEVEL", "PREFECT_SERVER_LOGGING_LEVEL")
"""Of its client, of its own machinery, and of its temporary server: on a machine that stands still for a minute the last two tell of nothing else."""


def _is_news(record: logging.LogRecord) -> bool:
    """Not what a failed step or flow run says to the terminal: its error is raised, and the command prints it, once. The UI gets both."""
    is_run = record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
    return not is_run or (record.levelno < logging.ERROR and "Finished in state Failed(" not in record.getMessage())


def _server_apart() -> None:
    """Lets Prefect start its temporary server in a session of its own.

    Ctrl-C in a terminal goes to every process of the session. Without its server the client goes on telling it for minutes that the run was interrupted.
    """
    import subprocess

    from prefect.server.api import server

    class Apart(subprocess.Popen):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options, start_new_session=True)

    names = {name: getattr(subprocess, name) for name in dir(subprocess) if not name.startswith("__")}
    server.subprocess = SimpleNamespace(**{**names, "Popen": Apart})  # type: ignore[assignment]


def run_plan(config: dict[str, Any], store: str, *, device: str = "auto", force: tuple[str, ...] = (), jobs: int = 1) -> None:
    """Runs the flow of the config's kind in this process; raises what its steps raise."""
    chosen = "PREFECT_LOGGING_LEVEL" in os.environ
    for name, value in _ENVIRONMENT.items():  # before Prefect is imported: it reads them once
        os.environ.setdefault(name, value)
    for name in _LEVELS:  # the command shows the library's lines, and errors in its own words
        os.environ.setdefault(name, "CRITICAL")
    from prefect import Flow
    from prefect.settings import get_current_settings

    from flows.both import both
    from flows.stagewise import stagewise
    from flows.track import track

    api = get_current_settings().api.url
    if api is None:
        _server_apart()
    elif not chosen:
        for logger in ("prefect", "prefect.extra"):
            logging.getLogger(logger).setLevel(logging.INFO)
        for handler in logging.getLogger().handlers:
            handler.addFilter(_is_news)
    flows: dict[str, Flow[..., str]] = {"stagewise": stagewise, "track": track, "both": both}
    flows[config["kind"]](config=config, store=store, device=device, force=list(force), jobs=jobs)
