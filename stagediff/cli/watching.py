"""`stagediff watch`: looks for new checkpoints again and again, and runs what they call for."""

import logging
import time
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.cli.options import AsJson, ConfigFile, Device, RunnerName, Sets, StoreUrl, load
from stagediff.cli.output import print_json
from stagediff.cli.runs import start
from stagediff.config import RunConfig, parse_config
from stagediff.errors import StagediffError, UserError

if TYPE_CHECKING:
    from stagediff.watch.watcher import Due, Look, Watcher

__all__ = ["watch"]

log = logging.getLogger("stagediff")

Once = Annotated[bool, typer.Option("--once", help="Look once, run what is new, and end.")]
Deploy = Annotated[
    str | None,
    typer.Option(
        "--deploy",
        metavar="POOL",
        help="Instead of watching here: register this watch with the Prefect API, to be run by the work pool's workers on schedule and at every "
        "announced checkpoint.",
    ),
]


def watch(
    config: ConfigFile,
    store: StoreUrl = None,
    set_: Sets = None,
    device: Device = "auto",
    runner: RunnerName = "prefect",
    once: Once = False,
    deploy: Deploy = None,
    as_json: AsJson = False,
) -> None:
    """Waits for a training run's checkpoints and runs what each calls for.

    The config's `watch` says where they appear. Each new one extends a tracked chain, or is diffed against the base model of a stage-wise run.
    May be stopped at any time: the same command goes on where it stopped.
    """
    from stagediff.watch.watcher import Watcher

    loaded = load(config, store, set_)
    watcher = Watcher(loaded)
    if deploy is not None and once:
        raise UserError("--once looks once, here; --deploy has a work pool look again and again. Give one of them.")
    if deploy is not None:
        _deploy(loaded, deploy, device)
        return
    watcher.store.check_writable()
    told: dict[int, str] = {}
    first = True
    while True:
        look = _look(watcher, first)
        if look is not None:
            if once:
                _check_usable(watcher, look)
            _tell(look, told)
            ran = [done for due in watcher.due(look) if (done := _run(watcher, due, device, runner, once))]
            if once:
                _end(watcher, look, ran, as_json)
                return
        first = False
        time.sleep(watcher.settings.every)


def _look(watcher: "Watcher", first: bool) -> "Look | None":
    """One look; None where the place does not answer for the moment. What is wrong at the first look is an error."""
    try:
        return watcher.look()
    except StagediffError as error:
        if first:
            raise
        log.warning("%s The next look is in %.0f s.", error, watcher.settings.every)
        return None


def _check_usable(watcher: "Watcher", look: "Look") -> None:
    """Raises UserError where checkpoints are there and none of them can be used."""
    refused = look.having("refused")
    if refused and not look.having("taken", "complete", "settling", "gone"):
        raise UserError(f"No checkpoint in {watcher.settings.source} can be used. {refused[0].where}: {refused[0].why}.")


def _tell(look: "Look", told: dict[int, str]) -> None:
    """What is new since the last look, one line each."""
    for seen in look.seen:
        if told.get(seen.step) != seen.state and seen.state not in ("taken", "gone"):
            (log.warning if seen.state in ("refused", "late") else log.info)(
                "checkpoint %d: %s%s (%s)", seen.step, seen.state, f", {seen.why}" if seen.why else "", seen.where
            )
        told[seen.step] = seen.state
    if look.waits_for:
        log.info("waiting for %s", look.waits_for)


def _run(watcher: "Watcher", due: "Due", device: str, runner: str, once: bool) -> dict[str, Any] | None:
    """None where it failed: the next look tries again, and the checkpoints after it have their turn. With `once` it raises."""
    log.info("checkpoint %d: %d of %d steps to run", due.step, due.missing, len(due.plan.nodes))
    try:
        start(parse_config(due.config), due.plan, watcher.store, device, [], runner)
    except (StagediffError, OSError) as error:
        if once:
            raise
        log.error("checkpoint %d: %s The next look, in %.0f s, tries again.", due.step, error, watcher.settings.every)
        return None
    report = watcher.store.artifact(due.plan["report"].ref).local("index.html")
    log.info("checkpoint %d: done, report %s", due.step, report)
    return {"step": due.step, "report": str(report)}


def _end(watcher: "Watcher", look: "Look", ran: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        seen = [{"step": s.step, "where": s.where, "state": s.state, "why": s.why} for s in look.seen]
        print_json({"checkpoints": seen, "waits_for": look.waits_for, "ran": ran})
    elif ran:
        print(f"Done up to checkpoint {ran[-1]['step']}. Report: {ran[-1]['report']}")
    elif look.waits_for or not look.seen:
        print(f"Nothing to run yet in {watcher.settings.source}: waiting for {look.waits_for or 'the first checkpoint'}.")
    else:
        print("Nothing new.")


def _deploy(config: RunConfig, pool: str, device: str) -> None:
    found = next(iter(entry_points(group="stagediff.watchers", name="prefect")), None)
    if found is None:
        raise UserError("--deploy needs the Prefect part of stagediff, which is not installed. Install stagediff anew (pip install -e .).")
    body = config.model_dump(mode="json", exclude={"extensions"}) | config.extensions
    print(found.load()(body, pool=pool, device=device))
