"""A small line chart as SVG inside the page: it follows the page's colours, needs no script, and a table beside it says the same in numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stagediff.markup import escape

__all__ = ["Band", "Line", "chart"]

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True)
class Line:
    """One series; `colour` is a CSS colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    width: float = 1.8
    dash: str = ""


@dataclass(frozen=True)
class Band:
    """An area between two curves."""

    name: str
    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str


def chart(
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    x: str,
    y: str,
    title: str,
    top: float | None = 1.0,
    log: bool = False,
    rule: float | None = None,
) -> str:
    """The figure's markup. `top`: the y axis' end (None: the largest value); `log`: a logarithmic x axis; `rule`: a dashed line at that y."""
    series: list[Line | Band] = [*lines, *bands]
    xs = sorted({float(v) for s in series for v in s.x})
    highest = (
        top if top is not None else max([v for s in lines for v in s.y] + [v for b in bands for v in b.high] + [rule or 0, 1e-9]) * 1.08
    )
    lowest = min([0.0, *(v for s in lines for v in s.y), *(v for b in bands for v in b.low)])

    def place_x(value: float) -> float:
        low, high, at = (math.log(v) for v in (xs[0], xs[-1], value)) if log else (xs[0], xs[-1], value)
        return LEFT + (WIDTH - LEFT - RIGHT) * ((at - low) / (high - low) if high > low else 0.5)

    def place_y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - lowest) / (highest - lowest))

    def points(at: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{place_x(a):.1f},{place_y(v):.1f}" for a, v in zip(at, values, strict=True))

    parts = []
    for i in range(5):
        value = lowest + (highest - lowest) * i / 4
        h = place_y(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{h:.1f}" y2="{h:.1f}" stroke="var(--grid)"/>')
        parts.append(_text(LEFT - 7, h + 4, f"{value:.3g}", "end"))
    parts += [_text(place_x(v), HEIGHT - BOTTOM + 18, f"{v:g}", "middle") for v in _spread(xs, place_x)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x, "middle"))
    for band in bands:
        area = points(band.x, band.high) + " " + points(list(band.x)[::-1], list(band.low)[::-1])
        parts.append(f'<polygon points="{area}" fill="{band.colour}" opacity=".28"><title>{escape(band.name)}</title></polygon>')
    if rule is not None:
        h = place_y(rule)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{h:.1f}" y2="{h:.1f}" stroke="var(--soft)" stroke-dasharray="4 3"/>')
    for line in lines:
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        parts.append(
            f'<polyline points="{points(line.x, line.y)}" fill="none" stroke="{line.colour}" stroke-width="{line.width}"{dash}>'
            f"<title>{escape(line.name)}</title></polyline>"
        )
        parts += [
            f'<circle cx="{place_x(a):.1f}" cy="{place_y(v):.1f}" r="2.4" fill="{line.colour}"/>'
            for a, v in zip(line.x, line.y, strict=True)
        ]
    named = dict.fromkeys((s.name, s.colour) for s in series)
    legend = "".join(
        f'<span style="white-space:nowrap;margin-right:14px"><span style="display:inline-block;width:11px;height:11px;border-radius:3px;'
        f'background:{colour};margin-right:5px"></span>{escape(name)}</span>'
        for name, colour in named
    )
    return (
        f'<figure style="margin:0;flex:1 1 420px;max-width:620px"><figcaption class="small"><strong>{escape(title)}</strong><br>'
        f'<span class="muted">{escape(y)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" style="width:100%;height:auto;display:block">'
        f'{"".join(parts)}</svg><p class="small" style="margin:2px 0 0">{legend}</p></figure>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" fill="var(--soft)">{escape(text)}</text>'


def _spread(values: Sequence[float], place: object, least: float = 30.0) -> list[float]:
    """Those values whose labels do not stand on each other."""
    shown: list[float] = []
    for value in values:
        if not shown or place(value) - place(shown[-1]) >= least:  # type: ignore[operator]
            shown.append(value)
    return shown
