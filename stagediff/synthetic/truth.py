"""What tracking should find in a planted world, from the world alone: no dictionary is involved.

Kinds are known where one of a feature's rules has at least KNOWN of its strength. An event takes place between the checkpoints between which half of the
change is done; a merge where the two directions' cosine passes TOGETHER. A feature has formed when M(t) reaches half of its final value for good,
with the definition of M that the analysis uses (method.md, section 3), at the feature's planted datapoints: of the world's noiseless vectors, whose noise
enters by its expected share in their norms only. (Without it the faintest newborn would make its places alike, wherever nothing else fires there.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from stagediff.synthetic.roles import ROLES
from stagediff.synthetic.world import Planted
from stagediff.track.spec import FormationRule

__all__ = ["KNOWN", "MERGING", "Event", "Truth", "formed_at", "progress", "truth"]

KNOWN = 0.75
TOGETHER = 0.7
"""Cosine of two directions that are as near to being one as to being apart (45 degrees)."""
MERGING = "merging"
"""The name of a merge among the events; tracking lists merges in a table of their own."""

Block = tuple[np.ndarray, np.ndarray, str, int]
"""A block's token ids and topics, its split and number, as `Planted.amplitudes` takes them."""


@dataclass(frozen=True)
class Event:
    """Something that happens to a feature between `checkpoint` and the next one."""

    feature: int
    pattern: str
    checkpoint: int


@dataclass(frozen=True)
class Truth:
    """G features, T checkpoints."""

    kinds: np.ndarray
    """[T, G] str, of KINDS; dead: not there; "": between two rules, or about to be born or to vanish."""
    home: np.ndarray
    """[G] the last checkpoint at which a feature is wholly there, and apart from the one it merges with: where it is matched to a latent."""
    events: tuple[Event, ...]
    partner: np.ndarray
    """[G] the feature it merges with; -1: none."""
    m: np.ndarray
    """[T, G] expected M(t); NaN where it is not there at the end."""
    formed: np.ndarray
    """[G] checkpoint at which it has formed; NaN: not there at the end, or it never forms."""


def truth(planted: Planted, blocks: Callable[[], Iterator[Block]], formation: FormationRule, seed: int) -> Truth:
    """The truth about all features. `blocks` gives the probe rows, whenever it is called."""
    m = progress(planted, blocks, formation, seed)
    partner = np.array([-1 if f.partner is None else f.partner for f in planted.features])
    return Truth(
        kinds=_kinds(planted),
        home=_home(planted),
        events=_events(planted),
        partner=partner,
        m=m,
        formed=formed_at(m, formation.share, formation.smallest_m),
    )


def _kinds(planted: Planted) -> np.ndarray:
    before, after = planted.strengths
    out = np.full(before.shape, "", dtype="<U8")
    out[before + after == 0] = "dead"
    for f in planted.features:
        for rule, strength in ((f.before, before[:, f.index]), (f.after, after[:, f.index])):
            if rule is not None:
                out[strength >= KNOWN, f.index] = rule.kind
        if f.partner is not None:  # merged, the two are one
            out[_home(planted)[f.index] + 1 :, f.index] = ""
    return out


def _home(planted: Planted) -> np.ndarray:
    total = np.sum(planted.strengths, axis=0)
    there = total == total.max(axis=0)
    for f in planted.features:
        if f.partner is not None:
            assert f.event is not None
            there[:, f.index] &= planted.merged(f.event) == 0
    return len(there) - 1 - there[::-1].argmax(axis=0)


def _events(planted: Planted) -> tuple[Event, ...]:
    events = []
    for f in planted.features:
        pattern = ROLES[f.role].pattern
        if pattern is not None:
            assert f.event is not None
            events.append(Event(f.index, pattern, f.event))
        if f.partner is not None:
            cosine = (planted.directions[:, f.index] * planted.directions[:, f.partner]).sum(1)
            together = cosine >= TOGETHER
            events.append(Event(f.index, MERGING, int(together.argmax()) - 1))
    return tuple(events)


def progress(planted: Planted, blocks: Callable[[], Iterator[Block]], rule: FormationRule, seed: int) -> np.ndarray:
    """Expected M(t) [T, G]: mean cosine over the pairs of a feature's datapoints less that over random positions.

    The noise of two positions is independent, so a pair's expected cosine is x . y / sqrt((|x|^2 + d s^2) (|y|^2 + d s^2)), with noiseless x, y and noise of
    standard deviation s per coordinate (up to its own spread, which is small in d dimensions). Datapoints: the rows in which the feature is
    strongest at the end, and the place in each where it is so.
    """
    before, after = planted.strengths
    final_before, final_after = before[-1].astype(np.float32), after[-1].astype(np.float32)
    largest, place = [], []
    for block in blocks():
        ids = block[0]
        a = planted.amplitudes(*block)
        a_final = (a[0] * final_before + a[1] * final_after).reshape(*ids.shape, len(planted))
        largest.append(a_final.max(axis=1))
        place.append(a_final.argmax(axis=1))
    strongest, where = np.concatenate(largest), np.concatenate(place)  # [rows, G]
    rows, context = len(strongest), planted.world.context
    n = min(rule.datapoints, rows)
    top = np.argsort(-strongest, axis=0, kind="stable")[:n]  # [n, G]
    points = (top * context + np.take_along_axis(where, top, axis=0)).T  # [G, n] flat positions
    at_random = np.random.default_rng(seed).choice(rows * context, min(rule.random, rows * context), replace=False)
    flat, back = np.unique(np.concatenate([points.ravel(), at_random]), return_inverse=True)
    picked = _amplitudes_at(planted, blocks, flat)
    noise = planted.world.d * planted.world.rung.noise**2
    m = np.full((len(before), len(planted)), np.nan)
    exists = np.take_along_axis(strongest, top, axis=0)[-1] > 0
    for t in range(len(before)):
        x = (picked[0] * before[t] + picked[1] * after[t]) @ planted.directions[t]
        unit = x / np.sqrt(np.square(x).sum(axis=1, keepdims=True) + noise)
        baseline = _mean_pair_cosine(unit[back[points.size :]])
        for g in np.flatnonzero(exists):
            m[t, g] = _mean_pair_cosine(unit[back[g * n : (g + 1) * n]]) - baseline
    return m


def formed_at(m: np.ndarray, share: float, smallest: float) -> np.ndarray:
    """[G] first checkpoint from which m [T, G] stays at or above `share` of its final value; NaN where that is unknown or under `smallest`."""
    final = m[-1]
    with np.errstate(invalid="ignore"):
        reached = np.logical_and.accumulate((m >= share * final)[::-1])[::-1]
        return np.where(final >= smallest, reached.argmax(axis=0), np.nan)


def _amplitudes_at(planted: Planted, blocks: Callable[[], Iterator[Block]], flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes [len(flat), G] before and after the events at ascending flat positions (row x context + position)."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    begin = 0
    for block in blocks():
        end = begin + block[0].size
        here = flat[np.searchsorted(flat, begin) : np.searchsorted(flat, end)] - begin
        for into, a in zip(found, planted.amplitudes(*block), strict=True):
            into.append(a[here])
        begin = end
    return np.concatenate(found[0]), np.concatenate(found[1])


def _mean_pair_cosine(unit: np.ndarray) -> float:
    """Mean product over ordered pairs of different rows."""
    n = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (n * (n - 1)))
