"""Pictures of the figures about the whole run, SVG and PNG, for papers. The same tables give the same bytes.

The axis is the checkpoints', evenly spaced; the page has the other two.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stagediff.track.section.overview import HOWS
from stagediff.track.section.run import TrackRun
from stagediff.track.spec import MEASURES, PATTERNS

__all__ = ["INK", "KIND_COLOURS", "KIND_WORDS", "SOFT", "checkpoint_axis", "clean", "moments", "overview_files", "render", "sheet"]

INK, SOFT, LINE, GRID = "#1c2128", "#5b6472", "#c9cdcb", "#eceeec"
KIND_COLOURS = {"token": "#0b7fab", "concept": "#d1495b", "noise": "#a9b0ba", "unclear": "#c6b98f", "dead": "#dfe2e5", "all": INK}
KIND_WORDS = {
    "token": "token-level",
    "concept": "concept-level",
    "noise": "noise",
    "unclear": "too few examples",
    "dead": "dead",
    "all": "all",
}
PATTERN_COLOURS = dict(zip(PATTERNS, ("#9aa7b5", "#4fa3d1", "#8457b8", "#c0559b", "#3c9d5b", "#d98e04", "#18a3a3", "#6b5b4b"), strict=True))
HOW_STYLES = {"chained": ("#0b7fab", "-", "carried along the chain"), "scratch_full": ("#d1495b", "--", "from scratch, first budget")}
HOW_STYLES |= {"scratch_short": ("#d98e04", ":", "from scratch, following budget")}
SETTINGS: Any = {
    "svg.hashsalt": "stagediff",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
}
DPI = 150


def overview_files(run: TrackRun, parts: dict[str, Any]) -> dict[str, bytes]:
    """`track-<figure>.svg` and `.png` of everything there is in the overview."""
    made: dict[str, Callable[[], Figure] | None] = {
        "efficiency": (lambda: _efficiency(run, parts)) if "efficiency" in parts else None,
        "phases": (lambda: _phases(run, parts)) if "shares" in parts or "counts" in parts or "phases" in parts else None,
        "formation": (lambda: _formation(run, parts)) if "progress" in parts or "formed" in parts else None,
        "agreement": (lambda: _agreement(parts)) if "agreement" in parts else None,
        "histograms": (lambda: _histograms(run, parts)) if "histograms" in parts else None,
        "drift": (lambda: _drift(run, parts)) if "cosines" in parts or "turns" in parts else None,
    }
    return {name: body for figure, make in made.items() if make is not None for name, body in render(f"track-{figure}", make)}


def render(name: str, make: Callable[[], Figure]) -> Iterator[tuple[str, bytes]]:
    """(file name, content) as SVG and as PNG."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token in a script that the font lacks shows as a box
        figure = make()
        for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
            figure.set_layout_engine("none")  # laid out by the first, for both
            yield f"{name}.{kind}", buffer.getvalue()


def sheet(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Any, title: str = "", y: str = "") -> Any:
    """The look of all axes."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_ylabel(y, color=INK, fontsize=8)
    axes.tick_params(colors=SOFT, labelsize=7)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    return axes


def checkpoint_axis(axes: Any, run: TrackRun, most: int = 10, label: str = "training step (checkpoints evenly spaced)") -> None:
    """Positions are checkpoint indices; labels their steps, thinned from the end."""
    last = len(run.steps) - 1
    shown = [k for k in range(last + 1) if (last - k) % -(-(last + 1) // most) == 0]
    axes.set_xticks(shown, [f"{run.steps[k]:,}" for k in shown])
    axes.set_xlabel(label, color=INK, fontsize=8)


def moments(axes: Any, parts: dict[str, Any]) -> None:
    """The boundaries of phases on the checkpoint axis."""
    for b in ((parts.get("phases") or {}).get("boundaries") or {}).get("index", []):
        axes.axvline(b["at"], color=INK, linewidth=1, linestyle=(0, (5, 3)))
        if b["low"] is not None and b["high"] is not None:
            axes.axvspan(b["low"], b["high"], color=INK, alpha=0.08, linewidth=0)


def _floats(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


def _efficiency(run: TrackRun, parts: dict[str, Any]) -> Figure:
    figure, quality = sheet(9, 5.4), parts["efficiency"]["quality"]
    grid = figure.subplots(2, 2).ravel()
    names = (("explained_variance", "explained variance"), ("loss_recovered", "loss recovered"), ("l0", "L0"), ("dead", "dead share"))
    for axes, (name, title) in zip(grid, names, strict=True):
        clean(axes, title)
        for how in HOWS:
            if how in quality and name in quality[how]:
                colour, line, label = HOW_STYLES[how]
                axes.plot(quality[how]["at"], _floats(quality[how][name]), line, color=colour, marker="o", markersize=3, label=label)
        checkpoint_axis(axes, run)
        if name in ("l0", "dead"):
            axes.set_ylim(bottom=0)
    grid[0].legend(frameon=False, fontsize=7)
    return figure


def _phases(run: TrackRun, parts: dict[str, Any]) -> Figure:
    rows = [
        n
        for n in ("shares", "counts", "drift")
        if n in parts or (n == "drift" and "drift" in (parts.get("phases") or {}).get("series", {}))
    ]
    figure, T = sheet(8, 2.5 * len(rows) + 0.4), np.arange(len(run.steps))
    for axes, name in zip(figure.subplots(len(rows), 1, squeeze=False).ravel(), rows, strict=True):
        if name == "shares":
            clean(axes, "Kinds of features", "share of all features")
            order = ("token", "concept", "noise", "unclear", "dead")
            stack = [np.array(parts["shares"][k]) / run.features for k in order]
            axes.stackplot(T, stack, colors=[KIND_COLOURS[k] for k in order], labels=[KIND_WORDS[k] for k in order])
            axes.set_ylim(0, 1)
        elif name == "counts":
            clean(axes, "What features did between checkpoints (maintaining left out)", "features")
            below = np.zeros(len(T) - 1)
            for pattern in PATTERNS[1:]:
                values = np.array(parts["counts"][pattern][1:])
                label = pattern.replace("_", " ")
                axes.bar(T[1:] - 0.5, values, 0.86, bottom=below, color=PATTERN_COLOURS[pattern], label=label)
                below = below + values
        else:
            series = parts["phases"]["series"]["drift"]
            clean(axes, "Drift since the checkpoint before", "1 − cosine")
            axes.fill_between(series["at"], _floats(series["low"]), _floats(series["high"]), color="#0b7fab", alpha=0.2, linewidth=0)
            axes.plot(series["at"], _floats(series["value"]), color="#0b7fab", marker="o", markersize=3)
            if parts.get("null") and parts["null"]["previous"][1] is not None:
                axes.axhline(1 - parts["null"]["previous"][1], color=SOFT, linewidth=1, linestyle="--", label="median of the null")
        moments(axes, parts)
        axes.set_xlim(0, len(T) - 1)
        checkpoint_axis(axes, run, most=16)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _formation(run: TrackRun, parts: dict[str, Any]) -> Figure:
    progress = (parts.get("progress") or {}).get("top", {})
    figure, T = sheet(9, 5.4), np.arange(len(run.steps))
    grid = figure.subplots(2, 3).ravel()
    for axes, measure in zip(grid, MEASURES, strict=False):
        clean(axes, f"M, {measure.replace('_', ' ')}", "likeness above random")
        for kind, values in progress.get(measure, {}).items():
            axes.fill_between(T, _floats(values["low"]), _floats(values["high"]), color=KIND_COLOURS[kind], alpha=0.2, linewidth=0)
            axes.plot(T, _floats(values["m"]), color=KIND_COLOURS[kind], marker="o", markersize=2.5, label=KIND_WORDS[kind])
        checkpoint_axis(axes, run, most=6, label="training step")
    clean(grid[4], "When features formed", "share that has formed")
    for kind, values in (parts.get("formed") or {}).items():
        grid[4].plot(T, _floats(values["formed"]), color=KIND_COLOURS[kind], marker="o", markersize=2.5, label=KIND_WORDS[kind])
    checkpoint_axis(grid[4], run, most=6, label="training step")
    grid[5].set_axis_off()
    handles, labels = grid[4].get_legend_handles_labels()
    grid[5].legend(handles, [f"{label} at the end" for label in labels], frameon=False, fontsize=8, loc="center left")
    return figure


def _agreement(parts: dict[str, Any]) -> Figure:
    sets = parts["agreement"]
    figure = sheet(9, 3.6 * len(sets))
    names = [m.replace("activation_", "act. ").replace("feature_", "feat. ").replace("_", " ") for m in MEASURES]
    for row, (which, found) in zip(figure.subplots(len(sets), 2, squeeze=False), sets.items(), strict=True):
        for axes, (key, title) in zip(
            row, (("m", "M over features and checkpoints (Pearson)"), ("time", "formation steps (Spearman)")), strict=True
        ):
            square = np.array([_floats(line) for line in found[key]])
            axes.imshow(square, cmap="Blues", vmin=0, vmax=1)
            for (i, j), value in np.ndenumerate(square):
                text = "–" if np.isnan(value) else f"{value:.2f}"
                axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if value > 0.6 else INK)
            axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
            axes.set_title(f"{which}: {title}", loc="left", fontsize=9, color=INK)
    return figure


def _histograms(run: TrackRun, parts: dict[str, Any]) -> Figure:
    """Small multiples, at most 12 checkpoints spread over the chain."""
    found = parts["histograms"].get("final") or parts["histograms"]["previous"]
    null = next((c for c in parts["histograms"].get("null", {"counts": []})["counts"] if c), None)
    there = [k for k, c in enumerate(found["counts"]) if c]
    shown = [there[i] for i in np.unique(np.linspace(0, len(there) - 1, min(12, len(there))).round().astype(int))]
    edges, floor = np.array(found["edges"]), _lowest(found, null)
    most = max(max(found["counts"][k]) for k in shown)
    rows = -(-len(shown) // 4)
    figure = sheet(9, 1.9 * rows + 0.3)
    grid = figure.subplots(rows, 4, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, k in zip(grid, shown, strict=False):
        clean(axes, f"step {run.steps[k]:,}")
        axes.stairs(found["counts"][k], edges, fill=True, color="#0b7fab", alpha=0.85)
        if null:
            axes.stairs(null, edges, color="#d1495b", linewidth=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlim(floor, 1)
        axes.set_ylim(0.7, most * 1.5)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel(
        "cosine with the final direction (red: the null)" if "final" in parts["histograms"] else "cosine", fontsize=8, color=INK
    )
    figure.supylabel("features", fontsize=8, color=INK)
    return figure


def _lowest(found: dict[str, Any], null: list[float] | None) -> float:
    """Where the histograms begin: below it there is nothing."""
    counts = np.array([c for c in (*found["counts"], null) if c]).sum(0)
    first = int(np.flatnonzero(counts)[0]) if counts.any() else 0
    return float(min(found["edges"][max(0, first - 1)], 0.9))


def _drift(run: TrackRun, parts: dict[str, Any]) -> Figure:
    figure, T = sheet(9, 6.4 if "same_step" in parts else 3.4), np.arange(len(run.steps))
    grid = figure.subplots(2 if "same_step" in parts else 1, 2, width_ratios=(1.35, 1), squeeze=False)
    left, right = grid[0]
    clean(left, "Cosine with the final direction: median, quartiles", "cosine")
    for kind, values in (parts.get("cosines") or {}).items():
        if kind == "all" and len(parts["cosines"]) > 1:
            continue
        left.fill_between(T, _floats(values["low"]), _floats(values["high"]), color=KIND_COLOURS[kind], alpha=0.15, linewidth=0)
        left.plot(T, _floats(values["median"]), color=KIND_COLOURS[kind], marker="o", markersize=2.5, label=KIND_WORDS[kind])
    checkpoint_axis(left, run, most=8)
    if parts.get("cosines"):
        left.legend(frameon=False, fontsize=7)
    clean(right, "Drift before and after formation", "median of 1 − cosine per checkpoint")
    turns = parts.get("turns") or {}
    styles = (("before", "#d98e04", "before"), ("after", "#1a7f5a", "after"), ("null", SOFT, "null"))
    for i, figures in enumerate(turns.values()):
        for j, (key, colour, label) in enumerate(styles):
            middle, low, high = _floats(figures[key])
            x = i + (j - 1) * 0.22
            right.plot([x, x], [low, high], color=colour, linewidth=2)
            right.plot([x], [middle], "o", color=colour, markersize=4, label=label if i == 0 else None)
    right.set_xticks(range(len(turns)), [KIND_WORDS[k] for k in turns])
    right.set_ylim(bottom=0)
    if turns:
        right.legend(frameon=False, fontsize=7)
    if "same_step" in parts:
        _same_step(grid[1], run, parts["same_step"])
    return figure


def _same_step(row: Any, run: TrackRun, part: dict[str, Any]) -> None:
    """Formed against not yet formed features: their drift, and the difference with its interval."""
    clean(row[0], "At the same checkpoint: formed and not yet formed", "median of 1 − cosine")
    clean(row[1], "their difference, 90 % interval", "formed − not yet formed")
    for name, colour, label in (("drift_formed", "#1a7f5a", "has formed"), ("drift_unformed", "#d98e04", "forms later")):
        row[0].plot(part["at"], _floats(part[name]), color=colour, marker="o", markersize=2.5, label=label)
    row[1].fill_between(part["at"], _floats(part["low"]), _floats(part["high"]), color="#1a7f5a", alpha=0.2, linewidth=0)
    row[1].plot(part["at"], _floats(part["difference"]), color="#1a7f5a", marker="o", markersize=2.5)
    row[1].axhline(0, color=SOFT, linewidth=0.8)
    for axes in row:
        checkpoint_axis(axes, run, most=8)
    row[0].legend(frameon=False, fontsize=7)
