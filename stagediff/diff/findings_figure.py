"""Finished stage-wise runs as a picture: each one's scatter, the features that carry the new data coloured, the foremost selected ones numbered."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.enrichment import carries_new_data
from stagediff.diff.section.static import INK, plain_axes, rendered

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["findings_png"]

NUMBERED = 8
COLUMNS = 3


def findings_png(runs: "list[tuple[str, pd.DataFrame]]") -> bytes:
    """A PNG of one panel per run: (title, the diff's features.parquet)."""
    return rendered(lambda: _figure(runs), "findings")["findings.png"]


def _figure(runs: "list[tuple[str, pd.DataFrame]]") -> Figure:
    columns = min(COLUMNS, len(runs))
    figure = Figure(figsize=(4.2 * columns, 4.0 * math.ceil(len(runs) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(runs) / columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, (title, features) in zip(panels, runs, strict=False):
        _panel(axes, title, features)
    for axes in panels[len(runs) :]:
        axes.axis("off")
    return figure


def _panel(axes: Any, title: str, features: "pd.DataFrame") -> None:
    alive = features[features["alive"].to_numpy(bool)]
    carry = carries_new_data(alive)
    size = float(np.clip(6000 / max(len(alive), 1), 0.6, 9))
    for part, colour in ((alive[~carry], "#b8c4d2"), (alive[carry], "#d1495b")):
        axes.scatter(part["x"], part["y"], s=size, c=colour, linewidths=0)
    foremost = alive[alive["selected"].to_numpy(bool)].nsmallest(NUMBERED, "score")
    for number, (x, y) in enumerate(zip(foremost["x"], foremost["y"], strict=True), 1):
        axes.annotate(str(number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_title(f"{title}\n{int(carry.sum()):,} of {len(alive):,} carry the new data (red)", fontsize=9, color=INK)
    axes.set_xlabel("x = cos(D, F via D)", color=INK)
    axes.set_ylabel("y = cos(M, F via M)", color=INK)
    plain_axes(axes)
