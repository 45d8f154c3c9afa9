"""Scores what tracking found against what was planted.

A planted feature is matched to a latent by decoder cosine at its home checkpoint (`truth`), one to one; what is matched to none counts as wrong throughout.
Index i is one feature along a chain, so everything else is read off that latent:

kind       the share of the checkpoints with a known kind at which the latent has it; right at `kind_share` of them
formation  formed_step of the latent (top datapoints, cosine of activations) is within `slack` checkpoints of the truth
patterns   the planted event is found under its name within `slack` checkpoints, and nothing else is found in the feature's life. Life begins with its birth and
           ends with its vanishing or merging: what the index stood for before and stands for afterwards is another matter
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stagediff.synthetic.spec import Measures
from stagediff.synthetic.truth import MERGING, Truth

__all__ = ["BEGINS", "COLUMNS", "ENDS", "Answer", "figures", "match", "score"]

BEGINS, ENDS = ("appearing",), ("vanishing", MERGING)
"""Events with which a feature's life begins and ends."""


@dataclass(frozen=True)
class Answer:
    """What tracking found, by latent (F) and checkpoint (T)."""

    kinds: np.ndarray
    """[T, F] str; "": none given."""
    formed: np.ndarray
    """[F] checkpoint; NaN: never."""
    events: pd.DataFrame
    """latent, checkpoint (the earlier of the two), pattern: all but what was maintained, and of merges also partner (else -1)."""


def match(cosines: list[np.ndarray], home: np.ndarray, smallest: float) -> tuple[np.ndarray, np.ndarray]:
    """Latent of every planted feature [G] (-1: none), and its cosine (of the unmatched: the best there is).

    Parameters: cosines: for every checkpoint [G, F], planted directions with decoder rows, -1 for dead latents. Greedy: the nearest pair first,
    one to one among features of one home, down to `smallest`.
    """
    latent, best = np.full(len(home), -1), np.full(len(home), np.nan)
    for t in np.unique(home):
        features = np.flatnonzero(home == t)
        left = cosines[t][features].copy()
        best[features] = left.max(axis=1)
        for _ in features:
            g, i = np.unravel_index(left.argmax(), left.shape)
            if left[g, i] < smallest:
                break
            latent[features[g]], best[features[g]] = i, left[g, i]
            left[g], left[:, i] = -np.inf, -np.inf
    return latent, best


def score(truth: Truth, answer: Answer, latent: np.ndarray, kin: list[np.ndarray], measures: Measures) -> pd.DataFrame:
    """One row per planted feature (COLUMNS).

    Parameters: latent: `match`'s. kin: for every planted feature all latents in its direction at its home (a dictionary may spend several on one).
    """
    rows = []
    planted = {e.feature: e for e in truth.events}
    by_latent = {i: of.sort_values("checkpoint").to_dict("records") for i, of in answer.events.groupby("latent")}
    for g, i in enumerate(latent):
        event = planted.get(g)
        row: dict[str, Any] = {
            "feature": g,
            "latent": int(i),
            "planted_event": event and event.pattern,
            "planted_at": event and event.checkpoint,
        }
        truly = truth.kinds[:, g]
        known = ~np.isin(truly, ["", "dead"])
        right = float((answer.kinds[known, i] == truly[known]).mean()) if i >= 0 else 0.0
        row |= {"checkpoints": int(known.sum()), "kind_share": right, "kind_right": right >= measures.kind_share}
        found_at = answer.formed[i] if i >= 0 else np.nan
        error = found_at - truth.formed[g]
        has_formed = bool(np.isfinite(truth.formed[g]))
        row |= {"formed": truth.formed[g], "formed_found": found_at, "formed_error": error}
        row["formed_right"] = bool(abs(error) <= measures.slack) if has_formed else None
        partners = kin[truth.partner[g]] if truth.partner[g] >= 0 else np.empty(0, int)
        row |= _patterns(event, by_latent.get(i, []), partners, measures.slack) if i >= 0 else _NOTHING
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({"formed_right": "boolean", "planted_at": "Int64", "found_at": "Int64"})


_NOTHING = {"event_found": False, "event_timed": False, "found_at": None, "false_events": 0, "false_merges": 0, "patterns_right": False}


def _patterns(event: Any, found: list[dict[str, Any]], partners: np.ndarray, slack: int) -> dict[str, Any]:
    """Compares one latent's events, in order of time, with the planted one (or None)."""
    near = [e for e in found if event is not None and abs(e["checkpoint"] - event.checkpoint) <= slack]
    named = [e for e in near if e["pattern"] == event.pattern and (event.pattern != MERGING or e["partner"] in partners)]
    hit = min(named, key=lambda e: abs(e["checkpoint"] - event.checkpoint), default=None)
    begin, end = -1, np.inf
    if event is not None:
        at = hit["checkpoint"] if hit else event.checkpoint
        begin = at if event.pattern in BEGINS else begin
        end = at if event.pattern in ENDS else end
    lived = [e for e in found if begin <= e["checkpoint"] <= end and e is not hit]
    merges = sum(e["pattern"] == MERGING for e in lived)
    false = len(lived) - merges
    return {
        "event_found": event is not None and hit is not None,
        "event_timed": bool(near),
        "found_at": hit and hit["checkpoint"],
        "false_events": false,
        "false_merges": merges,
        "patterns_right": (event is None or hit is not None) and not false,
    }


def figures(table: pd.DataFrame) -> dict[str, Any]:
    """The key figures of `score`'s table: shares of planted features, the unmatched counted as wrong."""
    changing = table[table.planted_event.notna()]
    formed = table[table.formed.notna()]
    late = formed[formed.formed > 0]

    def share(values: pd.Series) -> float | None:
        return float(values.astype(float).mean()) if len(values) else None

    return {
        "features": len(table),
        "matched": share(table.latent >= 0),
        "kinds": share(table.kind_right),
        "kind_cells": float(np.average(table.kind_share, weights=table.checkpoints)),
        "formation": share(formed.formed_right),
        "formation_late": share(late.formed_right),
        "formation_late_features": len(late),
        "formation_error": float(late.formed_error.abs().median()) if late.formed_error.notna().any() else None,
        "patterns": share(table.patterns_right),
        "patterns_changing": share(changing.patterns_right),
        "patterns_still": share(table[table.planted_event.isna()].patterns_right),
        "events_found": share(changing.event_found),
        "events_timed": share(changing.event_timed),
        "false_events": share(table.false_events > 0),
        "false_merges": share(table.false_merges > 0),
    }


COLUMNS = {
    "feature": ("index", "planted feature"),
    "latent": ("index", "feature of the chain that it is matched to at its home checkpoint; -1: none"),
    "planted_event": ("name", "what happens to it (empty: nothing)"),
    "planted_at": ("checkpoint", "the one before the event"),
    "checkpoints": ("checkpoints", "at which its kind is known"),
    "kind_share": ("share", "of these at which the latent has that kind"),
    "kind_right": ("flag", "whether that is enough"),
    "formed": ("checkpoint", "at which it has formed, by the world's own vectors (empty: not there at the end)"),
    "formed_found": ("checkpoint", "at which the latent has formed (empty: never)"),
    "formed_error": ("checkpoints", "found less planted"),
    "formed_right": ("flag", "whether that is within the slack (empty: no truth)"),
    "event_found": ("flag", "whether its event was found under its name, in time"),
    "event_timed": ("flag", "whether any event was found in time"),
    "found_at": ("checkpoint", "the one before the event, as found"),
    "false_events": ("events", "other patterns found in its life"),
    "false_merges": ("events", "merges found in its life that were not planted"),
    "patterns_right": ("flag", "event found, where there is one, and no false ones"),
}
