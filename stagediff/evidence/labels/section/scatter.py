"""The double-finetune scatter once more: flagged features coloured, the named ones numbered. A drawing in the page, and the same as files for papers."""

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.section.static import INK, RASTER_FROM, plain_axes, rendered
from stagediff.markup import escape

__all__ = ["scatter_files", "scatter_html"]

SIZE, MARGIN, RIGHT = 620, 56, 30
CLOUD = 20_000
"""Unlabelled features drawn in the page at most; a seeded draw of them where there are more."""
X_TITLE = "x = cos(D, F via D): what adding the model did after the data"
Y_TITLE = "y = cos(M, F via M): what adding the data did after the model"
KINDS = {
    "flagged": ("named, flagged", "c-flagged", "#d1495b"),
    "plain": ("named, not flagged", "c-plain", "#4c78a8"),
    "other": ("random, flagged", "c-other", "#d98e04"),
}


def scatter_html(features: pd.DataFrame, labels: pd.DataFrame, named: pd.DataFrame) -> str:
    """Parameters: features: the diff's table; labels: the labels step's; named: those with a `number`."""
    points = _points(features, labels, named)
    cloud = features[features.alive.to_numpy(bool) & ~features.feature.isin(points.feature) & features.score.notna()]
    drawn = cloud if len(cloud) <= CLOUD else cloud.sample(CLOUD, random_state=0)
    low, high = _range(pd.concat([drawn[["x", "y"]], points[["x", "y"]]]))

    def at(x, y):
        scale = (SIZE - MARGIN - RIGHT) / (high - low)
        return np.round(MARGIN + (x - low) * scale, 1), np.round(SIZE - MARGIN - (y - low) * scale, 1)

    parts = []
    for tick in _ticks(low, high):
        (h, v) = at(tick, tick)
        parts.append(
            f'<path class="faint" d="M{h} {RIGHT}V{SIZE - MARGIN}M{MARGIN} {v}H{SIZE - RIGHT}"/>'
            f'<text x="{h}" y="{SIZE - MARGIN + 17}" text-anchor="middle">{tick:g}</text><text x="{MARGIN - 8}" y="{v + 4}" text-anchor="end">{tick:g}</text>'
        )
    xs, ys = at(drawn.x.to_numpy(), drawn.y.to_numpy())
    dots = "".join(f"M{x:g} {y:g}h0" for x, y in zip(xs, ys, strict=True))
    parts.append(f'<path class="cloud" stroke-width="3" stroke-linecap="round" d="{dots}"/>')
    for p in points.itertuples(index=False):
        x, y = at(p.x, p.y)
        numbered = p.number > 0
        parts.append(
            f'<circle class="{KINDS[p.kind][1]}" cx="{x}" cy="{y}" r="{4.5 if numbered else 3}"><title>{escape(_said(p))}</title></circle>'
        )
        if numbered:
            parts.append(f'<text class="ink number" x="{x + 6}" y="{y - 5}">{p.number}</text>')
    middle = (SIZE + MARGIN - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{SIZE - 10}" text-anchor="middle">{escape(X_TITLE)}</text>'
        f'<text transform="translate(14 {SIZE - middle}) rotate(-90)" text-anchor="middle">{escape(Y_TITLE)}</text>'
    )
    key = "".join(
        f'<circle class="{colour}" cx="{MARGIN + 12 + 175 * i}" cy="12" r="4.5"/><text x="{MARGIN + 22 + 175 * i}" y="16">{name}, '
        f"{int((points.kind == kind).sum())}</text>"
        for i, (kind, (name, colour, _)) in enumerate(KINDS.items())
    )
    grey = f"{len(drawn):,} others" if len(drawn) == len(cloud) else f"{len(drawn):,} of {len(cloud):,} others, drawn at random"
    return (
        f'<figure class="card drawn" id="labels-scatter"><svg viewBox="0 0 {SIZE} {SIZE}" style="max-width:{SIZE + 120}px" role="img" '
        f'aria-label="Scatter with flagged and named features">{"".join(parts)}{key}</svg>'
        f"<figcaption>All alive features by x and y. Numbers are those of the table below; grey: {grey}. Pictures for papers: "
        '<a href="labels.svg">labels.svg</a>, <a href="labels.png">labels.png</a>.</figcaption></figure>'
    )


def scatter_files(features: pd.DataFrame, labels: pd.DataFrame, named: pd.DataFrame) -> dict[str, bytes]:
    """`labels.svg` and `labels.png`. The same tables give the same bytes."""
    return rendered(lambda: _figure(features, _points(features, labels, named)), "labels")


def _figure(features: pd.DataFrame, points: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.2, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cloud = features[features.alive.to_numpy(bool) & ~features.feature.isin(points.feature)]
    size = float(np.clip(9000 / max(len(features), 1), 0.6, 12))
    axes.scatter(cloud.x, cloud.y, s=size, c="#c4c9cf", linewidths=0, label=f"others, {len(cloud):,}", rasterized=len(cloud) > RASTER_FROM)
    for kind, (name, _, colour) in KINDS.items():
        part = points[points.kind == kind]
        axes.scatter(part.x, part.y, s=22 if kind != "other" else 12, c=colour, linewidths=0, label=f"{name}, {len(part):,}")
    for p in points[points.number > 0].itertuples(index=False):
        axes.annotate(str(p.number), (p.x, p.y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xlabel(X_TITLE, color=INK)
    axes.set_ylabel(Y_TITLE, color=INK)
    plain_axes(axes)
    axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _points(features: pd.DataFrame, labels: pd.DataFrame, named: pd.DataFrame) -> pd.DataFrame:
    """What stands out: named features, and random ones that are flagged. Columns feature, x, y, number (0: none), kind, label."""
    shown = labels[labels.feature.isin(named.feature) | labels.flagged]
    joined = shown.merge(features[["feature", "x", "y"]], on="feature").merge(named[["feature", "number"]], on="feature", how="left")
    joined = joined[joined.x.notna() & joined.y.notna()]
    number = joined.number.fillna(0).astype(int)
    kind = np.where(joined.selected | joined.born, np.where(joined.flagged, "flagged", "plain"), "other")
    return joined.assign(number=number, kind=kind)[["feature", "x", "y", "number", "kind", "label"]].sort_values(
        ["number", "feature"], ascending=[True, True]
    )


def _said(point) -> str:
    return f"feature {point.feature}: {point.label or 'no label'} (x {point.x:.3f}, y {point.y:.3f})"


def _range(points: pd.DataFrame) -> tuple[float, float]:
    if points.empty:
        return 0.0, 1.0
    low = float(np.floor((points.to_numpy().min() - 0.01) * 20) / 20)
    return low, 1.0 + 0.02 * (1.0 - low)


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / s <= 8)
    return [round(step * i, 3) for i in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]
