"""Flagged shares with their exact intervals, as a small drawing."""

from typing import Any

from stagediff.evidence.labels.choice import GROUPS
from stagediff.evidence.labels.section.words import GROUP_NAMES, percent
from stagediff.markup import escape

__all__ = ["shares_html"]

WIDTH, ROW, LEFT, RIGHT, TOP = 800, 34, 130, 250, 8


def shares_html(f: dict[str, Any]) -> str:
    """One line per group that has features: a dot at its share, a line over its 95 % interval."""
    groups = [g for g in GROUPS if f[g]]
    if not groups:
        return ""
    bottom = TOP + ROW * len(groups)
    span = WIDTH - LEFT - RIGHT
    largest = min(1.0, max(0.05, 1.05 * max(f[f"{g}_high"] for g in groups)))

    def x(share: float) -> float:
        return round(LEFT + span * share / largest, 1)

    parts = []
    for tick in _ticks(largest):
        parts.append(
            f'<path class="faint" d="M{x(tick)} {TOP}V{bottom}"/><text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{percent(tick)}</text>'
        )
    for i, group in enumerate(groups):
        y = TOP + ROW * i + ROW / 2
        share, low, high = (f[f"{group}_{name}"] for name in ("share", "low", "high"))
        colour = "c-flagged" if group == "selected" else "c-plain"
        said = f"{f[f'{group}_flagged']} of {f[group]}: {percent(share)} ({percent(low)} to {percent(high)})"
        parts.append(
            f'<text class="ink" x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{GROUP_NAMES[group]}</text>'
            f'<path class="{colour}" stroke-width="2" d="M{x(low)} {y}H{x(min(high, largest))}"/>'
            f'<circle class="{colour}" cx="{x(share)}" cy="{y}" r="5"/><text x="{x(min(high, largest)) + 10}" y="{y + 4}">{escape(said)}</text>'
        )
    return (
        f'<figure class="card drawn" id="labels-shares"><svg viewBox="0 0 {WIDTH} {bottom + 24}" style="max-width:{WIDTH}px" role="img" '
        f'aria-label="Flagged shares">{"".join(parts)}<path class="line" d="M{LEFT} {bottom}H{LEFT + span}"/></svg>'
        "<figcaption>Share of flagged features, with the exact 95 % interval (Clopper and Pearson).</figcaption></figure>"
    )


def _ticks(largest: float) -> list[float]:
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if largest / s <= 6)
    return [step * i for i in range(int(largest / step + 1e-9) + 1)]
