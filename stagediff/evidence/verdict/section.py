"""The report's part "Verdicts": what each claim needs, how many named features have it, and a card for each of the first."""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.diff.spec import STAGES
from stagediff.evidence.labels.section.distributions import read_panels
from stagediff.evidence.verdict.cards import CLAIM_NAMES, STYLE, card
from stagediff.evidence.verdict.compute import CONTROL
from stagediff.evidence.verdict.criteria import CLAIMS, OUTCOMES
from stagediff.evidence.verdict.spec import VerdictSpec
from stagediff.markup import facts, number, table
from stagediff.sections import ReportContext, Section

__all__ = ["SHOWN", "section"]

SHOWN = 30
"""Cards at most; the table holds all."""
EXAMPLES = 3
WINDOW = 40


def section(context: ReportContext) -> Section | None:
    """None for a run without the step."""
    artifact = context.artifact("verdict")
    if artifact is None:
        return None
    spec, figures = artifact.spec(), artifact.manifest.figures
    assert isinstance(spec, VerdictSpec)
    control = {name.removeprefix(CONTROL): value for name, value in figures.items() if name.startswith(CONTROL)}
    verdicts = artifact.read_table("verdicts.parquet").sort_values(["shown", "score", "feature"], ascending=[False, True, True])
    html = f"<style>{STYLE}</style>{_story(figures)}{_claims(figures, control)}{_cards(context, spec, verdicts.head(SHOWN), control)}"
    return Section("verdicts", "Verdicts", 5, html)


def _story(f: dict[str, Any]) -> str:
    if not f["named"]:
        return '<p class="warn">The run\'s cut selects no feature, so there is none to judge. Select more (<code>diff.cut</code>).</p>'
    shown = number(f["shown_at_least_1"])
    several = number(f["shown_at_least_3"])
    return (
        "<p>All that this run measured of each selected feature, on one card. A claim counts only against its control: the retrain null, or random features "
        "treated alike. The sentences are made by the rules in the table; what was not measured is said, not guessed.</p>"
        + facts(
            [
                (number(f["named"]), "selected features", "a row each in verdicts.parquet"),
                (shown, "with a claim that holds against its control", f"{several} with three or more"),
                (number(f["steers_yes"]), "bring the behaviour when added", f"of {_measured(f, 'steers')} that were"),
                (number(f["removes_yes"]), "take it away when clamped alone", f"of {_measured(f, 'removes')} that were"),
            ]
        )
    )


def _claims(f: dict[str, Any], c: dict[str, Any]) -> str:
    rows = [[CLAIM_NAMES[claim], rule, *(f[f"{claim}_{o.replace(' ', '_')}"] for o in OUTCOMES)] for claim, rule in _rules(c).items()]
    return table(
        ("Claim", "Shown when", "Shown", "Not", "Open", "Not measured"), rows, caption="How many features have which", text_columns=2
    )


def _rules(c: dict[str, Any]) -> dict[str, str]:
    """Claim -> its rule and what its control itself shows."""
    level, chance = f"{c['level']:g}", f"{c['chance']:g}"
    most = "" if c["new_random"] == 0 else f"; {c['new_random_carry']} of {c['new_random']} random ones have half or more"
    label = "" if c["label_random"] is None else f"; {c['label_random_flagged']} of {c['label_random']} random ones are flagged"
    steer = "" if c["steer_random"] is None else f"; {c['steer_random_above']} of {c['steer_random']} random ones are above the others"
    sets = "the smallest random sets"
    if c["ablate_random_size"] is not None:
        sets = f"any of {c['ablate_random_sets']} sets of {c['ablate_random_size']} random features"
    keyword = c["ablate_keyword_name"] or "keyword"
    rules = {
        "moved": f"q of the retrain null at most {level}: farther on both axes than by retraining alone",
        "newer": f"the pair's q of the retrain null at most {level}: newer than what retraining alone makes",
        "carries": f"half of the top examples or more are new rows, and as many in at most a share {chance} of random features{most}",
        "flagged": f"flagged, and as large a share of related examples in at most a share {chance} of random features{label}",
        "steers": f"the 95 % interval of its rate less the random features' lies above 0{steer}",
        "removes": f"clamped alone it leaves fewer answers with the {keyword} than {sets}: Fisher's p at most {c['chance'] / 2:g}",
    }
    return {claim: rules[claim] for claim in CLAIMS}


def _measured(f: dict[str, Any], claim: str) -> str:
    return number(f["named"] - f[f"{claim}_not_measured"])


def _cards(context: ReportContext, spec: VerdictSpec, verdicts: pd.DataFrame, control: dict[str, Any]) -> str:
    from stagediff.diff.spec import DiffSpec
    from stagediff.sae.examples import feature_examples

    if verdicts.empty:
        return ""
    ids = verdicts.feature.to_numpy()
    examples = feature_examples(context.store, spec.statistics["F_D"], [int(i) for i in ids], window=WINDOW, ranks=EXAMPLES)
    diff = context.store.artifact(spec.diff).require().spec()
    assert isinstance(diff, DiffSpec)
    panels = read_panels(context, diff, ids)
    used = np.flatnonzero(np.any([p.shares.any((0, 1)) for p in panels.values()], axis=0))
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(None)
    made = [
        card(row, control, examples[examples.feature == row["feature"]], {s: panels[s].shares[:, i, bins] for s in STAGES})
        for i, row in enumerate(verdicts.to_dict("records"))
    ]
    of = int(context.artifact("verdict").manifest.figures["named"])  # type: ignore[union-attr]
    left = (
        f"<p>The first {len(made)} of {number(of)} are shown, those with most claims shown first; verdicts.parquet holds all.</p>"
        if of > len(made)
        else ""
    )
    return left + "".join(made)
