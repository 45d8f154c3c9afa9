"""The scatter as a still picture, SVG and PNG, for papers and the README. The same table gives the same bytes."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.spec import Cut

__all__ = ["INK", "RASTER_FROM", "plain_axes", "rendered", "scatter_files"]

RASTER_FROM = 5000
"""Points from which the SVG holds them as one picture: an SVG with 262,144 circles opens nowhere."""
INK, SOFT, LINE = "#1c2128", "#5b6472", "#d5d8d6"


def scatter_files(features: pd.DataFrame, cut: Cut, bounds: dict[str, Any]) -> dict[str, bytes]:
    """`scatter.svg` and `scatter.png` (1,440 x 1,300 pixels) of x against y for all features; dead ones in grey, selected ones on top."""
    return rendered(lambda: _figure(features, cut, bounds), "scatter")


def rendered(draw: Callable[[], Figure], name: str) -> dict[str, bytes]:
    """`<name>.svg` and `<name>.png` of what `draw` draws, without dates and with texts as text."""
    settings: Any = {
        "svg.hashsalt": "stagediff",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = draw()
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return {f"{name}.svg": svg.getvalue(), f"{name}.png": png.getvalue()}


def _figure(features: pd.DataFrame, cut: Cut, bounds: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    alive, selected = features["alive"].to_numpy(bool), features["selected"].to_numpy(bool)
    size = float(np.clip(9000 / max(len(features), 1), 0.6, 12))
    _points(axes, features[~alive], "#c4c9cf", size, f"dead, {int((~alive).sum()):,}", len(features))
    _points(axes, features[alive & ~selected], "#4c78a8", size, f"alive, {int((alive & ~selected).sum()):,}", len(features))
    _points(axes, features[selected], "#d1495b", size * 2, f"selected, {int(selected.sum()):,}", len(features))
    _cut(axes, cut, bounds)
    axes.set_xlabel("x = cos(D, F via D): what adding the model did after the data", color=INK)
    axes.set_ylabel("y = cos(M, F via M): what adding the data did after the model", color=INK)
    plain_axes(axes)
    axes.legend(loc="upper left", frameon=False, fontsize=8, markerscale=max(1.0, (8 / size) ** 0.5), labelcolor=INK)
    return figure


def plain_axes(axes: Any) -> None:
    """Two spines, a faint grid, quiet ticks."""
    axes.tick_params(colors=SOFT, labelsize=8)
    axes.grid(color="#eceeec", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)


def _points(axes: Any, part: pd.DataFrame, colour: str, size: float, label: str, total: int) -> None:
    axes.scatter(part["x"], part["y"], s=size, c=colour, linewidths=0, alpha=0.75, label=label, rasterized=total > RASTER_FROM)


def _cut(axes: Any, cut: Cut, bounds: dict[str, Any]) -> None:
    style = {"color": INK, "linewidth": 0.9, "linestyle": (0, (4, 3))}
    x, y = axes.get_xlim(), axes.get_ylim()
    if cut.kind == "absolute":
        axes.plot([-1, cut.value, cut.value], [cut.value, cut.value, -1], **style)
    elif bounds["score"] is not None:
        axes.plot(x, [bounds["score"] - v for v in x], **style)
    axes.set_xlim(*x)
    axes.set_ylim(*y)
