"""The truth about a world: against loops in float64 that follow the definitions word by word."""

import itertools

import numpy as np
import pytest

from stagediff.synthetic.roles import ROLES
from stagediff.synthetic.spec import world
from stagediff.synthetic.truth import MERGING, formed_at, progress, truth
from stagediff.synthetic.world import Planted
from stagediff.track.spec import FormationRule

RULE = FormationRule(datapoints=6, random=12)


@pytest.fixture(scope="module")
def blocks(planted):
    made = [(*(part[:100] for part in planted.rows("heldout", b)), "heldout", b) for b in (0, 1)]
    return lambda: iter(made)


@pytest.fixture(scope="module")
def true(planted, blocks):
    return truth(planted, blocks, RULE, seed=5)


def mean_cosine(rows, noise: float) -> float:
    pairs = [a @ b / np.sqrt((a @ a + noise) * (b @ b + noise)) for a, b in itertools.combinations(rows, 2)]
    return float(np.mean(pairs))


def datapoints(planted, blocks, g: int, n: int) -> list[int]:
    """Flat positions of the rows where a feature is strongest at the end, by a loop over rows."""
    before, after = (w[-1, g] for w in planted.strengths)
    by_row = []
    for b in blocks():
        first, second = (a[:, g].reshape(b[0].shape) for a in planted.amplitudes(*b))
        by_row += list(before * first + after * second)
    ranked = sorted(range(len(by_row)), key=lambda r: -by_row[r].max())
    return [r * planted.world.context + int(by_row[r].argmax()) for r in ranked[:n]]


@pytest.mark.parametrize("g", [0, 8, 16, 24, 29])
def test_progress_is_the_definition_in_float64_loops(planted, blocks, true, g):
    at_random = np.random.default_rng(5).choice(200 * planted.world.context, 12, replace=False)
    points, noise = datapoints(planted, blocks, g, 6), 16 * 0.05**2
    for t in (0, 6, 11):
        x = np.concatenate([planted.activations(*b, t, noise=False) for b in blocks()]).astype(float) / planted.growth(t)
        expected = mean_cosine(x[points], noise) - mean_cosine(x[at_random], noise)
        assert true.m[t, g] == pytest.approx(expected, abs=1e-5)


def test_expected_progress_is_what_noisy_activations_give():
    planted = Planted(world("middle", 3))
    made = [(*planted.rows("heldout", b), "heldout", b) for b in range(2)]
    m = progress(planted, lambda: iter(made), FormationRule(), seed=1)
    for t in (0, 12, 23):
        x = np.concatenate([planted.activations(*b, t) for b in made]).astype(float)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        baseline = mean_cosine(x[np.random.default_rng(1).choice(len(x), 100, replace=False)], 0.0)
        for g in (0, 20, 50, 75, 88):
            rows = x[datapoints(planted, lambda: iter(made), g, 25)]
            assert m[t, g] == pytest.approx(mean_cosine(rows, 0.0) - baseline, abs=0.05)


def test_formation_is_the_first_checkpoint_from_which_m_stays_high():
    m = np.array(
        [[0.0, 0.3, 0.4, np.nan, 0.01], [0.2, 0.1, 0.4, np.nan, 0.02], [0.1, 0.2, 0.4, np.nan, 0.03], [0.3, 0.4, 0.4, np.nan, 0.04]]
    )
    np.testing.assert_array_equal(formed_at(m, 0.5, 0.05), [3, 2, 0, np.nan, np.nan])


def test_newborns_form_when_they_are_born_and_what_was_always_there_at_once(planted, true):
    for f in planted.features:
        if f.role in ("stays token", "stays concept", "stays noise", "moves token"):
            assert true.formed[f.index] == 0
        if f.role.startswith("born") and np.isfinite(true.formed[f.index]):
            assert abs(true.formed[f.index] - (f.event + 1)) <= 1
        if f.role.startswith("vanishes"):
            assert np.isnan(true.formed[f.index])


def test_kinds_are_known_where_one_rule_dominates(planted, true):
    for f in planted.features:
        role, seen = ROLES[f.role], true.kinds[:, f.index]
        if f.event is None:
            assert (seen == role.before).all()
        elif not role.merges:
            assert seen[f.event - 2] == (role.before or "dead")
            assert seen[f.event + 3] == (role.after or "dead")
            assert set(seen) <= {role.before or "dead", role.after or "dead", ""}


def test_a_feature_is_at_home_where_it_is_whole_and_apart(planted, true):
    for f in planted.features:
        if f.role.startswith("vanishes"):
            assert f.event - 2 <= true.home[f.index] < f.event
        elif f.partner is not None:
            assert planted.merged(f.event)[true.home[f.index]] == 0
            assert planted.merged(f.event)[true.home[f.index] + 1] > 0
        else:
            assert true.home[f.index] == planted.world.checkpoints - 1


def test_events_are_named_and_timed_as_planted(planted, true):
    found = {e.feature: e for e in true.events}
    for f in planted.features:
        role = ROLES[f.role]
        if role.merges:
            cosine = (planted.directions[:, f.index] * planted.directions[:, f.partner]).sum(1)
            at = found[f.index].checkpoint
            assert found[f.index].pattern == MERGING
            assert cosine[at] < 0.7 <= cosine[at + 1]
        elif role.pattern:
            assert (found[f.index].pattern, found[f.index].checkpoint) == (role.pattern, f.event)
        else:
            assert f.index not in found
