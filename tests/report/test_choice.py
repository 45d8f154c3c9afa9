"""Which features carry examples."""

import numpy as np
import pandas as pd
import pytest

from stagediff.diff.section.choice import FULL, choose


def table(n: int, selected: int, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"feature": np.arange(n), "x": rng.random(n), "y": rng.random(n), "alive": rng.random(n) > 0.1})
    frame["score"] = frame.x + frame.y
    lowest = frame[frame.alive].sort_values("score").feature[:selected]
    return frame.assign(selected=frame.feature.isin(lowest))


def test_all_selected_extreme_and_random_features_are_chosen_with_all_their_examples():
    frame = table(3000, 60)
    choice = choose(frame, 40, seed=1)
    chosen = set(choice.feature.tolist())
    alive = frame[frame.alive]
    assert set(frame.feature[frame.selected]) <= chosen
    assert set(alive.sort_values("score").feature[:20]) <= set(choice.feature[choice.extreme])
    assert set(alive.sort_values("x").feature[:10]) | set(alive.sort_values("y").feature[:10]) <= set(choice.feature[choice.extreme])
    assert choice.random.sum() == 40
    assert set(choice.count) == {20}
    assert np.all(np.diff(choice.feature) > 0)


def test_dead_features_are_never_drawn():
    frame = table(500, 5)
    choice = choose(frame, 200, seed=0)
    assert not set(choice.feature) & set(frame.feature[~frame.alive])


def test_the_random_sample_depends_on_the_seed_only():
    frame = table(3000, 10)
    draws = [choose(frame, 50, seed=s).feature[choose(frame, 50, seed=s).random].tolist() for s in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("selected", [FULL + 500, 26_000])
def test_the_page_stays_bounded_and_the_lowest_scores_keep_everything(selected):
    frame = table(60_000, selected)
    choice = choose(frame, 200, seed=0, most=50_000)
    assert choice.count.sum() <= 50_000
    full = frame[frame.selected].sort_values("score").feature[:FULL]
    assert set(full) <= set(choice.full)
    assert choice.count.min() >= 1


def test_no_alive_feature_is_no_fault():
    frame = table(20, 0).assign(alive=False, selected=False)
    assert len(choose(frame, 10, seed=0).feature) == 0
