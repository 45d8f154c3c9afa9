"""Pictures of single features, SVG and PNG: a table of the outstanding ones, some lives, paths, regions, and the UMAPs."""

from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from stagediff.track.section.run import NONE, TrackRun
from stagediff.track.section.static import INK, KIND_COLOURS, KIND_WORDS, SOFT, checkpoint_axis, clean, render, sheet
from stagediff.track.section.windows import Windows, datapoints
from stagediff.track.spec import KINDS, MEASURES

__all__ = ["feature_files"]

COLOURS = (
    "#d1495b",
    "#0b7fab",
    "#d98e04",
    "#3c9d5b",
    "#8457b8",
    "#c0559b",
    "#5b8def",
    "#8f6b3f",
    "#18a3a3",
    "#7d8a2e",
    "#e07b53",
    "#4d5d8a",
)
ROWS, LIVES, PATHS, REGIONS = 18, 4, 12, 3
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def feature_files(run: TrackRun, parts: dict[str, Any], order: np.ndarray, windows: Windows | None) -> dict[str, bytes]:
    """`order`: outstanding features, most telling first."""
    files: dict[str, bytes] = {}
    if run.main_progress is not None and len(order):
        files |= render("track-features", lambda: _table(run, order[:ROWS]))
        files |= render("track-lives", lambda: _lives(run, parts, order[:LIVES]))
    if "drift" in run.artifacts and len(order):
        files |= render("track-paths", lambda: _paths(run, order[:PATHS]))
    if windows is not None and "formation" in run.artifacts and len(order):
        files |= render("track-regions", lambda: _regions(run, np.sort(order[:REGIONS]), windows))
    umap, chosen = run.table("umap", "umap"), run.table("umap", "features")
    if umap is not None and chosen is not None and not umap.empty:
        for fit in dict.fromkeys(umap["fit"]):
            files |= render(f"track-umap-{fit}", lambda fit=fit: _umap(run, umap[umap["fit"] == fit], chosen, fit))  # type: ignore[misc]
    return files


def _kind(run: TrackRun, feature: int) -> str:
    code = run.kind[feature, -1] if run.kind is not None else NONE
    return KINDS[code] if code < len(KINDS) else "all"


def _say(text: str, most: int = 24) -> str:
    shown = "".join(c if c.isprintable() else "·" for c in text.translate(VISIBLE))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _formed(run: TrackRun, feature: int) -> str:
    at = run.formed("top", run.measure)
    return f"{run.steps[at[feature]]:,}" if at is not None and at[feature] < len(run.steps) else "never"


def _table(run: TrackRun, features: np.ndarray) -> Figure:
    figure = sheet(8, 0.3 * len(features) + 0.6)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(-len(features) - 0.2, 0.9)
    m = run.main_progress
    assert m is not None
    tokens, words = run.token, list(run.words.index)  # reading the tokens fills the words
    heads = (
        (0, "feature"),
        (1.2, "kind at the end"),
        (3.4, "token"),
        (5.6, "formed at step"),
        (7.2, "final M"),
        (8.2, "M through training"),
    )
    for x, head in heads:
        axes.text(x, 0.4, head, fontsize=8, color=SOFT, va="center")
    high = float(np.nanmax(m[features])) if np.isfinite(m[features]).any() else 1.0
    for row, feature in enumerate(features):
        y, kind = -row - 0.5, _kind(run, feature)
        token = words[tokens[feature, -1]] if tokens is not None and tokens[feature, -1] >= 0 else "–"
        cells = (f"{feature:,}", KIND_WORDS[kind], _say(token), _formed(run, feature), f"{m[feature, -1]:.3f}")
        for (x, _), cell in zip(heads, cells, strict=False):
            axes.text(x, y, cell, fontsize=8, color=INK, va="center")
        t = np.linspace(8.2, 9.9, len(run.steps))
        axes.plot(t, y - 0.35 + 0.7 * np.clip(m[feature] / high, -0.05, 1), color=KIND_COLOURS[kind], linewidth=1.2)
    return figure


def _lives(run: TrackRun, parts: dict[str, Any], features: np.ndarray) -> Figure:
    figure, T = sheet(9, 2.1 * len(features) + 0.3), np.arange(len(run.steps))
    grid = figure.subplots(len(features), 2, squeeze=False)
    at = run.formed("top", run.measure)
    for measure, style in zip(MEASURES, ("-", "--", "-.", ":"), strict=True):
        m = run.progress("top", measure)
        assert m is not None
        for row, feature in zip(grid, features, strict=True):
            row[0].plot(T, m[feature], style, color="#0b7fab", linewidth=1.4, label=measure.replace("_", " "))
    for k, (row, feature) in enumerate(zip(grid, features, strict=True)):
        clean(row[0], f"Feature {feature:,}, {KIND_WORDS[_kind(run, feature)]}: progress M by measure", "above random")
        clean(row[1], "cosine of its decoder row", "cosine")
        if run.cos_final is not None and run.cos_previous is not None:
            row[1].plot(T, run.cos_final[feature], color="#0b7fab", marker="o", markersize=2, label="with the end")
            row[1].plot(T, run.cos_previous[feature], color="#d98e04", marker="o", markersize=2, label="with the checkpoint before")
            band = (parts.get("null") or {}).get("previous", [None])
            if band[0] is not None:
                row[1].axhspan(band[0], band[2], color="#d98e04", alpha=0.2, linewidth=0, label="null, 5 to 95 %")
        if at is not None and at[feature] < len(T):
            for axes in row:
                axes.axvline(at[feature], color="#1a7f5a", linewidth=1, linestyle="--")
        for axes in row:
            checkpoint_axis(axes, run, most=8, label="training step (green: formed)" if k == len(features) - 1 else "")
    for axes in grid[0]:
        axes.legend(frameon=False, fontsize=6.5)
    return figure


def _paths(run: TrackRun, features: np.ndarray) -> Figure:
    pc1, pc2 = run.grid("drift", "trajectories", "pc1"), run.grid("drift", "trajectories", "pc2")
    assert pc1 is not None
    assert pc2 is not None
    at = run.formed("top", run.measure)
    rows = -(-len(features) // 4)
    figure = sheet(9, 2.2 * rows + 0.2)
    grid = figure.subplots(rows, 4, squeeze=False).ravel()
    for axes, feature in zip(grid, features, strict=False):
        kind, cut = _kind(run, feature), int(at[feature]) if at is not None else 0
        clean(axes, f"{feature:,}, {KIND_WORDS[kind]}")
        axes.plot(pc1[feature, : cut + 1], pc2[feature, : cut + 1], "--", color=SOFT, linewidth=1, marker="o", markersize=2)
        axes.plot(pc1[feature, cut:], pc2[feature, cut:], color=KIND_COLOURS[kind], linewidth=1.6, marker="o", markersize=2.5)
        for k, word in ((0, "start"), (-1, "end")):
            if np.isfinite(pc1[feature, k]):
                axes.annotate(word, (pc1[feature, k], pc2[feature, k]), fontsize=6.5, color=INK, xytext=(3, 3), textcoords="offset points")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
    for axes in grid[len(features) :]:
        axes.set_axis_off()
    figure.supxlabel("first two components of each feature's own decoder rows; dashed until it formed", fontsize=8, color=INK)
    return figure


def _regions(run: TrackRun, features: np.ndarray, windows: Windows) -> Figure:
    """Per feature a column of snippets, strongest level first; the datapoint itself between brackets."""
    frame = datapoints(run, features)
    texts = windows.around(frame["row"].to_numpy(), frame["position"].to_numpy(), around=4)
    words = list(run.words.index)
    most = max((int((frame["feature"] == f).sum()) for f in features), default=0)
    figure = sheet(11, 0.2 * most + 1.0)
    for axes, feature in zip(figure.subplots(1, len(features), squeeze=False).ravel(), features, strict=True):
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(-most - 1.5, 0.5)
        axes.set_title(f"Feature {feature:,}, {KIND_WORDS[_kind(run, feature)]}", loc="left", fontsize=9, color=INK)
        mine = np.flatnonzero((frame["feature"] == feature).to_numpy())
        for line, e in enumerate(mine):
            row = frame.iloc[e]
            pieces = [f"[{words[w]}]" if k == 4 else words[w] for k, w in enumerate(texts[e]) if w >= 0]
            shade = 1 - 0.12 * float(row["level"])
            colour = tuple(shade * a + (1 - shade) * b for a, b in zip(to_rgb(SOFT), to_rgb(INK), strict=True))
            axes.text(0, -line - 0.5, f"L{int(row['level']) + 1}  {row['activation']:.2f}", fontsize=6.5, color=SOFT, va="center")
            axes.text(0.19, -line - 0.5, _say("".join(pieces), 46), fontsize=6.5, color=colour, va="center", family="DejaVu Sans Mono")
    return figure


def _umap(run: TrackRun, table: Any, chosen: Any, fit: str) -> Figure:
    steps = sorted(set(table["step"]))
    figure = sheet(2.2 * len(steps) + 1.6, 2.6)
    colours = {int(f): COLOURS[k % len(COLOURS)] for k, f in enumerate(chosen["feature"])}
    grid = figure.subplots(1, len(steps), squeeze=False, sharex=fit != "apart", sharey=fit != "apart").ravel()
    for axes, step in zip(grid, steps, strict=True):
        part = table[table["step"] == step]
        axes.set_title(f"step {step:,}", loc="left", fontsize=9, color=INK)
        for feature in sorted(set(part["feature"])):
            mine = part[part["feature"] == feature]
            label = "random" if feature < 0 else f"{feature:,} {KIND_WORDS[_kind(run, feature)]}"
            axes.scatter(mine["u"], mine["v"], s=7, c=colours.get(feature, "#c4c9cf"), linewidths=0, label=label)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#d5d8d6")
    handles, labels = grid[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=7)
    return figure
