"""What the labels say together: flagged shares of each group with exact intervals, whether the selected have more, and the labeller against the truth."""

from typing import Any

import pandas as pd

from stagediff.diff.ranking import fisher_greater
from stagediff.evidence.labels.choice import GROUPS
from stagediff.evidence.labels.intervals import clopper_pearson

__all__ = ["CONFUSION_COLUMNS", "confusion", "figures"]

CONFUSION_COLUMNS = {
    "group": ("name", "all, selected, born or random; a feature may be in several"),
    "true_positives": ("features", "flagged, and carries the new data"),
    "false_negatives": ("features", "carries the new data and is not flagged"),
    "false_positives": ("features", "flagged and does not carry the new data"),
    "true_negatives": ("features", "neither flagged nor carrying the new data"),
    "unclear": ("features", "with no clear answer; in none of the other columns"),
}


def figures(labels: pd.DataFrame) -> dict[str, Any]:
    """For the manifest: per group its size, flagged features, share and 95 % interval (over the clear answers), and Fisher's p.

    Fisher's exact test, one-sided: that the selected have no higher rate than the random ones. Random features that are selected too count as selected
    alone there, so that the two groups are disjoint.
    """
    said: dict[str, Any] = {"features": len(labels), "unclear": int(labels.unclear.sum())}
    clear = labels[~labels.unclear]
    for group in GROUPS:
        members = clear[clear[group]]
        size, hits = len(members), int(members.flagged.sum())
        low, high = clopper_pearson(hits, size) if size else (None, None)
        said |= {group: size, f"{group}_flagged": hits, f"{group}_share": hits / size if size else None}
        said |= {f"{group}_low": low, f"{group}_high": high}
    selected, others = clear[clear.selected], clear[clear.random & ~clear.selected]
    said["random_not_selected"] = len(others)
    said["fisher_p"] = fisher_greater(int(selected.flagged.sum()), len(selected), int(others.flagged.sum()), len(others))
    table = confusion(labels).set_index("group").loc["all"]
    missed, false = int(table["false_negatives"]), int(table["false_positives"])
    carry, rest = int(table["true_positives"]) + missed, int(table["true_negatives"]) + false
    said |= {"carry_new_data": carry, "false_negatives": missed, "false_positives": false}
    said |= {"false_negative_rate": missed / carry if carry else None, "false_positive_rate": false / rest if rest else None}
    return said


def confusion(labels: pd.DataFrame) -> pd.DataFrame:
    """Labels against the truth (column `carries`: at least half of the feature's top examples are new rows), one row per group."""
    rows = []
    for group in ("all", *GROUPS):
        members = labels if group == "all" else labels[labels[group]]
        clear = members[~members.unclear]
        flagged, carries = clear.flagged.to_numpy(bool), clear.carries.to_numpy(bool)
        counts = (flagged & carries, ~flagged & carries, flagged & ~carries, ~flagged & ~carries)
        rows.append([group, *(int(c.sum()) for c in counts), len(members) - len(clear)])
    return pd.DataFrame(rows, columns=list(CONFUSION_COLUMNS))
