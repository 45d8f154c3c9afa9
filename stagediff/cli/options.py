"""What several sub-commands take: config file, store, overrides, device, and how they are opened."""

from pathlib import Path
from typing import Annotated

import typer

from stagediff import steps
from stagediff.config import RunConfig, load_config, overrides
from stagediff.errors import UserError
from stagediff.store import Artifact, Store

__all__ = [
    "DEFAULT_STORE",
    "AsJson",
    "ConfigFile",
    "Device",
    "Force",
    "InStore",
    "Jobs",
    "RunnerName",
    "Sets",
    "StoreArgument",
    "StoreUrl",
    "check_kind",
    "find",
    "load",
    "open_store",
]

DEFAULT_STORE = "runs/demo"
"""Where `stagediff demo` writes."""

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's config file (YAML).", show_default=False)]
StoreUrl = Annotated[str | None, typer.Option("--store", metavar="STORE", help="Folder or s3://bucket/prefix, instead of the config's.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Replaces one setting of the config: --set train.lr=1e-3. May be given several times."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto (the first GPU, else the CPU), cpu, cuda, cuda:1, …")]
Force = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STEP",
        help="Computes a finished step again and says whether its bytes agree; its name as in `plan`. May be given several times.",
    ),
]
RunnerName = Annotated[
    str,
    typer.Option("--runner", metavar="RUNNER", help="prefect: as a Prefect flow; plain: step by step in this process, without Prefect."),
]
Jobs = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=1,
        help="How many steps to run at a time, each in a process of its own with its share of the cores, or one of the machine's GPUs.",
    ),
]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or s3://bucket/prefix.", show_default=False)]
InStore = Annotated[str, typer.Option("--store", metavar="STORE", help="Folder or s3://bucket/prefix.")]


def load(config: Path, store: str | None, sets: list[str] | None) -> RunConfig:
    """The config file with the command line's replacements."""
    return load_config(config, overrides=overrides(sets or []), store=store)


def open_store(url: str) -> Store:
    """A store to read from: a local one has to be there."""
    store = Store(url)
    place = store.objects.local_path("")
    if place is not None and not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise UserError(
            f"The store {place} {what}. Give the folder that `stagediff run` wrote into (a config's `store`), or s3://bucket/prefix."
        )
    return store


def find(store: Store, key: str, kind: str | None = None) -> Artifact:
    """The complete artifact that a shortened name means; an error when it is of another kind."""
    artifact = store.artifact(store.find(key if "/" in key or kind is None else f"{kind}/{key}")).require()
    if kind and artifact.ref.kind != kind:
        raise UserError(f"{artifact.ref} is not one of {kind}; `stagediff ls {store.root} --kind {kind}` lists these.")
    return artifact


def check_kind(kind: str | None) -> None:
    """Raises UserError for a kind of artifact that no step makes."""
    known = sorted({step.spec.kind for step in steps.all_steps()})
    if kind is not None and kind not in known:
        raise UserError(f"--kind {kind!r} is not a kind of artifact; expected one of: {', '.join(known)}.")
