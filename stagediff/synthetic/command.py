"""The command `stagediff planted`: scores SAE-Track on planted trajectories, rung by rung of the ladder of difficulty, seed by seed."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    progress: "Progress | None" = None,
) -> "pd.DataFrame":
    """Scores every world (rung's name, world); what the store has is not computed again. Columns: rung, seed, score (the artifact), key figures."""
    import pandas as pd

    from stagediff.plan import execute
    from stagediff.synthetic.chain import plan

    rows = []
    for rung, planted in worlds:
        made = plan(planted, recipe)
        execute(made, store, device=device, keep="tables", progress=progress)
        score = made["score"].ref
        rows.append({"rung": rung, "seed": planted.seed, "score": str(score), **store.artifact(score).manifest.figures})
    return pd.DataFrame(rows)


def medians(table: "pd.DataFrame") -> "pd.DataFrame":
    """Medians over the seeds, a row per rung."""
    return table.drop(columns=["seed", "score"]).groupby("rung", sort=False).median().reset_index()


def command(
    track: Annotated[bool, typer.Option("--track", help="Planted trajectories along checkpoints, for SAE-Track.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="The world's seed; may be given several times. Default: 0.")] = None,
    rung: Annotated[str, typer.Option(help=f"How hard: {', '.join(RUNGS)}, or all.")] = "middle",
    architecture: Annotated[str, typer.Option(help="The dictionaries': batchtopk or relu.")] = "batchtopk",
    store: Annotated[str, typer.Option("--store", help="Folder or s3://bucket/prefix.")] = "runs/planted",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Scores the method on planted truth: synthetic checkpoints whose features and their fates are known."""
    from stagediff.errors import UserError
    from stagediff.store import Store
    from stagediff.synthetic.chain import RECIPES

    if not track:
        raise UserError(
            "Only trajectories for SAE-Track are planted so far: say `stagediff planted --track`. There is no planted diff yet."
        )
    if rung not in (*RUNGS, "all"):
        raise UserError(f"There is no rung {rung!r}; expected {', '.join(RUNGS)}, or all.")
    if architecture not in RECIPES:
        raise UserError(f"There is no recipe for {architecture!r} dictionaries; expected {' or '.join(RECIPES)}.")
    rungs = RUNGS if rung == "all" else (rung,)
    table = ladder([(name, world(name, s)) for name in rungs for s in seed or (0,)], RECIPES[architecture], Store(store), device=device)
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
