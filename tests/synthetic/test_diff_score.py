"""Scoring against planted features: scikit-learn's rankings, and rankings small enough to score by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from stagediff.synthetic.diff_score import judge, represented


def test_a_latent_represents_the_nearest_target_if_nothing_else_is_nearer():
    targets, others = np.eye(4)[:2], np.eye(4)[2:3]
    tilted = np.array([0.8, 0.0, 0.6, 0.0])
    latents = np.stack([np.eye(4)[0], tilted, np.array([0.6, 0.0, 0.8, 0.0]), np.array([0.0, 0.7, 0.0, 0.714]), np.eye(4)[2]])
    assert represented(latents, targets, others, 0.75).tolist() == [0, 0, -1, -1, -1]
    assert represented(latents, targets, others, 0.65).tolist() == [0, 0, -1, 1, -1]


def test_rankings_over_candidates_equal_scikit_learns():
    rng = np.random.default_rng(0)
    hits = np.where(rng.random((2, 400)) < 0.05, rng.integers(0, 10, (2, 400)), -1)
    score = rng.normal(size=400) + (hits >= 0).any(0)
    judged = judge(score, hits, np.ones(10, bool))
    is_hit = (hits >= 0).any(0)
    assert judged.auroc == pytest.approx(roc_auc_score(is_hit, score))
    assert judged.average_precision == pytest.approx(average_precision_score(is_hit, score))
    assert (judged.candidates, judged.hits, judged.planted) == (400, is_hit.sum(), 10)


def test_planted_features_count_once_at_the_rank_where_they_are_first_found_and_the_unfound_as_nothing():
    # in order: feature 0, nothing, feature 0 again, feature 1 (by the second latent); feature 2 never
    hits = np.array([[0, -1, 0, -1], [-1, -1, -1, 1]])
    judged = judge(np.array([4.0, 3.0, 2.0, 1.0]), hits, np.ones(3, bool))
    assert judged.feature_precision == pytest.approx((1 / 1 + 3 / 4) / 3)
    assert judged.recall_n == pytest.approx(1 / 3)
    assert judged.recall_2n == pytest.approx(2 / 3)


def test_candidates_of_another_class_alone_take_no_part():
    hits = np.array([[1, 0, -1, 1], [-1, 1, -1, -1]])  # the second is of both
    judged = judge(np.array([4.0, 3.0, 2.0, 1.0]), hits, np.array([True, False]))
    assert (judged.candidates, judged.hits, judged.planted) == (2, 1, 1)
    assert judged.feature_precision == 1.0
    assert judged.average_precision == 1.0


def test_what_has_no_score_is_no_candidate():
    judged = judge(np.array([np.nan, 1.0]), np.array([[0, -1]]), np.ones(1, bool))
    assert (judged.candidates, judged.hits, judged.average_precision, judged.feature_precision) == (1, 0, 0.0, 0.0)
    assert judged.auroc is None


def test_without_candidates_everything_is_unfound():
    judged = judge(np.empty(0), np.empty((1, 0), int), np.ones(4, bool))
    assert (judged.feature_precision, judged.recall_n, judged.average_precision) == (0.0, 0.0, 0.0)
