"""The report's parts about labels: flagged shares of the selected and of random features, the named features with their labels, the scatter with what is
flagged, and what every named feature does on base and on new rows in every stage.
"""

from typing import cast

import pandas as pd

from stagediff.diff.section.examples import snippets
from stagediff.diff.spec import DiffSpec
from stagediff.evidence.labels.section.distributions import distributions_html
from stagediff.evidence.labels.section.scatter import scatter_files, scatter_html
from stagediff.evidence.labels.section.shares import shares_html
from stagediff.evidence.labels.section.words import confusion_html, named_html, story_html
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.sections import ReportContext, Section

__all__ = ["NAMED", "named_features", "section"]

NAMED = 100
"""Named features that are listed, numbered and drawn at most; the tables hold all."""
STYLE = (
    "figure.drawn { margin: 14px 0; padding: 14px 16px 10px; } figure.drawn svg { display: block; width: 100%; height: auto; } "
    ".drawn text { font: 12px var(--sans); fill: var(--soft); } .drawn .ink { fill: var(--ink); } .drawn .line { stroke: var(--line-strong); fill: none; } "
    ".drawn .faint { stroke: var(--grid); fill: none; } .drawn figcaption { font-size: .87rem; color: var(--soft); margin-top: 6px; } "
    "#labels td:nth-child(5) { min-width: 150px; } "
    ".c-flagged { fill: var(--c-both); stroke: var(--c-both); } .c-plain { fill: var(--c-a); stroke: var(--c-a); } "
    ".c-other { fill: var(--c-b); stroke: var(--c-b); } .drawn .cloud { stroke: var(--c-none); fill: none; opacity: .55; } "
    ".multiples { min-width: 1080px; } .multiples td { padding: 4px 6px; } .multiples tbody th { white-space: normal; width: 210px; font-weight: 450; } "
    ".multiples svg { display: block; width: 136px; height: 56px; background: var(--plot); } .multiples .base { fill: var(--c-none); opacity: .6; } "
    ".multiples .new { fill: var(--c-both); fill-opacity: .28; stroke: var(--c-both); stroke-width: 1; } .multiples .rates { font-size: .74rem; "
    "color: var(--soft); white-space: nowrap; }"
)


def section(context: ReportContext) -> list[Section] | None:
    """None for a run without labels."""
    artifact = context.artifact("labels")
    if artifact is None:
        return None
    spec = cast(LabelsSpec, artifact.spec())
    diff = context.store.artifact(spec.diff).require()
    features, figures = diff.read_table("features.parquet"), artifact.manifest.figures
    labels = artifact.read_table("labels.parquet")
    named = named_features(labels, features)
    texts = snippets(_lookup(context, spec), [int(f) for f in named.feature])
    html = (
        f"<style>{STYLE}</style>{story_html(spec, figures)}{shares_html(figures)}"
        f"{scatter_html(features, labels, named)}{named_html(named, texts, figures)}{confusion_html(artifact.read_table('confusion.parquet'), figures)}"
    )
    return [
        Section("labels", "Labels", 32, html, figures=scatter_files(features, labels, named)),
        Section("distributions", "Activation distributions", 34, distributions_html(context, cast(DiffSpec, diff.spec()), named)),
    ]


def named_features(labels: pd.DataFrame, features: pd.DataFrame) -> pd.DataFrame:
    """The selected features by score, then the newborn ones, NAMED at most: the labels' table with the diff's x, y, score and new_top, and `number` from 1."""
    joined = labels.merge(features[["feature", "x", "y", "score", "new_top"]], on="feature", how="left", validate="one_to_one")
    named = joined[joined.selected | joined.born].assign(later=lambda t: ~t.selected)
    named = named.sort_values(["later", "score", "feature"]).head(NAMED).drop(columns="later").reset_index(drop=True)
    return named.assign(number=range(1, len(named) + 1))


def _lookup(context: ReportContext, spec: LabelsSpec):
    from stagediff.sae.examples import feature_examples

    def lookup(features: list[int], ranks: int) -> pd.DataFrame:
        return feature_examples(context.store, spec.statistics, features, window=spec.window, ranks=ranks)

    return lookup
