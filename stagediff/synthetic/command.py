"""The command `stagediff planted`: scores the stage-wise diff (`stagediff.synthetic.diff_ladder`), or SAE-Track on planted trajectories, rung by rung of the
ladder of difficulty, seed by seed.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.synthetic.diff_rungs import DIFF_RUNGS
from stagediff.synthetic.spec import RUNGS, world

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.progress import Progress
    from stagediff.store import Store
    from stagediff.synthetic.chain import Recipe
    from stagediff.synthetic.spec import TrackWorld

__all__ = ["COLUMNS", "command", "ladder", "medians"]

COLUMNS = {
    "matched": "matched",
    "kinds": "kinds",
    "formation": "formed",
    "formation_late": "formed late",
    "patterns": "patterns",
    "patterns_changing": "changing",
    "patterns_still": "still",
    "events_timed": "timed",
    "false_events": "false",
    "explained_variance": "EV",
}
"""Key figures of a score that the table shows, with their heads."""
LEGEND = (
    "Shares of planted features; without a latent (matched) they count as wrong. kinds: right at 90 % of checkpoints. formed: within one checkpoint; late: "
    "of those that form after the first. patterns: event found by name within one checkpoint and no false one; of features with an event (changing) and "
    "without (still); timed: some event found in time, whatever its name; false: features with a false event."
)


def ladder(
    worlds: "Iterable[tuple[str, TrackWorld]]",
    recipe: "Recipe",
    store: "Store",
    *,
    device: str = "auto",
    jobs: int = 1,
    progress: "Progress | None" = None,
) -> "pd.DataFrame":
    """Scores every world (rung's name, world); what the store has is not computed again. Columns: rung, seed, score (the artifact), key figures."""
    import pandas as pd

    from stagediff.lanes import execute_plan
    from stagediff.synthetic.chain import plan

    rows = []
    for rung, planted in worlds:
        made = plan(planted, recipe)
        execute_plan(made, store, jobs, device=device, keep="tables", progress=progress)
        score = made["score"].ref
        rows.append({"rung": rung, "seed": planted.seed, "score": str(score), **store.artifact(score).manifest.figures})
    return pd.DataFrame(rows)


def medians(table: "pd.DataFrame") -> "pd.DataFrame":
    """Medians over the seeds, a row per rung."""
    return table.drop(columns=["seed", "score"]).groupby("rung", sort=False).median().reset_index()


def command(
    track: Annotated[
        bool, typer.Option("--track", help="Planted trajectories along checkpoints, for SAE-Track, instead of a stage-wise diff.")
    ] = False,
    seed: Annotated[list[int] | None, typer.Option(help="The world's seed; may be given several times. Default: 0.")] = None,
    rung: Annotated[
        list[str] | None,
        typer.Option(help=f"How hard: {', '.join(DIFF_RUNGS)}; with --track {', '.join(RUNGS)}; or all. Several times. Default: middle."),
    ] = None,
    architecture: Annotated[str, typer.Option(help="With --track: the dictionaries', batchtopk or relu.")] = "batchtopk",
    store: Annotated[str, typer.Option("--store", help="Folder or s3://bucket/prefix.")] = "runs/planted",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="How many steps to run at a time.")] = 1,
    rivals: Annotated[bool, typer.Option("--rivals", help="Train crosscoders and a difference SAE too; not with --track.")] = False,
    out: Annotated[Path | None, typer.Option(help="A PNG of every score on every rung; not with --track.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Scores the method on planted truth: synthetic activations whose features, and what becomes of them, are known."""
    from stagediff.errors import UserError
    from stagediff.pictures import checked
    from stagediff.store import Store
    from stagediff.synthetic.diff_ladder import diff_ladder, diff_medians, shown

    rungs = _rungs(rung or ["middle"], RUNGS if track else DIFF_RUNGS)
    if track and (out is not None or rivals):
        raise UserError("--out and --rivals are of the stage-wise diff. With --track there are no such scores: leave them out, or --track.")
    if out is not None:
        checked(out)
    if track:
        _track(rungs, seed or [0], architecture, Store(store), device, jobs, as_json)
        return
    table = diff_ladder(rungs, seed or [0], Store(store), rivals=rivals, device=device, jobs=jobs)
    if out is not None:
        from stagediff.synthetic.diff_figure import ladder_png

        out.write_bytes(ladder_png(table))
    middle = diff_medians(table)
    if as_json:
        print(json.dumps({"scores": _records(table), "medians": _records(middle)}))
    else:
        shown(table, middle)


def _rungs(asked: Iterable[str], known: Iterable[str]) -> list[str]:
    from stagediff.errors import UserError

    known = tuple(known)
    for rung in asked:
        if rung not in (*known, "all"):
            raise UserError(f"There is no rung {rung!r}; expected {', '.join(known)}, or all.")
    return list(known) if "all" in asked else list(dict.fromkeys(asked))


def _track(rungs: list[str], seeds: list[int], architecture: str, store: "Store", device: str, jobs: int, as_json: bool) -> None:
    from stagediff.errors import UserError
    from stagediff.synthetic.chain import RECIPES

    if architecture not in RECIPES:
        raise UserError(f"There is no recipe for {architecture!r} dictionaries; expected {' or '.join(RECIPES)}.")
    table = ladder([(name, world(name, s)) for name in rungs for s in seeds], RECIPES[architecture], store, device=device, jobs=jobs)
    middle = medians(table)
    if as_json:
        print(json.dumps({"architecture": architecture, "scores": _records(table), "medians": _records(middle)}))
    else:
        _show(table, middle, architecture)


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))


def _show(table: "pd.DataFrame", middle: "pd.DataFrame", architecture: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"SAE-Track on planted trajectories, {architecture} dictionaries", caption=LEGEND, caption_justify="left")
    for head in ("rung", "seed", *COLUMNS.values()):
        shown.add_column(head, justify="left" if head == "rung" else "right")
    for rung, of in table.groupby("rung", sort=False):
        for row in of.to_dict("records"):
            shown.add_row(rung, str(row["seed"]), *_numbers(row))
        if len(of) > 1:
            shown.add_row(rung, "median", *_numbers(middle[middle.rung == rung].iloc[0].to_dict()), style="bold", end_section=True)
    Console(width=150).print(shown)


def _numbers(row: dict[Any, Any]) -> list[str]:
    return ["" if row[name] is None else f"{row[name]:.3f}" for name in COLUMNS]
