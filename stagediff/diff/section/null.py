"""The report's part about the retrain null: what continued training moves by itself, which p-values that allows, and the features beyond it."""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.markup import facts, number, table
from stagediff.sections import ReportContext, Section

__all__ = ["section"]

FOREMOST = 20


def section(context: ReportContext) -> Section | None:
    """None for a run without a retrain null."""
    artifact = context.artifact("retrain-null")
    if artifact is None:
        return None
    f = artifact.manifest.figures
    features = artifact.read_table("features.parquet")
    align = context.artifact("align")
    html = _story(f) + facts(_facts(f)) + _reached(f) + _foremost(features)
    if align is not None and align.manifest.figures.get("pairs_q_below_0.1") is not None:
        html += _pairs(align.read_table("features.parquet"), align.manifest.figures)
    return Section("null", "Retrain null", 28, html)


def _story(f: dict[str, Any]) -> str:
    return (
        "<p>Dictionaries move by continued training alone. Here D was trained on as D' with the base model and the mix again, and M as M' with the "
        f"finetuned model and base data again: {number(f['repeats'])} time{'s' if f['repeats'] > 1 else ''} each, with the real path's budget and schedule "
        f"(the first time in its order of rows too). <em>p<sub>x</sub></em> tells how unusual it is, {_against(f)}, to turn as far from "
        "D to D' as this feature from D to F via D, <em>p<sub>y</sub></em> the same of M; p is the larger of both, q the false discovery rate by Benjamini "
        "and Hochberg.</p>"
    )


def _against(f: dict[str, Any]) -> str:
    if f["repeats"] > 1:
        return "in units of what the feature's own repeats turned"
    return "among features of like density and decoder norm"


def _facts(f: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (number(f["q_below_0.1"]), "features with q at most 0.1", f"of {number(f['alive'])} alive"),
        (_percent(f["no_change_q_below_0.1"]), "called at q 0.1 where nothing changed", "one repeat judged by the others"),
        (
            number(f["smallest_p"], 2),
            "smallest p that can be reached",
            f"{number(min(f['null_values_x'], f['null_values_y']))} null values per axis",
        ),
        (_three(f["null_x_median"]), "median cosine D, D'", f"D, F via D {_three(f['x_median'])}"),
        (_three(f["null_y_median"]), "median cosine M, M'", f"M, F via M {_three(f['y_median'])}"),
    ]


def _reached(f: dict[str, Any]) -> str:
    if f["reaches_q_0.1"]:
        return ""
    return (
        f'<p class="warn"><strong>q 0.1 is out of reach with so few null values.</strong> At least {number(f["together_for_q_0.1"])} features would have '
        "to lie beyond every null value at once. Raise evidence.null_seeds; until then read p, not q.</p>"
    )


def _foremost(features: pd.DataFrame) -> str:
    able = features.q.notna().to_numpy()
    found = _smallest(features[able].assign(far=features.x + features.y), "p", "far")
    rows = [
        [str(r.feature), _three(r.x), _three(r.y), _three(r.x + r.y), *(number(float(v), 2) for v in (r.p_x, r.p_y, r.p, r.q))]
        for r in found.itertuples(index=False)
    ]
    return table(("Feature", "x", "y", "x + y", "p (x)", "p (y)", "p", "q"), rows, caption=f"The {len(rows)} features with the smallest p")


def _pairs(aligned: pd.DataFrame, f: dict[str, Any]) -> str:
    paired = aligned[aligned.partner >= 0]
    able = paired.pair_q.notna().to_numpy()
    found = _smallest(paired[able], "pair_p", "pair_novelty")
    rows = [
        [f"{r.feature} · {r.partner}", _three(r.pair_novelty), _three(r.pair_cos), number(float(r.pair_p), 2), number(float(r.pair_q), 2)]
        for r in found.itertuples(index=False)
    ]
    return (
        f"<p>The same for matched pairs: a latent's novelty against what retraining leaves at its index. {number(f['pairs_q_below_0.1'])} of "
        f"{number(f['pairs'])} pairs have q at most 0.1.</p>"
        + table(
            ("F via D · F via M", "Paired novelty", "Cosine of the two", "p", "q"),
            rows,
            caption=f"The {len(rows)} pairs with the smallest p",
        )
    )


def _smallest(table: pd.DataFrame, p: str, then: str) -> pd.DataFrame:
    """The first by p; many share the smallest that can be reached, and of these the farthest come first."""
    return table.sort_values([p, then, "feature"]).head(FOREMOST)


def _three(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * float(value):.2g} %"
