"""The report's part about aligned scores: whether births have saturated, every score judged on the same pairs, the foremost pairs, and a figure of both
the published and the aligned scores."""

from typing import Any, cast

import numpy as np
import pandas as pd

from stagediff.diff.aligned import pairs
from stagediff.diff.cuts import lowest
from stagediff.diff.section.aligned_figure import figure_files
from stagediff.diff.section.examples import Lookup, snippets
from stagediff.diff.section.tables import score_table
from stagediff.diff.spec import AlignSpec
from stagediff.markup import escape, facts, number, table
from stagediff.sections import ReportContext, Section

__all__ = ["FOREMOST", "section"]

FOREMOST = 20
AGREED = "the largest angle beyond retraining, agreed"
NAMES = {
    "pair_novelty": "paired novelty (matched, no labels)",
    "excess_low": "paired novelty beyond retraining",
    "agreed_low": "beyond retraining, agreed",
    "agreed_contrast_low": "agreed × contrast (needs row labels)",
    "aligned_low": "paired novelty × contrast (needs row labels)",
    "contrast_low": "contrast alone (needs row labels)",
    "paired_x_y": "x + y over the matched pair",
    "score": "x + y by index (published)",
}


def section(context: ReportContext) -> Section | None:
    """None for a run without aligned scores."""
    artifact = context.artifact("align")
    if artifact is None:
        return None
    spec = cast(AlignSpec, artifact.spec())
    features, figures = artifact.read_table("features.parquet"), artifact.manifest.figures
    enriched = artifact.read_table("enrichment.parquet")
    flagged = context.store.artifact(spec.diff).require().read_table("features.parquet", columns=["alive", "new_top"])

    def lookup(ids: list[int], ranks: int) -> pd.DataFrame:
        from stagediff.sae.examples import feature_examples

        return feature_examples(context.store, spec.statistics["F_D"], ids, window=40, ranks=ranks)

    html = (
        "<p>The scatter above trusts the index: x and y of one number are taken for one feature. Features that are born in F lie at different indices on the "
        "two paths, so here the two F dictionaries are matched by decoder direction, nearest pair first, and a pair is scored by how new both of its latents "
        "are: <em>novelty</em> is a latent's largest cosine with any latent of D or of M, <em>paired novelty</em> the sum over the pair; low is "
        f"suspicious. The published x + y stands beside.</p>{_births(figures, spec)}{_rotation(figures, spec)}{facts(_facts(figures))}"
        f"{_judged(enriched)}{_foremost(features, lookup)}"
        '<p class="small muted">Pictures for papers: <a href="aligned.svg">aligned.svg</a>, <a href="aligned.png">aligned.png</a> '
        "(left x against y by index, right the novelty of both latents of each pair).</p>"
    )
    return Section("aligned", "Aligned scores", 25, html, figures=figure_files(features, flagged))


def _births(f: dict[str, Any], spec: AlignSpec) -> str:
    """What was born on each path, and the warning where more would be."""
    said = (
        f"<p>Newborn (no latent of D or M within a cosine of {number(spec.newborn_below)}): {number(f['newborn_F_D'])} in F via D, "
        f"{number(f['newborn_F_M'])} in F via M, {number(f['newborn_F_direct'])} in the direct finetune. {number(f['newborn_pairs'])} newborns of the two "
        f"paths are matched with each other; {_percent(f['newborn_same_index_rate'])} of these lie at the same index. Of newborns that carry the new data "
        f"({number(f['newborn_new_F_D'])} in F via D, {number(f['newborn_new_F_M'])} in F via M) F via D has {_percent(f['coverage_F_D'])} of F via M's, "
        f"F via M {_percent(f['coverage_F_M'])} of F via D's: estimates of the share of needed latents that a path has, and high ones, since what is hard to "
        "give birth to is missed on both.</p>"
    )
    if f["births_saturated"] is False:
        said += (
            f'<p class="warn"><strong>Births have not saturated.</strong> A path lacks more than {_percent(1 - spec.saturated)} of what the other one found '
            "in the new data: features that only the finetuned model and the new data together need may not exist yet, and what does not exist is not "
            f"found. Raise finetune.tokens or finetune.lr until both shares exceed {_percent(spec.saturated)}; until then an empty list means nothing.</p>"
        )
    if f["births_saturated"] is None:
        said += "<p>Nothing was born that one path could share with another, so whether births have saturated cannot be told.</p>"
    if f["left_out"]:
        said += (
            f"<p>{number(f['left_out'])} alive latents were not matched (see diff.aligned.candidates): each has a latent of D or M at its own index within "
            f"a cosine of {_three(f['left_out_novelty_at_least'])} or more.</p>"
        )
    return said


def _rotation(f: dict[str, Any], spec: AlignSpec) -> str:
    return (
        f"<p>The rotation that best maps S's directions on M's (over {number(f['rotation_features'])} features alive in both) turns a direction by "
        f"{_three(f['rotation_angle'])}° on average and changes the mean cosine from {_three(f['rotation_cosine_before'])} "
        f"to {_three(f['rotation_cosine_after'])}. "
        f"It is {'taken out of the cosines here' if spec.take_out_rotation else 'left in the cosines (diff.take_out_rotation takes it out)'}.</p>"
    )


def _facts(f: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (number(f["pairs"]), "pairs of latents", f"median cosine {_three(f['pair_cos_median'])}"),
        (_percent(f["same_index_rate"]), "of the pairs share an index", f"of newborn pairs {_percent(f['newborn_same_index_rate'])}"),
        (
            _three(f.get("average_precision_pair_novelty")),
            "average precision of paired novelty",
            f"published x + y {_three(f.get('average_precision_published_x_y'))}"
            + (
                f", beyond retraining and agreed {_three(f['average_precision_agreed'])}"
                if f.get("average_precision_agreed") is not None
                else ""
            ),
        ),
    ]


def _judged(enriched: pd.DataFrame) -> str:
    first = enriched.iloc[0]
    return (
        "<p>Every score on the same pairs. A pair <em>carries the new data</em> when at least half of the top examples of its two latents are new rows "
        "(a check that needs row labels; paired novelty itself needs none). <em>Beyond retraining</em>: less what retraining alone leaves at its indices. "
        "<em>Agreed</em>: as far as the other path or the direct finetune has the direction too.</p>"
        + score_table(enriched, NAMES)
        + f'<p class="small muted">{int(first.flagged):,} of {int(first.alive):,} pairs carry the new data: '
        f"{_three(first.flagged / max(first.alive, 1))} is the average precision of a random order.</p>"
    )


def _foremost(features: pd.DataFrame, lookup: Lookup) -> str:
    """The first pairs by the foremost score that the run has."""
    ranked = pairs(features)
    by, said = ("agreed_low", AGREED) if ranked.pair_agreed.notna().any() else ("pair_novelty", "the lowest paired novelty")
    defined = ranked[by].notna().to_numpy()
    found = ranked[lowest(ranked[by].to_numpy(), defined, FOREMOST)].sort_values([by, "feature"])
    rank = ranked.set_index("feature").score.rank(method="first")
    shown = snippets(lookup, [int(i) for i in found.feature])
    rows = [
        [
            f"{r.feature} · {r.partner}",
            shown.get(int(r.feature), "–"),
            _three(r.pair_agreed),
            _three(r.pair_novelty),
            _three(r.novelty_F_D),
            _three(r.pair_novelty - r.novelty_F_D),
            _three(r.pair_cos),
            _three(r.aligned),
            "–" if r.pair_new_top != r.pair_new_top else f"{r.pair_new_top:.2f}",
            _three(r.score),
            number(int(rank[r.feature])) if r.score == r.score else "–",
        ]
        for r in found.itertuples(index=False)
    ]
    head = (
        "F via D · F via M",
        "Strongest example",
        "Beyond retraining, agreed",
        "Paired novelty",
        "of F via D's",
        "of F via M's",
        "Cosine of the two",
        "× contrast",
        "New top",
        "x + y",
        "Rank by x + y",
    )
    return table(head, rows, caption=f"The {len(rows)} pairs with {said}", text_columns=2)


def _three(value: Any) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "–" if value is None else escape(f"{100 * float(value):.3g} %")
