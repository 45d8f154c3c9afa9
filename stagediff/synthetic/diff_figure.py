"""The ladder of planted worlds as a picture: each score's average precision on each rung, a dot per seed, a bar at the median of those scored."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.diff.section.static import INK, plain_axes, rendered
from stagediff.synthetic.diff_judge import ALL_SCORES

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["figure", "ladder_png"]

DRAWN = {
    "no_change": "#a9b1bb",
    "direct": "#8d6cab",
    "l1_nu_reconstruction": "#9c755f",
    "path": "#4c78a8",
    "x_y": "#e09f3e",
    "pair_novelty": "#5aa469",
    "excess": "#d1495b",
    "agreed": "#b0125b",
    "agreed_contrast": "#1c2128",
}
"""Scores of `diff_judge.ALL_SCORES` that are drawn, with their colours; those that were not trained are left out."""
MEASURES = {"average_precision": "average precision over candidates", "feature_precision": "average precision per planted feature"}
WIDTH = 0.8
"""Of a rung's scores together; rungs are 1 apart."""
LEGEND_WIDTH = 2.7
"""Inches of an entry."""


def ladder_png(table: "pd.DataFrame") -> bytes:
    """A PNG of `figure`."""
    return rendered(lambda: figure(table), "ladder")["ladder.png"]


def figure(table: "pd.DataFrame") -> Figure:
    """A panel per measure. `table`: rows of `stagediff.synthetic.diff_ladder.diff_ladder`, of which class "all" is drawn."""
    table = table[table["class"] == "all"]
    rungs = list(dict.fromkeys(table["rung"]))
    width = 2.2 + 1.5 * len(rungs)
    drawn = Figure(figsize=(width, 7.4), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(MEASURES), 1, sharex=True)
    for axes, (measure, said) in zip(panels, MEASURES.items(), strict=True):
        _panel(axes, table, rungs, measure)
        axes.set_ylabel(said, color=INK)
    panels[-1].set_xticks(range(len(rungs)), [_tick(table[table["rung"] == rung], rung) for rung in rungs])
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside upper center", ncols=max(1, int(width / LEGEND_WIDTH)), frameon=False, fontsize=8, labelcolor=INK
    )
    return drawn


def _panel(axes: Any, table: "pd.DataFrame", rungs: list[str], measure: str) -> None:
    drawn = {score: colour for score, colour in DRAWN.items() if (table["score"] == score).any()}
    step = WIDTH / len(drawn)
    for i, (score, colour) in enumerate(drawn.items()):
        mine = table[table["score"] == score]
        for at, rung in enumerate(rungs):
            values = mine[measure][mine["rung"] == rung].dropna().to_numpy(float)
            x = at - WIDTH / 2 + (i + 0.5) * step
            axes.scatter(
                np.full(len(values), x), values, s=12, c=colour, alpha=0.65, linewidths=0, label=ALL_SCORES[score] if at == 0 else None
            )
            if len(values):
                axes.hlines(np.median(values), x - 0.42 * step, x + 0.42 * step, colors=colour, linewidth=2)
    axes.set_xlim(-0.6, len(rungs) - 0.4)
    axes.set_ylim(-0.02, 1.02)
    plain_axes(axes)


def _tick(rows: "pd.DataFrame", rung: str) -> str:
    """The rung's name, and of how many seeds it was scored."""
    seeds = rows.drop_duplicates("seed")
    return f"{rung}\n{int((~seeds['undertrained'].astype(bool)).sum())} of {len(seeds)} worlds"
