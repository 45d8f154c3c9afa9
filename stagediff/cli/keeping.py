"""Sub-commands that keep a store in order and move dictionaries in and out: verify, gc, export, import."""

from pathlib import Path
from typing import Annotated

import typer

from stagediff import steps
from stagediff.cli.options import DEFAULT_STORE, AsJson, InStore, StoreArgument, find, open_store
from stagediff.cli.output import print_json, size
from stagediff.errors import UserError
from stagediff.store import Store

__all__ = ["export", "gc", "import_", "verify"]


def verify(
    store: StoreArgument,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Only this artifact.")] = None,
    as_json: AsJson = False,
) -> None:
    """Reads every byte of a store and checks it.

    Exit code 1 if anything is damaged. `stagediff run CONFIG --force STEP` computes a damaged step again.
    """
    opened = open_store(store)
    checked = list(opened.verify([opened.find(key)] if key else None))
    if not checked:
        raise UserError(f"{opened.objects.describe()} holds no artifacts, so there is nothing to check. Give the root of a store.")
    problems = [{"artifact": str(ref), "problem": str(problem)} for ref, _, found in checked for problem in found]
    if as_json:
        print_json({"checked": len(checked), "problems": problems})
    else:
        for row in problems:
            print(f"{row['artifact']}: {row['problem']}")
        print(f"{len(checked)} artifacts checked, {len(problems)} problems.")
    if problems:
        raise typer.Exit(1)


def gc(
    store: StoreArgument,
    older_than: Annotated[float, typer.Option(metavar="HOURS", min=0, help="Only what nothing was written to for so long.")] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Removes leftovers from a store.

    These are: unfinished artifacts that nobody works on (a rerun would continue from them), quarantine (what --force replaced), and temporary files of killed
    runs. Finished artifacts stay.
    """
    removed = open_store(store).collect_garbage(older_than=older_than * 3600, dry_run=dry_run)
    if as_json:
        print_json([item.__dict__ for item in removed])
        return
    for item in removed:
        print(f"{item.path}: {item.why}, {size(item.bytes)}")
    print(f"{len(removed)} {'would be removed' if dry_run else 'removed'}, {size(sum(item.bytes for item in removed))}.")


def export(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY", help="A dictionary: dictionaries/<key> as `ls` shows it, or the start of its key.", show_default=False
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.", show_default=False)],
    to: Annotated[
        str, typer.Option("--format", "--to", metavar="FORMAT", help="saelens, dictionary_learning or sparsify (topk only).")
    ] = "saelens",
    store: InStore = DEFAULT_STORE,
) -> None:
    """Writes a dictionary in another library's format."""
    from stagediff.sae import formats

    opened = open_store(store)
    formats.export(find(opened, key, kind="dictionaries"), folder, opened, to)
    print(f"Wrote {folder}.")


def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="An SAE saved by SAELens, dictionary_learning or sparsify.", show_default=False)
    ],
    store: InStore = DEFAULT_STORE,
) -> None:
    """Takes a dictionary of another library into a store.

    Which library saved it, its files tell. Prints its reference. (A run that is to start from it names the folder itself, as `start:` in its config.)
    """
    from stagediff.sae.formats import resolve_import

    print(steps.run(resolve_import(str(folder)), Store(store), device="cpu"))
