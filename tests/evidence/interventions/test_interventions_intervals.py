"""The effect's interval: against a plain bootstrap, and how often it covers the truth."""

import numpy as np

from stagediff.evidence.interventions.intervals import effects, effects_of_random


def test_it_is_the_interval_of_a_plain_cluster_bootstrap():
    rng = np.random.default_rng(0)
    hits, control = (rng.random((2, 30)) < 0.6).astype(int), (rng.random((7, 30)) < 0.2).astype(int)
    effect, low, high = effects(hits, control, 1500, 0)
    assert np.allclose(effect, [h.mean() - control.mean() for h in hits])
    drawn = []
    for _ in range(1500):
        p, r = rng.integers(0, 30, 30), rng.integers(0, 7, 7)
        drawn.append([h[p].mean() - np.mean([control[i][p].mean() for i in r]) for h in hits])
    assert np.allclose([low, high], np.quantile(drawn, [0.025, 0.975], axis=0), atol=0.03)


def test_it_covers_the_true_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(100):
        truth = rng.beta(2, 8, 20)  # rates of random features, mean 0.2
        hits = (rng.random((1, 64)) < 0.5).astype(int)
        control = (rng.random((20, 64)) < truth[:, None]).astype(int)
        _, low, high = effects(hits, control, 300, run)
        covered += bool(low[0] <= 0.3 <= high[0])
    assert 0.88 <= covered / 100 <= 1


def test_random_features_are_judged_against_the_others():
    control = np.zeros((5, 40), int)
    control[2] = 1
    effect, low, _ = effects_of_random(control, 500, 0)
    assert np.allclose(effect, [-0.25, -0.25, 1, -0.25, -0.25])
    assert (low > 0).tolist() == [False, False, True, False, False]
