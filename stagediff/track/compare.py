"""`stagediff compare`: one page about several tracked runs, for example of model sizes. It reads what is done and computes no step."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.sections import ReportContext
    from stagediff.track.section.comparison import Compared

__all__ = ["command", "compare_page", "open_sources"]

PAGE = "stagediff.report.page:frame"
FEWEST = 2


def command(
    sources: Annotated[
        list[str],
        typer.Argument(help="Stores (every tracked run with a report in them) and config files of finished runs.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("compare.html"),
    as_json: Annotated[bool, typer.Option("--json", help="The agreement of each two runs on standard output.")] = False,
) -> None:
    """Compares tracked runs: kinds, phases, formation, drift, quality side by side, and their agreement as numbers."""
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {str(out)!r} cannot be written: a file's name in a folder that exists was expected.")
    found = open_sources(sources)
    html, rows = compare_page(found)
    out.write_text(html, encoding="utf-8")
    if as_json:
        print(json.dumps({"page": str(out), "runs": [name for name, _ in found], "agreement": rows}, indent=2))
    else:
        print(f"Compared {', '.join(name for name, _ in found)}. Open {out}.")


def open_sources(sources: list[str]) -> list[tuple[str, "ReportContext"]]:
    """(name, context) of every tracked run that is meant, in the order given; names are made different where they are the same.

    Raises UserError where a source holds no finished tracked run, or fewer than two are meant in all.
    """
    found: list[tuple[str, str, ReportContext]] = []
    for source in sources:
        contexts = _from_config(source) if source.endswith((".yaml", ".yml")) else _from_store(source)
        found += [(title, source, context) for title, context in contexts]
    if len(found) < FEWEST:
        raise UserError(
            f"{', '.join(sources)} hold{'s' if len(sources) == 1 else ''} {len(found)} finished tracked run; a comparison needs at least two. Name more "
            "stores or config files."
        )
    titles = [title for title, _, _ in found]
    named: list[tuple[str, ReportContext]] = []
    for title, source, context in found:
        name = title if titles.count(title) == 1 else f"{title} in {source}"
        taken = [n for n, _ in named]
        number = next(k for k in range(1, len(found) + 1) if (name if k == 1 else f"{name} ({k})") not in taken)
        named.append((name if number == 1 else f"{name} ({number})", context))
    return named


def compare_page(found: list[tuple[str, "ReportContext"]]) -> tuple[str, list[dict[str, Any]]]:
    """The page's HTML, and the agreement of each two runs."""
    from stagediff.markup import escape
    from stagediff.steps import resolve
    from stagediff.track.section.compare_sections import sections
    from stagediff.track.section.comparison import agreement

    runs = [_compared(name, context) for name, context in found]
    rows = agreement(runs)
    refs = "".join(str(ref) for _, context in found for ref in context.nodes.values())
    key = hashlib.sha256(refs.encode()).hexdigest()[:20]
    title = "Tracked runs: " + ", ".join(r.name for r in runs)
    return resolve(PAGE)(title, f"{len(runs)} runs, <code>{escape(key)}</code>", sections(runs, rows)), rows


def _compared(name: str, context: "ReportContext") -> "Compared":
    from stagediff.track.section.comparison import Compared
    from stagediff.track.section.overview import summarise
    from stagediff.track.section.run import open_run

    run = open_run(context)
    assert run is not None
    return Compared(name, run, summarise(run))


def _from_config(path: str) -> list[tuple[str, "ReportContext"]]:
    from stagediff.config import load_config, make_plan
    from stagediff.sections import ReportContext
    from stagediff.store import Store
    from stagediff.track.section.run import NODES

    config = load_config(path)
    store = Store(config.store)
    plan = make_plan(config, store)
    nodes = {node.name: node.ref for node in plan}
    if not set(NODES) & set(nodes):
        raise UserError(
            f"{path} is a run of kind {config.kind!r}, which follows no training; `stagediff compare` takes runs of kind track or both."
        )
    waiting = [name for name in NODES if name in nodes and not store.artifact(nodes[name]).is_complete]
    if waiting:
        raise UserError(f"The run of {path} is not finished; missing: {', '.join(waiting)}. `stagediff run {path}` computes that.")
    return [(plan.name, ReportContext(store, nodes, plan.config, config.report.examples, config.seed))]


def _from_store(url: str) -> list[tuple[str, "ReportContext"]]:
    """Every tracked run with a finished report; of several reports with one title the newest."""
    from stagediff.sections import ReportContext
    from stagediff.store import Store
    from stagediff.track.section.run import NODES

    if "://" not in url and not Path(url).is_dir():
        raise UserError(f"There is no store {url!r}. Expected a folder, s3://bucket/prefix, or a config file ending in .yaml.")
    store = Store(url)
    newest: dict[str, tuple[str, ReportContext]] = {}
    for ref in store.refs("reports"):
        artifact = store.artifact(ref)
        if not artifact.is_complete:
            continue
        spec: Any = artifact.spec()
        if not set(NODES) & set(spec.nodes) or not all(store.artifact(r).is_complete for n, r in spec.nodes.items() if n in NODES):
            continue
        context = ReportContext(store, spec.nodes, spec.config, spec.examples, spec.seed)
        if spec.title not in newest or newest[spec.title][0] < artifact.manifest.created:
            newest[spec.title] = artifact.manifest.created, context
    if not newest:
        raise UserError(
            f"The store {url} holds no finished report about a tracked run. Run its config to the end, or name the config file instead."
        )
    return [(title, context) for title, (_, context) in sorted(newest.items())]
