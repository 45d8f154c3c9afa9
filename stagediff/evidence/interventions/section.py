"""The report's parts "Steering" and "Ablation"."""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.evidence.interventions.chart import Band, Line, chart
from stagediff.evidence.interventions.spec import MEASURE_NAMES, AblateSpec, Intervention, SteerSpec
from stagediff.markup import escape, facts, number, table
from stagediff.organisms.behaviour import MEASURES
from stagediff.sections import ReportContext, Section
from stagediff.store import Artifact

__all__ = ["section"]

ORDER_NAMES = {
    "single": "one candidate alone",
    "cosine": "nearest to the first candidate",
    "score": "lowest x + y",
    "pair_novelty": "lowest paired novelty",
    "trigger": "most active with the trigger",
    "region": "most active with it in the lowest tenth by x + y",
    "attribution": "the behaviour most due to them, in the lowest half by x + y",
    "random": "random",
}
COLOURS = {
    "cosine": "var(--c-both)",
    "score": "var(--c-a)",
    "pair_novelty": "var(--c-born)",
    "trigger": "var(--good)",
    "region": "var(--c-b)",
    "attribution": "var(--ink)",
    "random": "var(--c-none)",
    "single": "var(--c-b)",
}
_STAGES = {"F_D": "F via D", "F_M": "F via M"}
SHOWN = 12
"""Candidates with a line of their own in the figure."""
FRAME = '<div style="display:flex;flex-wrap:wrap;gap:18px 26px;margin:14px 0">'


def section(context: ReportContext) -> list[Section]:
    """The parts that the run has steps for."""
    steer, ablate = context.artifact("steer"), context.artifact("ablate")
    found = []
    if steer is not None:
        found.append(Section("steering", "Steering", 32, _steering(steer)))
    if ablate is not None:
        found.append(Section("ablation", "Ablation", 34, _ablation(ablate)))
    return found


def _steering(artifact: Artifact) -> str:
    spec, f = artifact.spec(), artifact.manifest.figures
    assert isinstance(spec, SteerSpec)
    rates, features = artifact.read_table("steering.parquet"), artifact.read_table("features.parquet")
    measure = _names(spec)[spec.measure]
    story = (
        f"<p>The decoder directions of {number(f['candidates'])} candidates (of {_STAGES[spec.stage]}), and of {number(f['random'])} random alive "
        "features matched to them in density and "
        "decoder norm, were added to the residual stream at the hook point, at every position of the prompt and of the answer. Each feature's strength was "
        f"chosen on {number(f['prompts_dev'])} development prompts without the trigger (the highest rate, by {escape(measure)}), the random ones' in the "
        f"same way; rates and effects are those on {number(f['prompts_test'])} other prompts. <em>Effect</em>: the rate less the random features' mean. "
        "Intervals: 95 %, cluster bootstrap over prompts and random features.</p>"
    )
    unselected = (
        ""
        if features[features.group == "candidate"].selected.all()
        else ('<p class="warn">The run\'s cut selects no feature: the candidates are the lowest-ranking alive ones.</p>')
    )
    figures = facts(
        [
            (
                f"{number(f['above_random'])} of {number(f['candidates'])}",
                "candidates with an interval above 0",
                f"by {measure}, without the trigger",
            ),
            (
                f"{number(f['random_above_random'])} of {number(f['random'])}",
                "random features with an interval above 0",
                "each against the others: what chance brings",
            ),
            (
                _percent(f["largest_effect"]),
                "largest effect of a candidate",
                f"random features' rate {_percent(f['random_mean_rate'])} on average",
            ),
            (_percent(f["random_largest_rate"]), "largest rate of a random feature", "at its own best strength"),
            (
                _percent(f[f"{spec.measure}_without_trigger"]),
                "rate without trigger and steering",
                f"with the trigger {_percent(f[f'{spec.measure}_with_trigger'])}",
            ),
        ]
    )
    charts = FRAME + _strengths(rates, spec, trigger=False) + _strengths(rates, spec, trigger=True) + _fluency(rates) + "</div>"
    return story + unselected + figures + charts + _effects(features, spec) + _told(artifact.read_table("transcripts.parquet"))


def _strengths(rates: pd.DataFrame, spec: SteerSpec, *, trigger: bool) -> str:
    part = rates[(rates.split == "test") & (rates.trigger == trigger)]
    start = float(part[part.group == "none"][spec.measure].iloc[0])
    lines = []
    for feature in part[part.group == "candidate"].feature.drop_duplicates().head(SHOWN):
        own = part[part.feature == feature]
        lines.append(Line("candidates", [0.0, *own.strength], [start, *own[spec.measure]], "var(--c-both)", 1.3))
    random = part[part.group == "random"].groupby("strength")[spec.measure]
    at = [0.0, *spec.strengths]
    bands = [Band("random features, all", at, [start, *random.min()], [start, *random.max()], "var(--c-none)")]
    lines.append(Line("random features, mean", at, [start, *random.mean()], "var(--c-none)", 2.4, "6 4"))
    return chart(
        lines,
        bands,
        x="strength, mean residual norms",
        y=f"share of test answers, {_names(spec)[spec.measure]}",
        title="With the trigger" if trigger else "Without the trigger",
    )


def _fluency(rates: pd.DataFrame) -> str:
    part = rates[(rates.split == "test") & ~rates.trigger]
    start = float(part[part.group == "none"].fluency.iloc[0])
    lines = []
    for group, colour in (("candidate", "var(--c-both)"), ("random", "var(--c-none)")):
        mean = part[part.group == group].groupby("strength").fluency.mean()
        lines.append(
            Line(f"{group}s, mean" if group == "candidate" else "random features, mean", [0.0, *mean.index], [start, *mean], colour)
        )
    return chart(
        lines,
        x="strength, mean residual norms",
        y="base model's loss on the answer, nats per token",
        title="Fluency, without the trigger",
        top=None,
    )


def _effects(features: pd.DataFrame, spec: SteerSpec) -> str:
    rows = []
    for group in ("candidate", "random"):
        of = features[features.group == group].sort_values("steer_effect", ascending=False, kind="stable")
        for r in of.itertuples(index=False):
            rows.append(
                [
                    f"{r.feature}",
                    group if group == "candidate" else f"random, like {r.matched_to}",
                    f"{r.strength:g}",
                    *(_percent(getattr(r, f"rate_{m}")) for m in MEASURES),
                    _signed(r.steer_effect),
                    f"{_signed(r.steer_low)} … {_signed(r.steer_high)}",
                    f"{getattr(r, f'random_as_high_{spec.measure}')}",
                ]
            )
    head = (
        "Feature",
        "Group",
        "Strength",
        *_heads(spec),
        f"Effect ({_names(spec)[spec.measure]})",
        "95 % interval",
        "Random features as high",
    )
    found = table(
        head, rows[: (features.group == "candidate").sum()], caption="Candidates, on test prompts without the trigger", text_columns=2
    )
    control = table(head, rows[(features.group == "candidate").sum() :], caption="Random features, each against the others", text_columns=2)
    return found + f"<details><summary>The random features, one by one</summary>{control}</details>"


def _told(told: pd.DataFrame) -> str:
    if told.empty:
        return ""
    parts = ["<h3>Answers side by side</h3><p>Greedy answers to test prompts; every feature at its strength.</p>"]
    for prompt, of in told.groupby("prompt", sort=False):
        rows = [[_who(r), str(r.answer).replace("\n", " ⏎ ")] for r in of.itertuples(index=False)]
        body = "".join(
            f'<tr><th scope="row" style="white-space:nowrap">{escape(who)}</th><td><code style="white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{escape(text)}</code></td></tr>"
            for who, text in rows
        )
        parts.append(
            f'<details open><summary><code>{escape(_short(str(prompt)))}</code></summary><div class="scroll" tabindex="0" role="region" '
            f'aria-label="Answers"><table class="plain"><thead><tr><th scope="col">Added</th><th scope="col">Answer</th></tr></thead>'
            f"<tbody>{body}</tbody></table></div></details>"
        )
    return "".join(parts)


def _who(row: Any) -> str:
    if row.group == "none":
        return "nothing, with the trigger" if row.trigger else "nothing"
    return f"{row.feature}, {row.group}, + {row.strength:g}"


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _ablation(artifact: Artifact) -> str:
    spec, f = artifact.spec(), artifact.manifest.figures
    assert isinstance(spec, AblateSpec)
    curves = artifact.read_table("ablation.parquet")
    test = curves[curves.split == "test"]
    story = (
        f"<p>With the trigger before {number(f['prompts_test'])} test prompts, features of {_STAGES[spec.stage]} were clamped to 0 wherever they are "
        "active; what they do not explain (the dictionary's error term) stays. The price is what the clamp adds to the model's loss on held-out clean text. "
        f"Three counts, since a broken phrase is no absent behaviour. {_smallest(spec, f)}</p>"
    )
    figures = facts(
        [
            (
                number(f["smallest_set"]),
                f"features in the smallest set that removes the {_names(spec)['keyword']}",
                ORDER_NAMES.get(f["smallest_set_order"] or "", "none does"),
            ),
            (number(f["smallest_random_set"]), "features in the smallest random set that does", f"of {number(spec.draws)} random orders"),
            (
                _percent(f["single_lowest_keyword"]),
                f"lowest rate of the {_names(spec)['keyword']} by one feature alone",
                f"untouched {_percent(f['keyword_untouched'])}",
            ),
            (number(f["smallest_set_clean_cost"]), "nats of clean loss for that set", f"untouched loss {number(f['clean_loss'])}"),
        ]
    )
    parts = [_curve(test, spec, f, measure) for measure in MEASURES]
    parts.append(_curve(test, spec, f, "clean_cost"))
    return story + figures + FRAME + "".join(parts) + "</div>" + _sets(test, spec) + _singles(test, spec)


def _smallest(spec: AblateSpec, f: dict[str, Any]) -> str:
    keyword = _names(spec)["keyword"]
    wanted = f"brought the {keyword} under {_percent(spec.rate_below)} for less than {number(spec.cost_below)} nats on development prompts and rows"
    if not f["smallest_set"]:
        return f"<strong>No set that was tried</strong> {wanted}."
    return (
        f"The smallest set that {wanted} holds <strong>{number(f['smallest_set'])}</strong> feature{'s' if f['smallest_set'] > 1 else ''} "
        f"({escape(ORDER_NAMES[f['smallest_set_order']])}); on the test ones the {keyword} comes in {_percent(f['smallest_set_keyword'])} "
        f"and the price is {number(f['smallest_set_clean_cost'])} nats."
    )


def _curve(test: pd.DataFrame, spec: AblateSpec, f: dict[str, Any], what: str) -> str:
    lines = []
    for order in spec.orders:
        for _, of in test[test.order == order].groupby("draw"):
            of = of.sort_values("size")
            lines.append(Line(ORDER_NAMES[order], list(of["size"]), list(of[what]), COLOURS[order], 1.2 if order == "random" else 2))
    if what == "clean_cost":
        return chart(
            lines, x="features clamped", y="nats per token", title="Price: clean loss added", top=None, log=True, rule=spec.cost_below
        )
    start = _percent(f[f"{what}_untouched"])
    y = f"share of test answers after the trigger; untouched {start}"
    return chart(
        lines,
        x="features clamped",
        y=y,
        title=_names(spec)[what].capitalize(),
        log=True,
        rule=spec.rate_below if what == "keyword" else None,
    )


def _sets(test: pd.DataFrame, spec: AblateSpec) -> str:
    rows = [
        _row(ORDER_NAMES[r.order] + (f" {r.draw + 1}" if r.order == "random" else ""), r)
        for r in test.itertuples()
        if r.order in ORDER_NAMES and r.order != "single"
    ]
    return "<details><summary>All sets</summary>" + table(_head(spec), rows) + "</details>"


def _singles(test: pd.DataFrame, spec: AblateSpec) -> str:
    rows = [_row(f"feature {r.first}", r) for r in test[test.order == "single"].itertuples()]
    return table(_head(spec), rows, caption="One candidate alone")


def _head(spec: AblateSpec) -> tuple[str, ...]:
    return ("Clamped", "Features", *_heads(spec), "Clean loss added, nats")


def _names(spec: Intervention) -> dict[str, str]:
    return MEASURE_NAMES[spec.behaviour.check]


def _heads(spec: Intervention) -> list[str]:
    return [name.capitalize() for name in _names(spec).values()]


def _row(name: str, r: Any) -> list[Any]:
    return [name, int(r.size), *(_percent(getattr(r, m)) for m in MEASURES), f"{round(r.clean_cost, 4) + 0.0:+.4f}"]


def _percent(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{100 * float(value):.3g} %"


def _signed(value: Any) -> str:
    return "–" if not np.isfinite(value) else f"{100 * float(value):+.1f} %"
