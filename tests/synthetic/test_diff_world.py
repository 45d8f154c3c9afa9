"""The planted world of a diff does what it says: checked on what comes out, by means that do not use the world's own algebra."""

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.linalg import expm, logm

from stagediff.synthetic.diff_rungs import DIFF_RUNGS, diff_world
from stagediff.synthetic.diff_spec import CLASSES, TARGETS, DiffWorld
from stagediff.synthetic.diff_world import BLOCK_ROWS, PlantedDiff

CELLS = [(side, data) for side in ("base", "finetuned") for data in ("base", "new")]


@pytest.fixture(scope="module")
def world() -> DiffWorld:
    counts = {"unchanged": 30, "model_only": 5, "data_only": 4, "appears": 3, "differs": 3, "turns": 3}
    return DiffWorld(seed=5, d=32, l0=4.0, topics=4, **counts)


@pytest.fixture(scope="module")
def planted(world) -> PlantedDiff:
    return PlantedDiff(world)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def found_directions(planted: PlantedDiff, data: str, side: str, blocks: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of the activations on the firings: [G, d], and how often each feature fired."""
    a, x = [], []
    for block in range(blocks):
        topics = planted.topics(data, "train", block)
        a.append(planted.amplitudes(topics, data, "train", block))
        x.append(planted.activations(topics, data, "train", block, side))
    a, x = np.concatenate(a).astype(float), np.concatenate(x).astype(float)
    return np.linalg.lstsq(a, x, rcond=None)[0], (a > 0).sum(0)


def test_every_class_has_its_number(planted, world):
    counts = [int((planted.classes == c).sum()) for c in CLASSES]
    assert counts == [30, 5, 4, 3, 3, 3]
    assert len(planted) == world.features == 48
    assert set(planted.classes[planted.targets]) == set(TARGETS)


@pytest.mark.parametrize(("side", "data"), CELLS)
def test_activations_hold_the_stated_directions(planted, side, data):
    found, fired = found_directions(planted, data, side)
    stated = planted.directions[side, data]
    written = np.linalg.norm(stated, axis=1) > 0
    seen = (fired >= 100) & written
    assert seen.sum() > 30
    assert angles(found[seen], stated[seen]).max() < 4
    silent = (fired >= 100) & ~written
    assert np.linalg.norm(found[silent], axis=1).max(initial=0) < 0.05
    assert set(planted.classes[silent]) <= {"appears"}


def test_classes_differ_between_the_cells_as_their_names_say(planted):
    cell = planted.directions
    by_model = angles(cell["base", "base"], cell["finetuned", "base"])
    by_model_new = angles(cell["base", "base"], cell["finetuned", "new"])
    for cls, base_rows, new_rows in (
        ("unchanged", "near", "near"),
        ("data only", "near", "near"),
        ("model only", "far", "far"),
        ("turns", "near", "far"),
        ("differs", None, "far"),
    ):
        here = planted.classes == cls
        for kind, angle in ((base_rows, by_model[here]), (new_rows, by_model_new[here])):
            if kind == "near":
                assert angle.max() <= 10 + 1e-6
            elif kind == "far":
                assert angle == pytest.approx(60)
    appears = planted.classes == "appears"
    assert np.linalg.norm(cell["base", "new"][appears], axis=1).max() == 0
    assert np.linalg.norm(cell["finetuned", "new"][appears], axis=1) == pytest.approx(1)


def test_features_fire_as_often_as_stated_and_new_ones_on_new_rows_alone(planted):
    for data in ("base", "new"):
        a = np.concatenate([planted.amplitudes(planted.topics(data, "train", b), data, "train", b) for b in range(12)])
        fired = (a > 0).mean(0)
        tokens, rate = len(a), planted.rates[data]
        # topics are drawn by row and factors are lognormal: a rate may be off by its topics' factors, never by more than a few-fold
        assert fired.sum() == pytest.approx(rate.sum(), rel=0.35)
        assert (fired[rate == 0] == 0).all()
        common = rate * tokens > 300
        assert (fired[common] / rate[common] > 0.2).all()
        assert (fired[common] / rate[common] < 5).all()
        strong = a[a > 0]
        assert (strong.min(), strong.max()) == (pytest.approx(0.5, abs=0.01), pytest.approx(1.5, abs=0.01))
        assert strong.mean() == pytest.approx(1.0, abs=0.01)
    fresh = np.isin(planted.classes, ["data only", "appears", "differs"])
    assert (planted.rates["base"][fresh] == 0).all()
    assert (planted.rates["new"][fresh] >= 0.04).all()


def test_both_models_see_the_same_firings_and_noise(planted):
    topics = planted.topics("base", "train", 0)
    base, finetuned = (planted.activations(topics, "base", "train", 0, side) for side in ("base", "finetuned"))
    a = planted.amplitudes(topics, "base", "train", 0)
    difference = planted.directions["finetuned", "base"] - planted.directions["base", "base"]
    np.testing.assert_allclose(finetuned - base, a @ difference, atol=1e-4)
    noise = base - a @ planted.directions["base", "base"]
    assert noise.std() == pytest.approx(0.05, rel=0.02)


def test_a_common_rotation_is_one_and_turns_by_the_stated_angle(world):
    planted = PlantedDiff(world.model_copy(update={"d": 256, "common_rotation": 25.0, "jitter": 0.0}))
    Q = planted.rotation
    np.testing.assert_allclose(Q @ Q.T, np.eye(256), atol=1e-10)
    generator = np.real(logm(Q))
    np.testing.assert_allclose(generator, -generator.T, atol=1e-8)
    np.testing.assert_allclose(expm(generator), Q, atol=1e-8)
    unchanged = planted.classes == "unchanged"
    turned = angles(planted.directions["base", "base"][unchanged], planted.directions["finetuned", "base"][unchanged])
    assert turned.mean() == pytest.approx(25, abs=2)


def test_the_first_rows_of_a_block_are_the_same_whether_or_not_the_rest_is_asked_for(planted):
    topics = planted.topics("new", "heldout", 2)
    assert len(topics) == BLOCK_ROWS
    few = planted.activations(topics[:9], "new", "heldout", 2, "finetuned")
    np.testing.assert_allclose(few, planted.activations(topics, "new", "heldout", 2, "finetuned")[: 9 * 16], atol=1e-5)


def test_splits_blocks_data_and_seeds_differ_and_asking_again_changes_nothing(planted, world):
    def drawn(of: PlantedDiff, *where) -> np.ndarray:
        return of.amplitudes(of.topics(*where), *where)

    usual = drawn(planted, "base", "train", 0)
    np.testing.assert_array_equal(usual, drawn(PlantedDiff(world), "base", "train", 0))
    others = [
        drawn(planted, "base", "train", 1),
        drawn(planted, "base", "heldout", 0),
        drawn(PlantedDiff(world.model_copy(update={"seed": 6})), "base", "train", 0),
    ]
    assert all(not np.array_equal(usual, other) for other in others)


def test_every_rung_is_a_world_and_the_ladder_covers_share_angle_rotation_and_width():
    worlds = {rung: diff_world(rung, 1) for rung in DIFF_RUNGS}
    usual = worlds["middle"]
    assert (usual.d, usual.base_features, usual.targets, usual.new_share) == (128, 460, 48, 0.05)
    assert worlds["rare"].new_share == 0.01
    assert worlds["close"].angle < usual.angle
    assert worlds["turned"].model_angle == 90
    assert worlds["rotated"].common_rotation > 0
    assert worlds["large"].d == 768
    assert worlds["large-focused"] == worlds["large"]
    assert DIFF_RUNGS["large"][1].dictionary.features == 16_384
    assert DIFF_RUNGS["large-focused"][1].finetune.focus > DIFF_RUNGS["large"][1].finetune.focus == 0
    assert all(DIFF_RUNGS[r][1].dictionary.features > 1.2 * w.features for r, w in worlds.items() if r != "crowded")
    same = PlantedDiff(worlds["identical"]).directions
    for data in ("base", "new"):
        np.testing.assert_allclose(same["base", data], same["finetuned", data], atol=1e-12)
    assert math.isclose(worlds["crowded"].features / usual.features, 1.85, rel_tol=0.05)


def test_a_world_without_targets_is_refused():
    with pytest.raises(ValidationError, match="appears, differs and turns are all 0"):
        DiffWorld(seed=0, appears=0, differs=0, turns=0)
