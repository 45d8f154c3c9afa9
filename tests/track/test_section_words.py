"""The words of SAE-Track's report: that they follow from the numbers."""

import pytest

from stagediff.track.section import words


@pytest.fixture(scope="module")
def made(reported_track):
    return reported_track


def test_the_words_say_what_the_tables_say(made):
    html = words.headline_html(made.run, made.parts)
    last = made.run.kind[:, -1]
    known = int((last < 3).sum())
    assert f"At the end {known} features are alive with a kind: {100 * (last == 0).sum() / known:.3g} % token-level" in html
    formed = made.parts["formed"]
    assert f"{formed['token']['ever']} of {formed['token']['features']} token-level features have formed" in html
    table = made.tables["patterns", "patterns"]
    assert f"{table[table.pattern == 'token_to_concept'].feature.nunique()} went from token to concept" in html
    assert f"and {made.tables['patterns', 'merges'].feature.nunique()} merged with another" in html


@pytest.mark.parametrize(
    ("token", "concept", "said"),
    [(1, 4, "token-level features form first"), (4, 1, "concept-level features form first"), (2, 2, "both form at the same checkpoint")],
)
def test_who_forms_first_follows_from_the_medians(made, token, concept, said):
    parts = {"formed": {n: {"ever": 5, "features": 9, "median": m, "formed": []} for n, m in (("token", token), ("concept", concept))}}
    assert said in words.headline_html(made.run, parts)


@pytest.mark.parametrize(
    ("before", "after", "null", "said"),
    [
        ([0.02, 0.018, 0.022], [0.004, 0.003, 0.005], [0.01, 0.009, 0.011], ("turn less", "less than training alone")),
        ([0.01, 0.009, 0.012], [0.03, 0.02, 0.04], [0.01, 0.009, 0.011], ("turn more", "more than training alone")),
        ([0.01, 0.008, 0.012], [0.011, 0.009, 0.013], [0.011, 0.01, 0.012], ("keep turning as much", "as much as training alone")),
        ([0.02, 0.018, 0.022], [0.004, 0.003, 0.005], [None] * 3, ("turn less", "no null to compare with")),
    ],
)
def test_drift_is_told_beside_the_null(made, before, after, null, said):
    html = words.headline_html(made.run, {"turns": {"all": {"before": before, "after": after, "null": null, "features": 9}}})
    assert all(s in html for s in said)


def test_boundaries_that_all_axes_share_are_counted(made):
    def boundary(at, low, high):
        return {"at": at, "low": low, "high": high}

    same = {"index": [boundary(1, 1, 2), boundary(4, 3, 5)], "step": [boundary(2, 1, 3), boundary(6, 6, 6)]}
    said = words.phase_words(made.run, {"phases": {"boundaries": same, "series": {}}})
    assert "1 of the 2 boundaries lies at the same checkpoint, or within each other's intervals" in said
    apart = {"index": [boundary(1, 1, 1)], "step": [boundary(4, 4, 4)]}
    assert "None of the 1 boundaries lie" in words.phase_words(made.run, {"phases": {"boundaries": apart, "series": {}}})


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ((0.01, 0.0), "at least as much as"),
        ((0.01, -0.03), "up to 0.030 less than"),
        ((-0.02, -0.05), "between 0.020 and 0.050 less than"),
    ],
)
def test_whether_the_following_budget_is_enough_is_told_by_the_gaps(made, gaps, said):
    compared = [{"step": s, "how": "scratch_full", "ev_gap": g} for s, g in enumerate(gaps)]
    text = words.efficiency_words(made.run, {"quality": made.parts["efficiency"]["quality"], "compared": compared})
    assert f"the chain explains {said} a dictionary trained from scratch with the first budget" in text
    assert "200,000 training tokens, 5 % of the first one's 4,000,000" in text


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"index": (0.7, 0.4, 0.5), "step": (0.6, 0.4, 0.5)}, "On every axis the phases explain more"),
        ({"index": (0.7, 0.4, 0.5), "step": (0.45, 0.4, 0.5)}, "On the axis of the checkpoints the phases explain more"),
        ({"index": (0.3, 0.4, 0.2), "step": (0.45, 0.4, 0.5)}, "the cut is no evidence of phases"),
        ({"index": (0.3, 0.4, None)}, "the cut is no evidence of phases"),
    ],
)
def test_phases_are_claimed_only_above_chance_and_trend(made, gains, said):
    named = {axis: dict(zip(("gain", "gain_shuffled", "gain_trend"), values, strict=True)) for axis, values in gains.items()}
    parts = {"phases": {"boundaries": {"index": [{"at": 2, "low": 1, "high": 3}]}, "gains": named, "series": {}, "reason": None}}
    assert said in words.phase_words(made.run, parts)
    assert words.gains_html(parts).count("<tr>") == 1 + len(gains)


def test_a_chain_too_short_for_phases_says_so(made):
    parts = {"phases": {"boundaries": {}, "gains": {}, "series": {}, "reason": "4 checkpoints are too few for 3 phases"}}
    assert "No phases were found: 4 checkpoints are too few" in words.phase_words(made.run, parts)
    assert words.gains_html(parts) == ""


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        ([-0.002, -0.003, -0.001], "that have formed turn less than those that form later (difference −0.0020"),
        ([0.002, 0.001, 0.003], "turn more than"),
        ([0.001, -0.001, 0.003], "turn as much as"),
    ],
)
def test_formed_and_not_yet_formed_features_are_compared_at_the_same_checkpoint(made, mean, said):
    turns = {"all": {"before": [0.02, 0.018, 0.022], "after": [0.004, 0.003, 0.005], "null": [0.01, 0.009, 0.011], "features": 9}}
    assert said in words.headline_html(made.run, {"turns": turns, "same_step": {"mean": mean}})
