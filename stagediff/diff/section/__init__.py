"""The stage-wise part of the report: what was found in plain sentences, the double-finetune scatter, the features with their examples, the enrichment,
the quality of every stage, the organism's behaviour, and the method's known limits."""

import json
from typing import cast

import numpy as np
import pandas as pd

from stagediff.diff.section.choice import Choice, choose
from stagediff.diff.section.examples import Lookup, pack_examples, pack_histograms, top_features
from stagediff.diff.section.scatter import asset, pack_features
from stagediff.diff.section.static import scatter_files
from stagediff.diff.section.tables import behaviour_html, enrichment_html, quality_html
from stagediff.diff.section.words import headline_html
from stagediff.diff.spec import DiffSpec
from stagediff.sae.spec import StatisticsSpec
from stagediff.sections import ReportContext, Section

__all__ = ["EXAMPLES_STAGE", "section"]

EXAMPLES_STAGE = "F_D"
"""Examples, densities and histograms are F via D's (method.md, section 5)."""
WINDOW = 40


def section(context: ReportContext) -> list[Section] | None:
    """The sections about the run's diff; None for a run without one."""
    artifact = context.artifact("diff")
    if artifact is None:
        return None
    spec = cast(DiffSpec, artifact.spec())
    features = artifact.read_table("features.parquet")
    figures, bounds = artifact.manifest.figures, artifact.read_json("cut.json")
    chosen = choose(features, context.examples, context.seed, top=_top(context, spec))
    enrichment = artifact.read_table("enrichment.parquet")
    found = [
        Section("summary", "What was found", 0, headline_html(context, figures)),
        Section(
            "scatter",
            "All features",
            10,
            f"<style>{asset('scatter.css')}</style>{asset('scatter.html')}",
            data=pack_features(features, spec.cut, bounds, _pair_novelty(context)),
            figures={
                **scatter_files(features, spec.cut, bounds),
                "top.json": json.dumps(top_features(features, _lookup(context, spec)), indent=1, allow_nan=False).encode(),
            },
        ),
        Section(
            "features",
            "Features in detail",
            20,
            asset("features.html"),
            data=_examples(context, spec, chosen),
            scripts=tuple(asset(name) for name in ("features.js", "plot.js", "panel.js")),
        ),
        Section("enrichment", "Enrichment", 30, enrichment_html(enrichment)),
        Section("quality", "Quality of the dictionaries", 40, quality_html(context, features, spec, figures)),
        Section("limits", "Limits of the method", 900, asset("limits.html")),
    ]
    if behaviour := behaviour_html(context):
        found.append(Section("behaviour", "The models' behaviour", 50, behaviour))
    return found


def _pair_novelty(context: ReportContext) -> np.ndarray | None:
    artifact = context.artifact("align")
    if artifact is None:
        return None
    return artifact.read_table("features.parquet", columns=["pair_novelty"]).pair_novelty.to_numpy(float)


def _top(context: ReportContext, spec: DiffSpec) -> int:
    return cast(StatisticsSpec, context.store.artifact(spec.statistics[EXAMPLES_STAGE]).spec()).top


def _lookup(context: ReportContext, spec: DiffSpec) -> Lookup:
    from stagediff.sae.examples import feature_examples

    def lookup(features: list[int], ranks: int, window: int = WINDOW) -> pd.DataFrame:
        return feature_examples(context.store, spec.statistics[EXAMPLES_STAGE], features, window=window, ranks=ranks)

    return lookup


def _examples(context: ReportContext, spec: DiffSpec, chosen: Choice) -> dict[str, object]:
    statistics = spec.statistics[EXAMPLES_STAGE]
    return {
        "examples": pack_examples(chosen, _lookup(context, spec)),
        "histograms": pack_histograms(context.store.artifact(statistics).require(), chosen.full),
        "extreme": chosen.feature[chosen.extreme].tolist(),
        "random": chosen.feature[chosen.random].tolist(),
    }
