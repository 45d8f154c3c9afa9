"""One feature's card: sentence, outcomes, numbers with their controls, strongest examples, activation per stage."""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.diff.section.tables import STAGE_NAMES, STAGE_STORY
from stagediff.diff.spec import STAGES
from stagediff.evidence.interventions.spec import MEASURE_NAMES
from stagediff.evidence.labels.section.distributions import HEIGHT, WIDTH, outline
from stagediff.evidence.verdict.criteria import CLAIMS, NO, NOT_MEASURED, OPEN, YES
from stagediff.evidence.verdict.sentence import cost, detail, percent, points
from stagediff.markup import escape, number

__all__ = ["CLAIM_NAMES", "STYLE", "card"]

CLAIM_NAMES = {
    "moved": "Moved",
    "newer": "Newer",
    "carries": "New rows",
    "flagged": "Label",
    "steers": "Steering",
    "removes": "Removal",
}
MARKS = {YES: ("shown", "✓"), NO: ("refused", "✗"), OPEN: ("open", "?"), NOT_MEASURED: ("absent", "–")}
AROUND = 10
"""Tokens shown on each side of an example's strongest one."""
STYLE = (
    ".verdict { margin: 16px 0; padding: 16px 20px 14px; } .verdict h3 { margin: 0; display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; } "
    ".verdict h3 span { font-weight: 450; color: var(--soft); overflow-wrap: anywhere; } .verdict .said { margin: 8px 0 10px; max-width: 92ch; } "
    ".verdict .marks { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0 0; padding: 0; list-style: none; } "
    ".verdict .marks .shown { border-color: var(--good); color: var(--good); } .verdict .marks .refused { color: var(--c-both); border-color: var(--c-both); } "
    ".verdict .marks .absent { color: var(--faint); } .verdict .halves { display: flex; flex-wrap: wrap; gap: 8px 34px; } "
    ".verdict .halves > div { flex: 1 1 330px; min-width: 0; } .verdict dl.rows { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; "
    "margin: 6px 0; font-size: .87rem; } .verdict dl.rows dt { color: var(--soft); } .verdict dl.rows dd { margin: 0; } .verdict .tokens { margin: 5px 0; } "
    ".verdict .tokens .tag { padding: 0 8px; border-radius: 99px; } "
    ".verdict .stages { display: flex; flex-wrap: wrap; gap: 10px 14px; margin-top: 6px; } .verdict .stages div { width: 136px; font-size: .74rem; "
    "color: var(--soft); } .verdict .stages svg { display: block; width: 136px; height: 56px; background: var(--plot); } "
    ".verdict .base { fill: var(--c-none); opacity: .6; } .verdict .new { fill: var(--c-both); fill-opacity: .28; stroke: var(--c-both); }"
)


def card(row: dict[str, Any], control: dict[str, Any], examples: pd.DataFrame, shares: dict[str, np.ndarray]) -> str:
    """Parameters: row: of verdicts.parquet; examples: the feature's, as `stagediff.sae.examples` gives them; shares: stage -> [2, bins] of the tokens."""
    marks = "".join(_mark(claim, row, control) for claim in CLAIMS)
    label = escape(row["label"]) if row["label"] else "no label"
    flag = f' <span class="tag hot">{escape(row["topic"] or "flagged")}</span>' if row["is_flagged"] else ""
    return (
        f'<article class="card verdict" id="verdict-{row["feature"]}"><h3>Feature {row["feature"]} <span>{label}</span>{flag}</h3>'
        f'<ul class="marks">{marks}</ul><p class="said">{escape(row["sentence"])}</p>'
        f'<div class="halves"><div>{_numbers(row, control)}</div><div><h4>Strongest examples</h4>{_examples(examples)}</div></div>'
        f"<h4>Share of base rows' (grey) and new rows' (red) tokens by activation; below: on how many it fires, and mean activation</h4>"
        f'<div class="stages">{"".join(_stage(s, row, shares[s]) for s in STAGES)}</div></article>'
    )


def _mark(claim: str, row: dict[str, Any], control: dict[str, Any]) -> str:
    kind, sign = MARKS[row[claim]]
    said = row[claim] if row[claim] == NOT_MEASURED else detail(claim, row, control)
    return f'<li class="tag {kind}" title="{escape(said)}">{sign} {CLAIM_NAMES[claim]}: {escape(row[claim])}</li>'


def _numbers(row: dict[str, Any], control: dict[str, Any]) -> str:
    lines = [
        (
            "x, y",
            f"{row['x']:.3f}, {row['y']:.3f} (x + y {row['score']:.3f}: rank {number(row['rank_score'])} of {number(control['alive'])})",
        )
    ]
    if row["rank_pair"]:
        rank = f"rank {number(row['rank_pair'])} of {number(control['pairs'])} pairs"
        lines.append(("Paired novelty", f"{row['pair_novelty']:.3f} ({rank}, with latent {row['partner']} of F via M)"))
    if control["null_values"] is not None:
        lines.append(
            (
                "Against retraining",
                f"p_x {_n(row['p_x'])}, p_y {_n(row['p_y'])}, q {_n(row['q'])}; pair p {_n(row['pair_p'])}, q {_n(row['pair_q'])}",
            )
        )
    lines.append(("New rows", "–" if np.isnan(row["new_top"]) else f"{percent(row['new_top'])} of the top examples"))
    if row["asked"]:
        lines.append(("Labeller", f"{escape(control['labeller'])}: {row['examples_flagged']} of {row['examples']} examples related"))
    if np.isfinite(row["steer_low"]):
        effect = f"{points(row['steer_effect'])} points ({points(row['steer_low'])} to {points(row['steer_high'])})"
        lines.append(("Steering", f"{effect} against {control['steer_random']} random features, at strength {row['steer_strength']:g}"))
    if np.isfinite(row["ablate_keyword"]):
        rates = ", ".join(
            f"{name} {percent(control[f'ablate_untouched_{m}'])} → {percent(row[f'ablate_{m}'])}"
            for m, name in MEASURE_NAMES[control["ablate_check"]].items()
        )
        lines.append(("Clamped alone", f"{rates}; clean loss {cost(row['ablate_cost'])}"))
    return '<dl class="rows">' + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines) + "</dl>"


def _examples(examples: pd.DataFrame) -> str:
    if examples.empty:
        return "<p>It fires on no held-out row.</p>"
    return "".join(_example(e) for e in examples.sort_values("rank").itertuples(index=False))


def _example(example: Any) -> str:
    peak = int(np.argmax(example.activations))
    first = max(0, peak - AROUND)
    tokens = [_shown(t) for t in example.tokens[first : peak + AROUND]]
    tokens[peak - first] = f'<strong class="peak">{tokens[peak - first]}</strong>'
    tag = '<span class="tag new">new</span> ' if example.is_new else ""
    return f'<div class="tokens">{tag}{"".join(tokens)}</div>'


def _shown(token: str) -> str:
    return escape(token).replace("\n", '<span class="ws">⏎</span>')


def _stage(stage: str, row: dict[str, Any], shares: np.ndarray) -> str:
    base, new = (outline(part) for part in shares)
    densities = " · ".join(percent(row[f"density_{rows}_{stage}"]) for rows in ("base", "new"))
    means = " · ".join(_n(row[f"mean_{rows}_{stage}"]) for rows in ("base", "new"))
    return (
        f'<div title="{escape(STAGE_STORY[stage])}"><b>{escape(STAGE_NAMES[stage])}</b><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="base" d="{base}"/><path class="new" d="{new}"/></svg>{densities}<br>{means}</div>'
    )


def _n(value: float) -> str:
    return number(float(value), 2)
