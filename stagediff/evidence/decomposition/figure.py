"""The decomposition as one still picture of three panels, SVG and PNG: the run's scatter, and each path alone with the colours frozen."""

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.section.static import INK, RASTER_FROM, plain_axes, rendered
from stagediff.evidence.decomposition.mixing import VIEWS

__all__ = ["COLOURS", "figure_files"]

COLOURS = {"upper_right": "#9aa3ad", "upper_left": "#4c78a8", "lower_right": "#e0a030", "lower_left": "#d1495b"}
"""Quadrant -> colour, in the order they are drawn."""
NAMES = {
    "upper_right": "turned on neither axis",
    "upper_left": "low x: by the model",
    "lower_right": "low y: by the data",
    "lower_left": "lower left: on both",
}
TITLES = {"both": "both paths", "data_path": "along S → D → F alone", "model_path": "along S → M → F alone"}
AXES = {
    "x": "x = cos(D, F via D)",
    "y": "y = cos(M, F via M)",
    "cos_s_d": "cos(S, D)",
    "cos_s_m": "cos(S, M)",
}


def figure_files(features: pd.DataFrame) -> dict[str, bytes]:
    """`decomposition.svg` and `decomposition.png` of a diff's features.parquet. The same table gives the same bytes."""
    return rendered(lambda: _figure(features), "decomposition")


def _figure(features: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(13.5, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    size = float(np.clip(9000 / max(len(features), 1), 0.6, 12))
    for axes, (view, (horizontal, vertical)) in zip(figure.subplots(1, len(VIEWS)), VIEWS.items(), strict=True):
        for quadrant, colour in COLOURS.items():
            part = features[features.quadrant == quadrant]
            axes.scatter(
                part[horizontal],
                part[vertical],
                s=size * (2 if quadrant == "lower_left" else 1),
                c=colour,
                linewidths=0,
                alpha=0.75,
                label=f"{NAMES[quadrant]}, {len(part):,}",
                rasterized=len(features) > RASTER_FROM,
            )
        axes.set_title(TITLES[view], color=INK, fontsize=10)
        axes.set_xlabel(AXES[horizontal], color=INK)
        axes.set_ylabel(AXES[vertical], color=INK)
        plain_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure
