"""The report step: one self-contained HTML page about a run.

The page is a frame (title, contents, config, lineage) around the sections that the rooms hand in: every registered step that names a `section` function is
asked, and whatever it returns is placed by its `order`. The page never names a room. It loads nothing from anywhere: styles, scripts and data are inlined,
and a content security policy forbids the network and every script but ours, so that text from a corpus can do nothing even if it slipped through the
escaping. The same spec gives the same bytes: no times, hosts or paths appear.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from importlib import resources
from string import Template
from typing import Any

import yaml

from stagediff import steps
from stagediff.errors import UserError
from stagediff.markup import escape, number
from stagediff.report.spec import ReportSpec
from stagediff.sections import ReportContext, Section
from stagediff.steps import Job

__all__ = ["build", "compute", "frame", "gather"]

CONFIG_ORDER = 980
LINEAGE_ORDER = 990
FIGURES_SHOWN = 5


def compute(spec: ReportSpec, job: Job) -> dict[str, Any]:
    """Writes `index.html` and the sections' figures beside it. Returns its size and what it holds."""
    context = ReportContext(job.store, spec.nodes, spec.config, spec.examples, spec.seed)
    sections = gather(context)
    page = build(spec, context, sections).encode("utf-8")
    job.writer.write_bytes("index.html", page)
    names = ["index.html"]
    for section in sections:
        for name, content in section.figures.items():
            if name in names:
                raise ValueError(f"section {section.name!r} writes {name!r}, which another part of the report wrote already")
            names.append(name)
            job.writer.write_bytes(name, content)
    return {"sections": len(sections), "page_bytes": len(page), "page": "index.html", "files": len(names)}


def gather(context: ReportContext) -> list[Section]:
    """The sections of every registered step that has something to say about this run, in the page's order.

    A section function returns a Section, several of them, or None. Several steps may name one function: it is asked once.
    """
    found: list[Section] = []
    for function in dict.fromkeys(step.section for step in steps.sections() if step.section):
        found.extend(_as_sections(steps.resolve(function)(context)))
    names = [s.name for s in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two sections of the report share a name: {sorted(names)}")
    return sorted(found, key=lambda s: (s.order, s.name))


def build(spec: ReportSpec, context: ReportContext, sections: list[Section]) -> str:
    """The page's HTML."""
    config = Section("config", "Config", CONFIG_ORDER, _config(spec))
    lineage = Section("lineage", "Lineage", LINEAGE_ORDER, _lineage(context))
    return frame(spec.title, f"report <code>{escape(spec.key)}</code>", [*sections, config, lineage])


def frame(title: str, source: str, sections: Iterable[Section]) -> str:
    """A self-contained page of these sections, in their order. `source`: markup that says what it was made from."""
    parts = sorted(sections, key=lambda s: (s.order, s.name))
    scripts = [_asset("page.js"), *dict.fromkeys(script for s in parts for script in s.scripts)]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        source=source,
        policy=policy,
        style=_asset("page.css"),
        contents="".join(f'<li><a href="#{escape(s.name)}">{escape(s.title)}</a></li>' for s in parts),
        sections="".join(_section(s) for s in parts),
        data="".join(_data(s) for s in parts if s.data),
        scripts="".join(f"<script>{script}</script>" for script in scripts),
    )


def _as_sections(answer: Section | Iterable[Section] | None) -> list[Section]:
    if answer is None:
        return []
    return [answer] if isinstance(answer, Section) else list(answer)


def _section(section: Section) -> str:
    name = escape(section.name)
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(section.title)}</h2>{section.html}</section>'


def _data(section: Section) -> str:
    """The section's data as inert JSON. No `<` survives, so nothing in it can close the element or open another."""
    body = json.dumps(_plain(section.data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data-{escape(section.name)}">{body}</script>'


def _plain(value: Any) -> Any:
    """NaN and infinities become null: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _config(spec: ReportSpec) -> str:
    text = yaml.safe_dump(_plain(spec.config), sort_keys=False, allow_unicode=True, width=100)
    said = "The run's config with every default filled in. The same config gives the same artifacts."
    return f'<p>{said}</p><pre tabindex="0"><code>{escape(text)}</code></pre>'


def _lineage(context: ReportContext) -> str:
    rows = []
    names = {ref: name for name, ref in context.nodes.items()}
    for name, ref in context.nodes.items():
        artifact = context.store.artifact(ref)
        if not artifact.is_complete:
            raise UserError(
                f"The report needs the artifact {ref} ({name}), which is {artifact.state}. Run the config again: what is missing is computed, the rest is kept."
            )
        manifest = artifact.manifest
        size = sum(f.bytes for f in manifest.files if f.path != "spec.json")  # which holds paths
        figures = _figures(manifest.figures)
        upstream = ", ".join(escape(names[u]) if u in names else f"<code>{escape(u.key[:8])}</code>" for u in artifact.spec().refs())
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(manifest.step)}</td><td><code>{escape(ref)}</code></td><td class="n">{_bytes(size)}</td>'
            f'<td class="wrap">{upstream or "–"}</td><td class="wrap">{figures}</td></tr>'
        )
    return (
        f"<p>The {len(rows)} artifacts of this run. A key is a hash of everything that determines the artifact's content; "
        "<code>stagediff show KEY</code> tells more, times and hosts included.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Artifacts"><table class="plain"><thead><tr>'
        '<th scope="col">Name</th><th scope="col">Step</th>'
        '<th scope="col">Artifact</th><th scope="col" class="n">Size</th><th scope="col">Made from</th><th scope="col">Key figures</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(figures: dict[str, Any]) -> str:
    """The first few figures in the step's own order, the rest folded away."""
    shown = [escape(f"{name.replace('_', ' ')} {number(value)}") for name, value in figures.items() if isinstance(value, (int, float, str))]
    more = (
        f"<details><summary>{len(shown) - FIGURES_SHOWN} more</summary>{', '.join(shown[FIGURES_SHOWN:])}</details>"
        if len(shown) > FIGURES_SHOWN
        else ""
    )
    return (", ".join(shown[:FIGURES_SHOWN]) + more) or "–"


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _asset(name: str) -> str:
    return resources.files("stagediff.report").joinpath("assets", name).read_text(encoding="utf-8")
