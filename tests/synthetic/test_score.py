"""Scores on answers made by hand: the perfect one, shuffled ones, and one fault at a time."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linear_sum_assignment

from stagediff.synthetic.score import Answer, figures, match, score
from stagediff.synthetic.spec import Measures
from stagediff.synthetic.truth import MERGING, Event, Truth

T = 12
KINDS = {"token": ["token"] * T, "concept": ["concept"] * T, "noise": ["noise"] * T}


def world_of(kinds: list[list[str]], events: list[Event], partner: list[int] | None = None) -> Truth:
    table = np.array(kinds).T
    n = table.shape[1]
    formed = np.array([next((t for t in range(T) if column[t] not in ("dead", "")), 0) for column in kinds], float)
    formed[[k[-1] == "dead" for k in kinds]] = np.nan
    home = np.array([max(t for t in range(T) if k[t] not in ("dead", "")) for k in kinds])
    return Truth(table, home, tuple(events), np.array(partner or [-1] * n), np.zeros((T, n)), formed)


@pytest.fixture
def true() -> Truth:
    """Forty features: stable ones of each kind, births, vanishings, shifts, groupings."""
    kinds, events = [], []
    for i in range(40):
        at = 3 + i % 5
        before, after, pattern = [
            ("token", "token", None),
            ("concept", "concept", None),
            ("noise", "noise", None),
            ("dead", "token", "appearing"),
            ("concept", "dead", "vanishing"),
            ("token", "concept", "token_to_concept"),
            ("noise", "concept", "grouping"),
            ("token", "token", "token_to_token"),
        ][i % 8]
        kinds.append([before] * (at + 1) + [after] * (T - at - 1))
        if pattern:
            events.append(Event(i, pattern, at))
    return world_of(kinds, events)


def perfect(true: Truth) -> Answer:
    """An answer in which latent i is planted feature i."""
    events = [
        {"latent": e.feature, "checkpoint": e.checkpoint, "pattern": e.pattern, "partner": int(true.partner[e.feature])}
        for e in true.events
    ]
    return Answer(true.kinds.copy(), true.formed.copy(), pd.DataFrame(events, columns=["latent", "checkpoint", "pattern", "partner"]))


def scored(true: Truth, answer: Answer, latent=None) -> pd.DataFrame:
    n = true.kinds.shape[1]
    return score(true, answer, np.arange(n) if latent is None else latent, [np.array([i]) for i in range(n)], Measures())


def test_the_perfect_answer_scores_one(true):
    found = figures(scored(true, perfect(true)))
    for name in (
        "matched",
        "kinds",
        "kind_cells",
        "formation",
        "formation_late",
        "patterns",
        "patterns_changing",
        "patterns_still",
        "events_found",
    ):
        assert found[name] == 1, name
    assert found["false_events"] == found["false_merges"] == found["formation_error"] == 0


def test_shuffled_latents_score_near_chance(true):
    rng = np.random.default_rng(0)
    got = pd.DataFrame([figures(scored(true, perfect(true), rng.permutation(40))) for _ in range(12)]).mean()
    assert got.kind_cells < 0.5
    assert got.patterns_changing < 0.1
    assert got.formation_late < 0.5
    # 15 of 40 are still, and 15 of 40 answers are those of still features; the other right ones are chance hits
    assert got.patterns == pytest.approx((15 / 40) ** 2, abs=0.06)


def test_what_has_no_latent_counts_as_wrong(true):
    latent = np.where(np.arange(40) < 20, np.arange(40), -1)
    found = figures(scored(true, perfect(true), latent))
    assert found["matched"] == found["kinds"] == found["patterns"] == 0.5
    assert found["formation"] < 0.6


@pytest.mark.parametrize(("late", "right"), [(0, True), (1, True), (-1, True), (2, False), (-2, False)])
def test_times_may_be_off_by_one(true, late, right):
    answer = perfect(true)
    answer.events["checkpoint"] += late
    answer.formed[:] += late
    table = scored(true, answer)
    changing = table[table.planted_event.notna()]
    assert (changing.patterns_right == right).all()
    assert (changing.event_timed == right).all()
    assert (table.formed_right.dropna() == right).all()


def test_a_false_event_makes_a_feature_wrong(true):
    answer = perfect(true)
    extra = pd.DataFrame([{"latent": 0, "checkpoint": 5, "pattern": "losing", "partner": -1}])
    table = scored(true, Answer(answer.kinds, answer.formed, pd.concat([answer.events, extra])))
    assert not table.patterns_right[0]
    assert table.false_events[0] == 1
    assert table.patterns_right[1:].all()


def test_a_second_event_of_the_planted_name_is_a_false_one(true):
    answer = perfect(true)
    grouping = next(e for e in true.events if e.pattern == "grouping")
    extra = pd.DataFrame([{"latent": grouping.feature, "checkpoint": grouping.checkpoint + 1, "pattern": "grouping", "partner": -1}])
    table = scored(true, Answer(answer.kinds, answer.formed, pd.concat([answer.events, extra])))
    assert table.event_found[grouping.feature]
    assert table.false_events[grouping.feature] == 1


def test_an_event_of_another_name_in_time_is_timed_but_not_found(true):
    answer = perfect(true)
    answer.events.loc[answer.events.pattern == "appearing", "pattern"] = "grouping"
    table = scored(true, answer)
    born = table[table.planted_event == "appearing"]
    assert born.event_timed.all()
    assert not born.event_found.any()
    assert not born.patterns_right.any()


def test_what_the_index_was_before_birth_and_after_the_end_does_not_count():
    kinds = [["dead"] * 6 + ["token"] * 6, ["concept"] * 6 + ["dead"] * 6]
    true = world_of(kinds, [Event(0, "appearing", 5), Event(1, "vanishing", 5)])
    answer = perfect(true)
    outside = [(0, 2, "losing"), (0, 4, "vanishing"), (1, 7, "appearing"), (1, 9, "grouping")]
    more = pd.DataFrame([{"latent": i, "checkpoint": c, "pattern": p, "partner": -1} for i, c, p in outside])
    assert scored(true, Answer(answer.kinds, answer.formed, pd.concat([answer.events, more]))).patterns_right.all()
    inside = pd.DataFrame([{"latent": 0, "checkpoint": 8, "pattern": "losing", "partner": -1}])
    assert scored(true, Answer(answer.kinds, answer.formed, pd.concat([answer.events, inside]))).patterns_right.tolist() == [False, True]


def test_a_merge_has_to_be_with_a_latent_of_the_partner():
    true = world_of([["concept"] * T] * 3, [Event(0, MERGING, 6), Event(1, MERGING, 6)], [1, 0, -1])
    answer = perfect(true)
    assert scored(true, answer).patterns_right.all()
    answer.events["partner"] = 2
    table = scored(true, answer)
    assert table.patterns_right.tolist() == [False, False, True]
    assert table.event_timed.tolist() == [True, True, False]
    assert table.false_merges.tolist() == [1, 1, 0]


def test_one_wrong_kind_in_ten_is_allowed_and_two_are_not():
    true = world_of([["token"] * T, ["token"] * T], [])
    answer = perfect(true)
    answer.kinds[3, 0] = "noise"
    answer.kinds[3:5, 1] = "noise"
    table = scored(true, answer)
    assert table.kind_right.tolist() == [True, False]
    assert table.kind_share.tolist() == pytest.approx([11 / 12, 10 / 12])


def test_checkpoints_without_a_known_kind_do_not_count():
    true = world_of([["dead"] * 4 + [""] * 4 + ["token"] * 4], [])
    answer = perfect(true)
    answer.kinds[:8, 0] = "concept"
    table = scored(true, answer)
    assert table.checkpoints[0] == 4
    assert table.kind_right[0]


def test_matching_is_one_to_one_and_near_the_best_assignment():
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((30, 24))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = directions[rng.permutation(30)] + 0.19 * rng.standard_normal((30, 24))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = directions @ rows.T
    latent, best = match([cosine], np.zeros(30, int), 0.7)
    g, i = linear_sum_assignment(-cosine)
    good = cosine[g, i] >= 0.7
    np.testing.assert_array_equal(latent[g[good]], i[good])
    np.testing.assert_allclose(best[g[good]], cosine[g, i][good])
    assert (latent[g[~good]] == -1).all()
    assert 15 < good.sum() < 30


def test_a_latent_serves_one_feature_at_a_time_but_may_serve_others_at_other_homes():
    near, far = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.0]]), np.zeros((3, 2))
    latent, best = match([near, near + far], np.array([0, 0, 1]), 0.7)
    assert latent.tolist() == [0, -1, 0]
    assert best.tolist() == pytest.approx([0.9, 0.8, 0.95])
