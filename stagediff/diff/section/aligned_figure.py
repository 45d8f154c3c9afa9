"""The published and the aligned scores as one still picture, SVG and PNG. The same tables give the same bytes."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.aligned import pairs
from stagediff.diff.enrichment import carries_new_data
from stagediff.diff.section.static import INK, RASTER_FROM, plain_axes, rendered

__all__ = ["figure_files"]

COMMON, CARRIES = "#4c78a8", "#d1495b"


def figure_files(features: pd.DataFrame, published: pd.DataFrame) -> dict[str, bytes]:
    """`aligned.svg` and `aligned.png`: x against y by index, and novelty against novelty of matched pairs; red what carries the new data.

    Parameters: features: the align step's table. published: columns alive and new_top of the diff's, feature by feature.
    """
    return rendered(lambda: _figure(features, published), "aligned")


def _figure(features: pd.DataFrame, published: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    alive = published.alive.to_numpy(bool)
    _points(left, features.x[alive], features.y[alive], carries_new_data(published)[alive])
    left.set_title("published: the same index on both paths", color=INK, fontsize=10)
    left.set_xlabel("x = cos(D, F via D)", color=INK)
    left.set_ylabel("y = cos(M, F via M)", color=INK)
    matched = pairs(features)
    of_partner = matched.pair_novelty - matched.novelty_F_D
    _points(right, matched.novelty_F_D, of_partner, carries_new_data(matched))
    right.set_title("aligned: latents matched by direction", color=INK, fontsize=10)
    right.set_xlabel("largest cosine of F via D's latent with D and M", color=INK)
    right.set_ylabel("the same of its partner in F via M", color=INK)
    for axes in (left, right):
        plain_axes(axes)
        axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _points(axes: Any, x: pd.Series, y: pd.Series, flagged: np.ndarray) -> None:
    size = float(np.clip(9000 / max(len(x), 1), 0.6, 12))
    for mask, colour, label, factor in ((~flagged, COMMON, "others", 1), (flagged, CARRIES, "carry the new data", 2)):
        axes.scatter(
            x[mask],
            y[mask],
            s=size * factor,
            c=colour,
            linewidths=0,
            alpha=0.75,
            label=f"{label}, {int(mask.sum()):,}",
            rasterized=len(x) > RASTER_FROM,
        )
