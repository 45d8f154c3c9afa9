"""The report's part about the rivals: one table of every method, and what each rival's latents look like."""

from typing import Any, cast

import pandas as pd

from stagediff.evidence.rivals.latents import CROSSCODER_SCORES, DIFFERENCE_SCORES
from stagediff.evidence.rivals.spec import RivalsSpec
from stagediff.evidence.rivals.table import seconds_of
from stagediff.markup import number, table
from stagediff.sections import ReportContext, Section

__all__ = ["MEASURES", "METHODS", "section"]

METHODS = {
    "diff": "stage-wise",
    "crosscoder-l1": "crosscoder, L1 with shared latents",
    "crosscoder-batchtopk": "crosscoder, BatchTopK",
    "difference-sae": "SAE on the difference",
}
MEASURES = {
    "score": "x + y by index (published)",
    "x": "x alone: D → F via D",
    "y": "y alone: M → F via M",
    "cos_s_d": "S → D: data alone",
    "cos_s_m": "S → M: model alone",
    "cos_s_f_direct": "S → F direct",
    "pair_novelty": "paired novelty",
    "excess_low": "paired novelty beyond retraining",
    "agreed_low": "beyond retraining, agreed",
    "agreed_contrast_low": "agreed × contrast",
    "aligned_low": "paired novelty × contrast",
    "contrast_low": "contrast alone",
    "paired_x_y": "x + y over the matched pair",
    "relative_base_norm": "relative decoder norm",
    "nu": "latent scaling ν",
    "nu_reconstruction": "latent scaling ν, reconstruction",
    "nu_error": "latent scaling ν, error",
    "strength_low": "mean step when active",
    "energy_low": "energy over all tokens",
}


def section(context: ReportContext) -> Section | None:
    """None for a run without rivals."""
    artifact = context.artifact("rivals")
    if artifact is None:
        return None
    spec = cast(RivalsSpec, artifact.spec())
    rows = artifact.read_table("rivals.parquet")
    n = int(rows.n.iloc[0])
    html = (
        "<p>Other ways to the same question, on the same rows. The crosscoders read both models' activations of every token side by side, the difference SAE "
        "what finetuning added to them. Asked is which features carry the new data (at least half of the top examples on held-out rows are new rows), by each "
        "method's own ranking of its own alive candidates. This one check needs row labels; of the scores only those marked do.</p>"
        + _table(context, spec, rows)
        + f'<p class="small muted">n is {number(n)}: so many features of the diff carry the new data; every method is allowed the same number of candidates. '
        "Recall is relative to a method's own carriers, and methods split one behaviour into different numbers of latents: compare hits with care. Tokens and "
        "seconds count every dictionary that a score rests on, from the first training on. One seed: <code>stagediff seeds</code> runs several.</p>"
        + _latents(context, spec)
    )
    return Section("rivals", "Rivals on the same rows", 32, html)


def _table(context: ReportContext, spec: RivalsSpec, rows: pd.DataFrame) -> str:
    body = []
    for r in rows.itertuples(index=False):
        seconds = seconds_of(context.store, spec, r.method, r.measure)
        body.append(
            [
                METHODS[r.method],
                MEASURES[r.measure] + (" (needs labels)" if r.needs_labels else ""),
                f"{r.carriers:,} of {r.candidates:,} {r.unit}s",
                _three(r.auroc),
                _three(r.average_precision),
                _three(r.carriers / r.candidates if r.candidates else None),
                f"{r.hits_n:,} ({_percent(r.recall_n)})",
                f"{r.hits_2n:,} ({_percent(r.recall_2n)})",
                number(int(r.tokens)),
                "–" if seconds is None else number(round(seconds)),
            ]
        )
    head = (
        "Method",
        "Score",
        "Carry the new data",
        "AUROC",
        "Average precision",
        "of a random order",
        "Hits in the first n (recall)",
        "in the first 2 n",
        "Tokens",
        "Seconds",
    )
    return table(head, body, caption="Which method ranks what carries the new data first", text_columns=3)


def _latents(context: ReportContext, spec: RivalsSpec) -> str:
    body = []
    for method, ref in spec.latents.items():
        artifact = context.store.artifact(ref).require()
        f, latents = artifact.manifest.figures, artifact.read_table("latents.parquet")
        alive = latents[latents.alive]
        main = (CROSSCODER_SCORES if method.startswith("crosscoder") else DIFFERENCE_SCORES)[0]
        spread = [_three(alive[main].quantile(q)) if len(alive) else "–" for q in (0.01, 0.5, 0.99)]
        body.append(
            [
                METHODS[method],
                MEASURES[main],
                _three(f["explained_variance"]),
                number(f["l0"]),
                _percent(f["dead_share"]),
                number(f["alive"]),
                number(f["carrying"]),
                " · ".join(spread),
            ]
        )
    if not body:
        return ""
    head = ("Rival", "Its first score", "Explained variance", "L0", "Dead", "Alive", "Carry the new data", "Score at 1 % · 50 % · 99 %")
    return table(head, body, caption="The rivals on held-out rows", text_columns=2)


def _three(value: Any) -> str:
    return "–" if value is None or value != value else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None or value != value else f"{100 * float(value):.3g} %"
