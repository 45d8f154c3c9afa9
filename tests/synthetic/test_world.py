"""The planted world does what it says: checked on what comes out, by means that do not use the world's own algebra."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from stagediff.synthetic.roles import ROLES, SHARES
from stagediff.synthetic.spec import LADDER, TrackWorld, world
from stagediff.synthetic.world import MERGED_ANGLE, Planted, ramp


@pytest.fixture(scope="module")
def block(planted):
    """(ids, topics, split, number) of a block."""
    return (*planted.rows("train", 1), "train", 1)


def fires(rule, token, topics) -> bool:
    """Whether a token or concept rule may fire at a token."""
    return token in rule.words and (rule.topic is None or rule.topic in topics)


def angle(a, b) -> float:
    return math.degrees(math.acos(min(1.0, float(a @ b))))


def test_every_role_has_its_share_and_merges_come_in_pairs():
    planted = Planted(world("middle", 7))
    roles = [f.role for f in planted.features]
    assert len(roles) == 96
    assert set(roles) == set(ROLES)
    for role, share in SHARES.items():
        assert abs(roles.count(role) - 96 * share) <= 1
    pairs = [(f.index, f.partner) for f in planted.features if f.role == "merges"]
    assert pairs
    assert all(planted.features[b].partner == a and planted.features[b].before.topic == planted.features[a].before.topic for a, b in pairs)
    assert all(not set(planted.features[a].before.words) & set(planted.features[b].before.words) for a, b in pairs)


@pytest.mark.parametrize("checkpoint", [0, 5, 11])
def test_least_squares_finds_the_stated_directions_in_the_activations(planted, block, checkpoint):
    x = planted.activations(*block, checkpoint).astype(float)
    before, after = (a.astype(float) for a in planted.amplitudes(*block))
    w_before, w_after = (w[checkpoint] for w in planted.strengths)
    a = before * w_before + after * w_after
    active = np.flatnonzero((a > 0).sum(0) >= 30)
    assert len(active) > 15
    found = np.linalg.lstsq(a[:, active], x, rcond=None)[0] / planted.growth(checkpoint)
    cosine = (found * planted.directions[checkpoint, active]).sum(1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.98
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=0.1)


def test_what_the_features_do_not_explain_is_noise_of_the_stated_size(planted, block):
    for checkpoint in (0, 11):
        rest = planted.activations(*block, checkpoint) - planted.activations(*block, checkpoint, noise=False)
        assert rest.std() / planted.growth(checkpoint) == pytest.approx(0.05, rel=0.02)
        assert abs(rest.mean()) < 0.01
    assert planted.growth(11) == pytest.approx(4 * planted.growth(0))


def test_features_fire_where_their_rule_says_and_nowhere_else(planted, block):
    ids, topics = block[:2]
    amplitudes = dict(zip(("before", "after"), planted.amplitudes(*block), strict=True))
    for f in planted.features:
        for when, a in amplitudes.items():
            rule, fired = getattr(f, when), a[:, f.index].reshape(ids.shape) > 0
            if rule is None:
                assert not fired.any()
            elif rule.kind == "noise":
                assert fired.mean() == pytest.approx(rule.density, rel=0.35)
            else:
                expected = [
                    [fires(rule, t, c) for t, c in zip(*row, strict=True)] for row in zip(ids.tolist(), topics.tolist(), strict=True)
                ]
                np.testing.assert_array_equal(fired, expected)


def test_amplitudes_spread_evenly_around_the_features_own(planted, block):
    before = planted.amplitudes(*block)[0]
    f = next(f for f in planted.features if f.role == "stays concept")
    a = before[:, f.index][before[:, f.index] > 0] / f.amplitude
    assert a.mean() == pytest.approx(1.0, abs=0.05)
    assert a.min() >= 0.7 - 1e-6
    assert a.max() <= 1.3 + 1e-6


def test_rows_follow_their_topics(planted):
    ids, topics = planted.rows("heldout", 0)
    assert topics.shape == (*ids.shape, 2)
    assert (topics[..., 0] % 2 == 0).all()
    assert (topics[..., 1] % 2 == 1).all()
    assert (topics[:, :8, 0] == topics[:, :1, 0]).all()  # one segment
    for topic in range(4):
        here = (topics == topic).any(2)
        own = np.isin(ids, planted.topic_words[topic])
        assert own[here].mean() > 1.5 * own[~here].mean()


def test_splits_and_blocks_differ_and_asking_again_changes_nothing(tiny_world, planted):
    again = Planted(tiny_world)
    for split, block in (("train", 0), ("train", 1), ("heldout", 0)):
        np.testing.assert_array_equal(planted.rows(split, block)[0], again.rows(split, block)[0])
    assert not np.array_equal(planted.rows("train", 0)[0], planted.rows("train", 1)[0])
    assert not np.array_equal(planted.rows("train", 0)[0], planted.rows("heldout", 0)[0])
    where = (*planted.rows("train", 0), "train", 0)
    np.testing.assert_array_equal(planted.activations(*where, 4), again.activations(*where, 4))


def test_the_first_rows_of_a_block_are_the_same_whether_or_not_the_rest_is_asked_for(planted, block):
    ids, topics, *rest = block
    few = planted.activations(ids[:10], topics[:10], *rest, 3, noise=False)
    np.testing.assert_allclose(few, planted.activations(*block, 3, noise=False)[: 10 * ids.shape[1]], atol=1e-6)


def test_only_what_an_event_concerns_changes_its_strength(planted):
    before, after = planted.strengths
    for f in planted.features:
        role, total = ROLES[f.role], before[:, f.index] + after[:, f.index]
        if f.event is None or role.merges:
            assert (total == 1).all()
            continue
        turned = total if role.before is None else 1 - total if role.after is None else after[:, f.index]
        assert turned[f.event] < 0.5 < turned[f.event + 1]
        assert turned[f.event - 2] == 0
        assert turned[f.event + 3] == 1
    assert before[0, 0] == 1


def test_a_ramp_is_linear_and_half_way_between_two_checkpoints():
    np.testing.assert_allclose(ramp(np.arange(4), 1, 1), [0, 0, 1, 1])
    np.testing.assert_allclose(ramp(np.arange(6), 2, 4), [0, 0.125, 0.375, 0.625, 0.875, 1])


def test_moving_features_turn_at_the_stated_rate_and_the_others_only_wander():
    planted = Planted(world("middle", 1))
    d = planted.directions
    np.testing.assert_allclose(np.linalg.norm(d, axis=2), 1)
    for f in planted.features:
        turned = angle(d[0, f.index], d[10, f.index])
        if ROLES[f.role].moves:
            assert turned == pytest.approx(40, abs=6)
        elif not ROLES[f.role].merges:
            assert 1 < turned < 7  # ten steps of a degree, each another way


def test_merging_directions_end_at_the_stated_angle_and_start_apart():
    planted = Planted(world("hard", 2))
    for f in planted.features:
        if f.partner is not None:
            assert angle(planted.directions[-1, f.index], planted.directions[-1, f.partner]) == pytest.approx(MERGED_ANGLE, abs=1e-6)
            assert angle(planted.directions[0, f.index], planted.directions[0, f.partner]) > 60


def test_the_reference_space_tells_topics_apart_and_is_not_the_hook_space(planted, block):
    topics = block[1]
    x = planted.meanings(*block).astype(float)
    x = x - x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    topic = topics.reshape(-1, 2)[:, 0]
    same = [float(np.mean(x[topic == c][:50] @ x[topic == c][50:100].T)) for c in (0, 2)]
    other = float(np.mean(x[topic == 0][:50] @ x[topic == 2][:50].T))
    assert min(same) > other + 0.2


def test_the_ladder_gets_harder_in_every_respect():
    easy, middle, hard = LADDER.values()
    for name in ("noise", "superposition", "rotation", "jitter"):
        assert getattr(easy, name) < getattr(middle, name) < getattr(hard, name)


def test_a_world_refuses_what_does_not_fit():
    with pytest.raises(ValidationError, match="unknown roles sleeps"):
        TrackWorld(seed=0, rung=LADDER["easy"], shares={"sleeps": 1.0})
    with pytest.raises(ValidationError, match="no multiple of segment"):
        TrackWorld(seed=0, rung=LADDER["easy"], context=20, segment=16)
