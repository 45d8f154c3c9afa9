"""Which features the page holds how much of.

Everything about every feature would be hundreds of megabytes at F = 65,536 and 30 checkpoints, so there are four circles, each within the one before:

- every feature: kind and token at the end, formation with interval, density, norm, final M, drift, the patterns it went through;
- `curves`: kind, pattern, token, M, cosines and density at every checkpoint (all features up to 2.2 million cells);
- `full`: M by all measures and sets, norm, trajectory (all features up to 400,000 cells);
- `examples`: top examples and datapoints with their texts.

Where a circle does not hold every feature, it holds those that stand out (see `outstanding`) and a random sample of alive ones.
"""

from dataclasses import dataclass

import numpy as np

from stagediff.track.section.run import TrackRun
from stagediff.track.spec import KINDS, PATTERNS

__all__ = ["CURVE_CELLS", "EXAMPLE_FEATURES", "FULL_CELLS", "Choice", "choose", "drifts", "occurred", "outstanding"]

CURVE_CELLS = 2_200_000
FULL_CELLS = 400_000
EXAMPLE_FEATURES = 3000
RARE = ("token_to_concept", "concept_to_token", "token_to_token", "vanishing")


@dataclass(frozen=True)
class Choice:
    """Feature numbers, ascending but for the first."""

    outstanding: np.ndarray
    """Most telling first."""
    random: np.ndarray
    curves: np.ndarray
    full: np.ndarray
    examples: np.ndarray


def choose(run: TrackRun, examples: int, seed: int) -> Choice:
    """`examples`: how many outstanding and how many random features carry texts at least (all alive ones where they are few)."""
    T = max(len(run.steps), 1)
    stand_out = outstanding(run, examples)
    ever = np.flatnonzero(run.alive.any(1)) if run.features else np.zeros(0, np.int64)
    shuffled = np.random.default_rng(seed).permutation(ever)
    random = shuffled[:examples]
    first = list(dict.fromkeys([*stand_out.tolist(), *shuffled.tolist()]))

    def up_to(count: int) -> np.ndarray:
        return np.arange(run.features) if count >= run.features else np.sort(np.array(first[:count], np.int64))

    texts = first if len(ever) <= EXAMPLE_FEATURES else [*stand_out.tolist(), *random.tolist()]
    texts = list(dict.fromkeys(texts))[:EXAMPLE_FEATURES]
    return Choice(stand_out, np.sort(random), up_to(CURVE_CELLS // T), up_to(FULL_CELLS // T), np.sort(np.array(texts, np.int64)))


def outstanding(run: TrackRun, count: int) -> np.ndarray:
    """At most `count` features worth a look, most telling first, shared out evenly between the reasons: shown in the UMAP; of each kind at the end the
    largest final M; rare patterns; the largest drift after formation.
    """
    lists = [_shown_in_umap(run)]
    m = run.main_progress
    last = m[:, -1] if m is not None else np.zeros(run.features)
    if run.kind is not None:
        lists += [_largest(np.where(run.kind[:, -1] == code, last, np.nan), count) for code in range(KINDS.index("dead"))]
    elif m is not None:
        lists.append(_largest(last, count))
    if run.pattern is not None:
        rare = [_largest(np.where((run.pattern == PATTERNS.index(name)).any(1), last, np.nan), count) for name in RARE]
        lists += rare
    after = run.per_feature("drift", "before_after", "drift_after")
    if after is not None:
        lists.append(_largest(after, count))
    found: dict[int, None] = dict.fromkeys(lists[0].tolist())
    for rank in range(count):
        for each in lists[1:]:
            if rank < len(each) and len(found) < count:
                found.setdefault(int(each[rank]))
    return np.array(list(found), np.int64)[: max(count, len(lists[0]))]


def drifts(run: TrackRun) -> np.ndarray | None:
    """[F] mean of 1 - cos_previous over the checkpoints where the feature is alive, there and before; NaN where it never is."""
    cos = run.cos_previous
    if cos is None:
        return None
    both = run.alive.copy()
    both[:, 1:] &= run.alive[:, :-1]
    turned = np.where(both & np.isfinite(cos), 1.0 - cos, 0.0)
    seen = (both & np.isfinite(cos)).sum(1)
    return np.where(seen > 0, turned.sum(1) / np.maximum(seen, 1), np.nan)


def occurred(run: TrackRun) -> np.ndarray | None:
    """[F] uint8, a bit for every pattern that the feature went through."""
    if run.pattern is None:
        return None
    bits = np.zeros(run.features, np.uint8)
    for code in range(len(PATTERNS)):
        bits |= (run.pattern == code).any(1).astype(np.uint8) << np.uint8(code)
    return bits


def _shown_in_umap(run: TrackRun) -> np.ndarray:
    table = run.table("umap", "features", ["feature"])
    return np.zeros(0, np.int64) if table is None else table["feature"].to_numpy(np.int64)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Features by value, descending; ties by number; without those that have none."""
    known = np.flatnonzero(np.isfinite(values))
    return known[np.lexsort((known, -values[known]))][:count]
