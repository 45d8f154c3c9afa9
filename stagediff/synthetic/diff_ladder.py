"""Planted worlds of the stage-wise diff, rung by rung and seed by seed: runs what is missing, and prints every score of every seed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from stagediff.synthetic.diff_plan import diff_plan
from stagediff.synthetic.diff_rungs import DIFF_RUNGS, diff_world

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.progress import Progress
    from stagediff.store import Store
    from stagediff.synthetic.diff_rungs import DiffRecipe
    from stagediff.synthetic.diff_spec import DiffWorld

__all__ = ["diff_ladder", "diff_medians", "score_world", "shown"]

MEASURES = {
    "average_precision": "AP",
    "feature_precision": "AP by feature",
    "recall_n": "recall at n",
    "recall_2n": "at 2n",
    "auroc": "AUROC",
}
CUTS = {"box": "x, y < 0.7", "index_q": "q ≤ 0.1 by index", "pair_p": "p ≤ 0.005 of pairs", "pair_q": "q ≤ 0.1 of pairs"}
ABOUT = (
    *("undertrained", "born_F_D", "born_F_M", "born_F_direct", "same_index", "saturated", "coverage_F_D", "coverage_F_M"),
    *(f"{name}_{cut}" for cut in CUTS for name in ("share", "precision", "recall")),
)
"""Figures of a world that stand in each of its rows."""
LEGEND = (
    "Of the planted features that only model and data together explain. AP: over candidates. By feature: precision at the rank where each planted "
    "feature is first found, 0 where never. Recall: among as many candidates as there are such features, and twice as many. No change: the control, "
    "continued training alone. Undertrained: under 90 % of the features were born on a path, none of its scores is given."
)


def diff_ladder(
    rungs: Iterable[str],
    seeds: Iterable[int],
    store: "Store",
    *,
    rivals: bool = False,
    device: str = "auto",
    jobs: int = 1,
    progress: "Progress | None" = None,
) -> "pd.DataFrame":
    """One row per rung, seed, score and class (scores.parquet of the world, see stagediff.synthetic.diff_score); beside them what was born."""
    import pandas as pd

    seeds = list(seeds)
    worlds = [(rung, diff_world(rung, seed), DIFF_RUNGS[rung][1]) for rung in rungs for seed in seeds]
    return pd.concat(
        [score_world(*one, store, rivals=rivals, device=device, jobs=jobs, progress=progress) for one in worlds], ignore_index=True
    )


def score_world(
    rung: str,
    world: "DiffWorld",
    recipe: "DiffRecipe",
    store: "Store",
    *,
    rivals: bool = False,
    device: str = "auto",
    jobs: int = 1,
    progress: "Progress | None" = None,
) -> "pd.DataFrame":
    """The rows of one world; what the store has is not computed again."""
    from stagediff.lanes import execute_plan

    plan = diff_plan(world, recipe, rivals)
    execute_plan(plan, store, jobs, device=device, keep="tables", progress=progress)
    artifact = store.artifact(plan["score"].ref)
    figures = artifact.manifest.figures
    table = artifact.read_table("scores.parquet")
    table = table.assign(artifact=str(artifact.ref), **{name: figures[name] for name in ABOUT})
    table.insert(0, "rung", rung)
    table.insert(1, "seed", world.seed)
    return table


def diff_medians(table: "pd.DataFrame") -> "pd.DataFrame":
    """Medians over the seeds that were scored, by rung, score and class; `seeds` how many these are, `undertrained` in how many the paths were not."""
    groups = table.groupby(["rung", "score", "class"], sort=False)
    middle = groups[[*MEASURES, "born_F_D", "born_F_M", "same_index"]].median()
    seeds = groups["undertrained"].agg(undertrained=lambda u: int(u.sum()))
    return middle.join(groups["average_precision"].agg(seeds="count")).join(seeds).reset_index()


def shown(table: "pd.DataFrame", middle: "pd.DataFrame") -> None:
    """Prints a table per rung: every seed, and the medians where there are several."""
    from rich.console import Console
    from rich.table import Table

    from stagediff.synthetic.diff_judge import ALL_SCORES

    console = Console(width=150)
    for rung, of in table.groupby("rung", sort=False):
        seeds = of.drop_duplicates("seed")
        said = "; ".join(_about(row) for row in seeds.to_dict("records"))
        view = Table(title=f"Planted diff, rung {rung}", caption=f"{said}. {LEGEND}", caption_justify="left")
        for head in ("score", "seed", *MEASURES.values(), *(f"AP {c}" for c in _classes(of))):
            view.add_column(head, justify="left" if head == "score" else "right")
        for score, rows in of.groupby("score", sort=False):
            for seed, by_class in rows.groupby("seed", sort=False):
                view.add_row(ALL_SCORES[str(score)], str(seed), *_numbers(by_class, _classes(of)))
            if len(seeds) > 1:
                mine = middle[(middle.rung == rung) & (middle.score == score)]
                view.add_row("", "median", *_numbers(mine, _classes(of)), style="bold", end_section=True)
        console.print(view)


def _classes(table: "pd.DataFrame") -> list[str]:
    return [c for c in table["class"].unique() if c != "all"]


def _numbers(rows: "pd.DataFrame", classes: list[str]) -> list[str]:
    by = rows.set_index("class")
    values = [by[name]["all"] for name in MEASURES] + [by.average_precision[c] for c in classes]
    return ["–" if v is None or v != v else f"{v:.3f}" for v in values]


def _about(row: dict[Any, Any]) -> str:
    born = f"seed {row['seed']}: born {row['born_F_D']:.0%} and {row['born_F_M']:.0%}, {row['same_index']:.0%} at one index"
    warned = row["saturated"] is False or row["saturated"] == 0
    cuts = [
        f"{said} selects {row[f'share_{cut}']:.1%}, {_share(row[f'precision_{cut}'])} right, finds {row[f'recall_{cut}']:.0%}"
        for cut, said in CUTS.items()
    ]
    warnings = (", UNDERTRAINED" if row["undertrained"] else "") + (", births have not saturated" if warned else "")
    return f"{born}{warnings}; {'; '.join(cuts)}"


def _share(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.0%}"
