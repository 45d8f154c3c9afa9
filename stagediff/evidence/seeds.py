"""`stagediff seeds`: a run's diff and the evidence that its config asks for, over several seeds, all of them shown with the medians.

Only what the tables need is computed (no report), and bulk activations are dropped after each seed.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.diff.seeds import medians, only_for, row, show, with_seed

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from stagediff.config import RunConfig
    from stagediff.progress import Progress
    from stagediff.store import Store

__all__ = ["FIGURES", "RIVAL_FIGURES", "command", "rivals", "seeds"]

RIVAL_FIGURES = ("auroc", "average_precision", "recall_n", "recall_2n", "tokens")
"""Of a row of the rivals' table; their columns here are rivals/<method>/<measure>/<figure>."""
FIGURES = {
    "retrain-null": ("q_below_0.1", "smallest_p", "reaches_q_0.1"),
    "labels": ("selected_flagged", "selected", "random_flagged", "random", "fisher_p"),
    "steer": (
        "above_random",
        "candidates",
        "random_above_random",
        "random",
        "largest_effect",
        "keyword_with_trigger",
        "keyword_without_trigger",
    ),
    "ablate": (
        "smallest_set",
        "smallest_set_order",
        *(f"smallest_set_{m}" for m in ("full", "keyword", "first_token", "clean_cost")),
        "smallest_random_set",
    ),
    "verdict": ("named", "moved_yes", "steers_yes", "moved_and_steers", "removes_yes", "shown_at_least_3"),
}
"""Step -> figures of its manifest that become columns <step>/<figure>, where the run has the step."""


def seeds(
    config: "RunConfig", seeds: Iterable[int], store: "Store", *, device: str = "auto", jobs: int = 1, progress: "Progress | None" = None
) -> "pd.DataFrame":
    """Runs diff and evidence once per seed (what the store has is not run again), `jobs` steps at a time, and returns one row per seed.

    Columns: those of `stagediff.diff.seeds.row`; FIGURES of the steps that the run has; and in a run with rivals, of each of their scores and of the
    diff's in the same table, rivals/<method>/<measure>/<figure> for RIVAL_FIGURES.
    """
    import pandas as pd

    from stagediff.config import make_plan
    from stagediff.lanes import execute_plan

    rows = []
    for seed in seeds:
        one = with_seed(config, seed)
        whole = make_plan(one, store)
        needed = only_for(whole, *(end for end in ("align", "rivals", *FIGURES) if end in whole))
        execute_plan(needed, store, jobs, device=device, keep="tables", progress=progress)
        made = row(one, needed, store)
        for step, figures in FIGURES.items():
            if step in needed:
                own = store.artifact(needed[step].ref).manifest.figures
                made |= {f"{step}/{figure}": own[figure] for figure in figures}
        if "rivals" in needed:
            made |= rivals(store.artifact(needed["rivals"].ref).read_table("rivals.parquet"))
        rows.append(made)
    return pd.DataFrame(rows)


def rivals(table: "pd.DataFrame") -> dict[str, float]:
    """One seed's rivals.parquet as columns of `seeds`."""
    return {f"rivals/{r['method']}/{r['measure']}/{f}": float(r[f]) for r in table.to_dict("records") for f in RIVAL_FIGURES}


def command(
    config: Annotated[Path, typer.Argument(help="A config file of kind stagewise or both (YAML).", show_default=False)],
    count: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 5,
    first: Annotated[int, typer.Option(help="The first seed; the others follow it.")] = 1,
    share: Annotated[list[float] | None, typer.Option(help="Share of new rows; may be given several times. Default: the config's.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="Folder or s3://bucket/prefix; replaces the config's.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Replaces one setting of the config; may be given several times."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="How many steps to run at a time.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Runs a stage-wise diff and its evidence over several seeds and prints every seed and the medians."""
    from stagediff.config import load_config, overrides, read_yaml
    from stagediff.errors import UserError
    from stagediff.store import Store

    kind = read_yaml(config).get("kind")
    if kind not in ("stagewise", "both"):
        raise UserError(f"{config} is a run of kind {kind!r}; `stagediff seeds` takes one with a diff in it: stagewise or both.")
    setting = "data.new_share" if kind == "stagewise" else "stagewise.data.new_share"

    results = []
    sets = overrides(set_ or [])
    shares: list[float | None] = [*share] if share else [None]
    for value in shares:
        loaded = load_config(config, overrides=sets if value is None else {**sets, setting: value}, store=store)
        results.append(seeds(loaded, range(first, first + count), Store(loaded.store), device=device, jobs=jobs))
    if as_json:
        print(json.dumps([{"seeds": json.loads(t.to_json(orient="records")), "medians": json.loads(_json(medians(t)))} for t in results]))
        return
    for table in results:
        show(table)
        _show_evidence(table)
        _show_rivals(table)


def _json(values: dict[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()})


_HEADS = {
    "q ≤ 0.1": ("g", "retrain-null/q_below_0.1"),
    "smallest p": (".1e", "retrain-null/smallest_p"),
    "flagged": ("g", "labels/selected_flagged", "labels/selected"),
    "random flagged": ("g", "labels/random_flagged", "labels/random"),
    "steer": ("g", "steer/above_random", "steer/candidates"),
    "random steer": ("g", "steer/random_above_random", "steer/random"),
    "largest effect": (".2f", "steer/largest_effect"),
    "moved and steer": ("g", "verdict/moved_and_steers"),
    "3 claims or more": ("g", "verdict/shown_at_least_3", "verdict/named"),
    "smallest set": ("g", "ablate/smallest_set"),
    "by": ("", "ablate/smallest_set_order"),
    "payload": (".1%", "ablate/smallest_set_full"),
    "keyword": (".1%", "ablate/smallest_set_keyword"),
    "first token": (".1%", "ablate/smallest_set_first_token"),
    "nats": (".3f", "ablate/smallest_set_clean_cost"),
    "random set": ("g", "ablate/smallest_random_set"),
}
"""Column of the evidence's table -> format, and the column of figures that it shows (of two: one / the other)."""


def _show_evidence(table: "pd.DataFrame") -> None:
    """Null, labels, steering, verdict and the smallest set that takes the keyword away, by seed. Nothing where the run has none of them."""
    heads = {head: about for head, about in _HEADS.items() if about[1] in table}
    if not heads:
        return
    shown = _table(
        "evidence: features with q ≤ 0.1; flagged; that steer; and the smallest set whose removal takes the keyword away (test prompts)"
    )
    for head in ("seed", *heads):
        shown.add_column(head, justify="right")
    for values in [*table.to_dict("records"), medians(table)]:
        shown.add_row(
            str(values.get("seed", "median")),
            *("/".join(_text(values.get(name), kind) for name in names) for kind, *names in heads.values()),
        )
    _print(shown)


def _text(value: Any, kind: str) -> str:
    """A dash where a seed has no such figure."""
    return "–" if value is None or value != value else format(value, kind)


def _show_rivals(table: "pd.DataFrame") -> None:
    """A row per method and score: the average precision of every seed, and the medians. Nothing where the run has no rivals."""
    names = dict.fromkeys(tuple(c.split("/")[1:3]) for c in table.columns if c.startswith("rivals/"))
    if not names:
        return
    shown = _table(
        "rivals on the same rows: which ranks what carries the new data first (low score first), average precision by seed, and medians"
    )
    shown.add_column("method")
    shown.add_column("score")
    for seed in table.seed:
        shown.add_column(f"seed {seed}", justify="right")
    for head in ("AP", "AUROC", "recall at n", "at 2 n", "tokens"):
        shown.add_column(head, justify="right")
    middle = medians(table)
    for method, measure in names:
        prefix = f"rivals/{method}/{measure}/"
        figures = [f"{middle[prefix + f]:.3f}" for f in ("average_precision", "auroc", "recall_n", "recall_2n")]
        seeds_own = [f"{value:.3f}" for value in table[prefix + "average_precision"]]
        shown.add_row(method, measure, *seeds_own, *figures, f"{middle[prefix + 'tokens']:,.0f}")
    _print(shown)


def _table(title: str) -> "Table":
    from rich.table import Table

    return Table(title=title)


def _print(table: "Table") -> None:
    from rich.console import Console

    Console(width=210).print(table)
