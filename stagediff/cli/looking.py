"""Sub-commands that look into a store: ls, show, feature."""

from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from stagediff.cli.options import DEFAULT_STORE, AsJson, InStore, StoreArgument, check_kind, find, open_store
from stagediff.cli.output import indent, print_json, size
from stagediff.spec import Ref

__all__ = ["feature", "ls", "show"]

SHOWN_FILES = 50


def ls(
    store: StoreArgument,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="Only artifacts of this kind: dictionaries, diffs, …")] = None,
    as_json: AsJson = False,
) -> None:
    """Lists what a store holds."""
    check_kind(kind)
    opened = open_store(store)
    rows = list(opened.ls(kind))
    if as_json:
        print_json([{**row.__dict__, "state": row.state.value} for row in rows])
        return
    if not rows:
        print(f"{opened.objects.describe()} holds no {kind or 'artifacts'}.")
        return
    table = Table()
    for column in ("artifact", "step", "state"):
        table.add_column(column, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("created (UTC)", no_wrap=True)
    for row in rows:
        table.add_row(row.ref, row.step, row.state.value, size(row.bytes), row.created[:19].replace("T", " "))
    Console().print(table)
    print(f"{len(rows)} artifacts, {size(sum(row.bytes for row in rows))}.")


def show(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY", help="An artifact as `ls` shows it, or the start of its key: dictionaries/3f2a…, 3f2a.", show_default=False
        ),
    ],
    store: InStore = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Shows one artifact: figures, spec, files, origin."""
    artifact = find(open_store(store), key)
    manifest = artifact.manifest
    body = manifest.model_dump(mode="json")
    if as_json:
        print_json(body)
        return
    console = Console()
    created = manifest.created[:19].replace("T", " ")
    console.print(
        f"[bold]{artifact.ref}[/] {artifact.state.value}, made by step {manifest.step}, {size(manifest.size)}, {created} UTC",
        highlight=False,
    )
    for title, value in (
        ("figures", body["figures"]),
        ("notes", body["notes"]),
        ("made from", body["upstream"]),
        ("numerics", body["numerics"]),
        ("spec", body["spec"]),
    ):
        if value:
            console.print(f"[bold]{title}[/]")
            console.print(indent(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)), highlight=False, markup=False)
    files = Table("file", "size", "crc32c")
    files.columns[1].justify = "right"
    for file in manifest.files[:SHOWN_FILES]:
        files.add_row(file.path, "evicted" if file.evicted else size(file.bytes), file.crc32c)
    console.print(files)
    if len(manifest.files) > SHOWN_FILES:
        print(f"… and {len(manifest.files) - SHOWN_FILES} more files; --json lists all.")


def feature(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="A diff: diffs/<key> as `ls` shows it, or the start of its key.", show_default=False)
    ],
    index: Annotated[int, typer.Argument(metavar="INDEX", help="The feature's index, from 0.", show_default=False)],
    store: InStore = DEFAULT_STORE,
) -> None:
    """Shows one feature: cosines, densities, examples."""
    from stagediff.report.terminal import feature_card

    opened = open_store(store)
    artifact = find(opened, key, kind="diffs")
    Console().print(feature_card(opened, artifact.ref, {k: Ref(v) for k, v in artifact.manifest.spec["statistics"].items()}, index))
