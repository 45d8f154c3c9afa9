"""The comparison's sections: runs and their agreement as tables, then the figures, all runs in one or side by side."""

from string import Template
from typing import Any

from stagediff.markup import escape, number, table
from stagediff.sections import Section
from stagediff.track.section import asset
from stagediff.track.section.comparison import Compared, runs_data
from stagediff.track.spec import KINDS

__all__ = ["sections"]

SCRIPTS = ("charts.js", "compare.js")
AXIS = (
    '<label class="control">Axis <select class="field compare-axis"><option value="progress">relative progress, log</option>'
    '<option value="share">share of training</option><option value="log">step, log</option></select></label>'
)


def sections(runs: list[Compared], rows: list[dict[str, Any]]) -> list[Section]:
    """What `stagediff compare` shows; a figure that no run has is left out."""
    style = f"<style>{asset('track.css')}</style>"
    have = {name for r in runs for name in r.parts}
    figures = [
        ("kinds", "Kinds", "shares"),
        ("phases", "Phases", "phases"),
        ("formation", "Formation", "formed"),
        ("drift", "Drift", "cosines"),
        ("quality", "Quality", "efficiency"),
    ]
    found = [
        Section("runs", "The runs", 0, style + _runs(runs), data={"runs": runs_data(runs)}, scripts=tuple(asset(s) for s in SCRIPTS)),
        Section("agreement", "Do they agree?", 10, _agreement(rows)),
        *(Section(name, title, 20 + i, _filled(f"compare-{name}.html")) for i, (name, title, part) in enumerate(figures) if part in have),
        Section("limits", "Limits", 900, asset("compare-limits.html")),
    ]
    return found


def _filled(name: str) -> str:
    return Template(asset(name)).substitute(axis=AXIS)


def _runs(runs: list[Compared]) -> str:
    rows = []
    for r in runs:
        config = r.run.context.config.get("track") or r.run.context.config
        hook = config.get("hook") or {}
        chained = ((r.parts.get("efficiency") or {}).get("quality") or {}).get("chained")
        ev = chained["explained_variance"][-1] if chained else None
        alive = [r.parts["shares"][k][-1] for k in KINDS[:3]] if "shares" in r.parts else None
        formed = r.parts.get("formed") or {}
        ever, total = sum(p["ever"] for p in formed.values()), sum(p["features"] for p in formed.values())
        rows.append(
            [
                r.name,
                _unbroken(_model(config.get("model") or {})),
                _unbroken(f"layer {hook.get('layer', '?')}, {hook.get('site', '?')}") if hook else "–",
                r.run.features,
                len(r.run.steps),
                f"{number(r.run.steps[0])} to {number(r.run.steps[-1])}",
                " · ".join(f"{100 * v / max(sum(alive), 1):.0f} %" for v in alive) if alive else "–",
                f"{100 * ever / total:.0f} %" if total else "–",
                ev,
            ]
        )
    head = (
        "Run",
        "Model",
        "Hook point",
        "Features",
        "Checkpoints",
        "Steps",
        "Token · concept · noise",
        "Formed",
        "Explained variance",
    )
    named = ", ".join(f"<strong>{escape(r.name)}</strong>" for r in runs)
    lead = f"{len(runs)} tracked runs side by side: {named}. Kinds, features that have formed and explained variance are those at the last checkpoint."
    return f'<p class="lead">{lead}</p>' + table(head, rows, text_columns=3)


def _model(config: dict[str, Any]) -> str:
    """What a run's config says of its model's size."""
    if organism := config.get("organism"):
        shape = organism.get("architecture") or {}
        return f"{shape.get('layers', '?')} layers, width {shape.get('width', '?')}"
    return str(config.get("name") or "–")


def _unbroken(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _agreement(rows: list[dict[str, Any]]) -> str:
    lines = [
        ("Shares of kinds: mean difference", [_number(r["share_difference"]) for r in rows]),
        ("Shares of kinds: correlation", [_number(r["share_correlation"]) for r in rows]),
        ("Shares of patterns: mean difference", [_number(r["pattern_difference"]) for r in rows]),
        ("Boundaries of phases: correlation", [_with_count(r["boundary_correlation"], r["boundaries"]) for r in rows]),
        ("Boundaries of phases: mean difference in progress", [_number(r["boundary_difference"]) for r in rows]),
        ("Boundaries whose intervals overlap", ["–" if (o := r["boundary_overlap"]) is None else f"{100 * o:.0f} %" for r in rows]),
        *(
            (f"Formation of {k}-level features: distance (later by)", [_formed(r[f"formation_{k}"], r[f"median_{k}"]) for r in rows])
            for k in ("token", "concept")
        ),
        ("Median cosine with the final direction: mean difference", [_number(r["cosine_difference"]) for r in rows]),
        ("Explained variance: mean difference, second − first", [_number(r["ev_difference"], True) for r in rows]),
        ("Explained variance at the end: second − first", [_number(r["ev_last"], True) for r in rows]),
    ]
    head = ("", *(f"{r['a']} – {r['b']}" for r in rows))
    return asset("compare-agreement.html") + table(head, [[name, *values] for name, values in lines])


def _with_count(value: float | None, n: int) -> str:
    return f"{_number(value)} (n = {n})" if n else "–"


def _formed(distance: float | None, later: float | None) -> str:
    return "–" if distance is None else f"{_number(distance)} ({_number(later, True)})"


def _number(value: float | None, signed: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if signed else ''}.3f}".replace("-", "−")
