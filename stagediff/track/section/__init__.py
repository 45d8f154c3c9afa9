"""SAE-Track's part of the report: what happened to every feature along the checkpoints, in words, figures, and a view of each feature.

Any of the analysis steps may be absent: its figures are left out. What the page holds of how many features is said in `choice`.
"""

from importlib import resources
from string import Template
from typing import Any

from stagediff.markup import number, table
from stagediff.sections import ReportContext, Section
from stagediff.track.section import words
from stagediff.track.section.choice import Choice, choose
from stagediff.track.section.overview import summarise
from stagediff.track.section.run import TrackRun, open_run
from stagediff.track.section.series import pack_features
from stagediff.track.section.static import overview_files
from stagediff.track.section.static_features import feature_files
from stagediff.track.section.windows import Windows, open_windows, pack_examples, pack_levels, pack_umap
from stagediff.track.spec import KINDS, MEASURES, PATTERNS, SETS

__all__ = ["asset", "fill", "section"]

SCRIPTS = ("charts.js", "track.js", "overview.js", "life.js", "table.js", "maps.js")
KIND_NAMES = {"token": "token-level", "concept": "concept-level", "noise": "noise", "dead": "dead"}
MEASURE_NAMES = dict(zip(MEASURES, ("cosine of activations", "cosine of features", "Jaccard", "weighted Jaccard"), strict=True))
SET_NAMES = dict(zip(SETS, ("strongest positions", "across activation levels"), strict=True))
AXIS = (
    '<label class="control">Axis <select class="field track-axis"><option value="index">checkpoints</option>'
    '<option value="log_step">log step</option><option value="step">step</option></select></label>'
)


def section(context: ReportContext) -> list[Section] | None:
    """The sections about a tracked run; None for a run of another kind."""
    run = open_run(context)
    if run is None:
        return None
    parts, choice, windows = summarise(run), choose(run, context.examples, context.seed), open_windows(run)
    files = {**overview_files(run, parts), **feature_files(run, parts, choice.outstanding, windows)}
    data = pack_features(run, choice)
    texts = _texts(run, choice, windows) if run.features else {}
    umap = pack_umap(run, windows)
    texts["words"] = list(run.words.index)  # last: the packing above adds to them
    style, scripts = f"<style>{asset('track.css')}</style>", tuple(asset(name) for name in SCRIPTS)
    found = [
        Section(
            "track", "What was found in training", 100, style + words.headline_html(run, parts), data=data, scripts=scripts, figures=files
        ),
        Section("track-features", "Features", 120, _features(run, choice, files), data=texts) if run.features else None,
        _made("track-phases", "Phases of training", 110, _phases(run, parts, files), parts),
        _made("track-formation", "Formation", 130, _formation(run, parts, files)),
        _made("track-drift", "Drift", 140, _drift(parts, files)),
        _made("track-paths", "Paths", 150, fill("paths.html", files=_links(files, "paths")) if data["full"].get("pc1") else ""),
        Section("track-umap", "UMAP", 160, fill("umap.html", files=_links(files, "umap-apart", "umap-aligned")), data=umap)
        if umap
        else None,
        _made("track-efficiency", "Efficiency", 170, _efficiency(run, parts, files)),
        Section("track-limits", "Limits of tracking", 901, asset("limits.html")),
    ]
    return [s for s in found if s is not None]


def asset(name: str) -> str:
    """A file of this section's assets."""
    return resources.files("stagediff.track.section").joinpath("assets", name).read_text(encoding="utf-8")


def fill(name: str, **values: str) -> str:
    """A template of the assets with its places filled; the axis switch is always there."""
    return Template(asset(name)).substitute(axis=AXIS, **values)


def _made(name: str, title: str, order: int, html: str, data: dict[str, Any] | None = None) -> Section | None:
    """None where there is nothing to show; data alone is kept, since other sections read it."""
    if not html and not data:
        return None
    return Section(name, title, order, html, data=data or {})


def _texts(run: TrackRun, choice: Choice, windows: Windows | None) -> dict[str, Any]:
    found = {"examples": pack_examples(run, choice.examples, windows), "levels": pack_levels(run, choice.examples, windows)}
    return {name: part for name, part in found.items() if part is not None}


def _phases(run: TrackRun, parts: dict[str, Any], files: dict[str, bytes]) -> str:
    links = _links(files, "phases")
    series = (parts.get("phases") or {}).get("series", {})
    cards = [
        fill("shares.html", files=links) if "shares" in parts else "",
        fill("patterns.html", files=links) if "counts" in parts else "",
        fill("drift-series.html", files=links) if "drift" in series else "",
    ]
    return (
        f"<p>{words.phase_words(run, parts)}</p>{''.join(cards)}{words.gains_html(parts)}"
        if any(cards)
        else "<p>The run has no steps about phases.</p>"
    )


def _features(run: TrackRun, choice: Choice, files: dict[str, bytes]) -> str:
    selects = ""
    if run.kind is not None:
        selects += _select("Kind", "track-kind", {**{k: KIND_NAMES[k] for k in KINDS}, "unclear": "unclear"})
    if run.pattern is not None:
        selects += _select("Went through", "track-pattern", {p: p.replace("_to_", " → ") for p in PATTERNS})
    cut = words.cut_words(run, len(choice.curves), len(choice.full), len(choice.examples))
    return fill("features.html", selects=selects, cut=cut, files=_links(files, "features", "lives", "regions"))


def _formation(run: TrackRun, parts: dict[str, Any], files: dict[str, bytes]) -> str:
    sets = _options({s: SET_NAMES[s] for s in SETS})
    main = {run.measure: MEASURE_NAMES[run.measure]}
    cards = [
        fill("progress.html", measures=_options({**main, **MEASURE_NAMES}), sets=sets) if "progress" in parts else "",
        fill("formed.html", rule=words.formation_rule(run)) if "formed" in parts else "",
        fill("agreement.html", sets=sets) if "agreement" in parts else "",
    ]
    return "".join(cards) + _links(files, "formation", "agreement") if any(cards) else ""


def _drift(parts: dict[str, Any], files: dict[str, bytes]) -> str:
    two = "".join(fill(f"{name}.html") for name in ("cosines", "turns") if name in parts)
    same = fill("same-step.html") if "same_step" in parts else ""
    histograms = fill("histograms.html", files=_links(files, "histograms")) if "histograms" in parts else ""
    return (f'<div class="two">{two}</div>{_links(files, "drift")}' if two else "") + same + histograms


def _efficiency(run: TrackRun, parts: dict[str, Any], files: dict[str, bytes]) -> str:
    part = parts.get("efficiency")
    if part is None:
        return ""
    names = {"scratch_full": "from scratch, first budget", "scratch_short": "from scratch, following budget"}
    rows = [
        [
            number(r["step"]),
            names.get(r["how"], r["how"]),
            *(_signed(r[c]) for c in ("ev_chained", "ev_other", "ev_gap", "loss_recovered_gap")),
        ]
        for r in part["compared"]
    ]
    head = ("Step", "Compared with", "Explained variance, chain", "The other", "Chain − other", "Loss recovered, chain − other")
    compared = table(head, rows, text_columns=2) if rows else ""
    return fill("efficiency.html", lead=words.efficiency_words(run, part), table=compared, files=_links(files, "efficiency"))


def _select(title: str, name: str, options: dict[str, str]) -> str:
    return f'<label class="control">{title} <select class="field" id="{name}"><option value="">any</option>{_options(options)}</select></label>'


def _options(options: dict[str, str]) -> str:
    return "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())


def _links(files: dict[str, bytes], *figures: str) -> str:
    """Links to the still pictures that were made."""
    made = [f"track-{figure}.{kind}" for figure in figures for kind in ("svg", "png") if f"track-{figure}.{kind}" in files]
    return f'<p class="files">Pictures for papers: {", ".join(f"""<a href="{name}">{name}</a>""" for name in made)}.</p>' if made else ""


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
