"""Candidates, random features like them, and sets to clamp."""

import numpy as np
import pandas as pd
import pytest
import torch

from stagediff.errors import UserError
from stagediff.evidence.interventions.candidates import candidates, matched, sets


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    n = 300
    frame = pd.DataFrame({"feature": np.arange(n), "score": rng.uniform(1, 2, n), "alive": rng.random(n) < 0.9})
    frame["selected"] = frame.alive & (frame.score < 1.1)
    return frame.assign(density=10 ** rng.uniform(-4, -1, n), norm=rng.uniform(0.5, 2, n))


def test_candidates_are_the_lowest_selected_ones(table):
    found = candidates(table, 5, "score")
    assert found == table[table.selected].sort_values("score").feature.head(5).tolist()
    assert candidates(table.assign(selected=False), 5, "score") == table[table.alive].sort_values("score").feature.head(5).tolist()
    with pytest.raises(UserError, match="No feature of the diff is alive"):
        candidates(table.assign(alive=False), 5, "score")


def test_random_features_are_alive_unselected_distinct_and_like_their_candidate(table):
    chosen = candidates(table, 4, "score")
    found = matched(table, chosen, 20, seed=1)
    about = table.set_index("feature")
    assert found.feature.is_unique
    assert about.alive[found.feature].all()
    assert not about.selected[found.feature].any()
    assert found.matched_to.value_counts().to_dict() == dict.fromkeys(chosen, 5)

    def apart(pairs):
        logs = np.log(about[["density", "norm"]])
        return np.abs(logs.loc[pairs.feature].to_numpy() - logs.loc[pairs.matched_to].to_numpy()).mean()

    pool = table[table.alive & ~table.selected].feature.sample(20, random_state=0).to_numpy()
    assert apart(found) < 0.5 * apart(found.assign(feature=pool))
    assert not found.equals(matched(table, chosen, 20, seed=2))
    with pytest.raises(UserError, match="are alive and not selected"):
        matched(table, chosen, 400, seed=0)


def test_sets_grow_in_their_order(table, world):
    spec = world.ablate(sizes=(2, 5, 400), draws=3)
    drawn = np.random.default_rng(4).normal(size=(2, 300))
    table = table.assign(trigger=drawn[0], attribution=np.where(table.index < 50, drawn[1], np.nan))
    directions = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    chosen = candidates(table, 2, "score")
    made = sets(spec, table, chosen, directions)
    by = {(order, draw, len(features)): features for order, draw, features in made if order not in ("single", "none")}
    assert made[0] == ("none", 0, [])
    assert [f for order, _, f in made if order == "single"] == [[i] for i in chosen]
    alive = table[table.alive]
    assert by["score", 0, 5] == alive.sort_values("score").feature.head(5).tolist()
    assert by["trigger", 0, 5] == alive.sort_values("trigger").feature.tail(5).tolist()[::-1]
    lowest = alive.sort_values("score").head(round(0.1 * len(alive)))
    assert by["region", 0, 5] == lowest.sort_values("trigger").feature.tail(5).tolist()[::-1]
    ranked = alive[alive.attribution.notna()].sort_values("attribution")
    assert by["attribution", 0, 5] == ranked.feature.tail(5).tolist()[::-1]
    cosine = (directions.double() @ directions[chosen[0]].double()).numpy()
    assert by["cosine", 0, 5] == sorted(alive.feature, key=lambda i: -cosine[i])[:5]
    assert by["cosine", 0, 5][0] == chosen[0]
    assert by["random", 0, 2] == by["random", 0, 5][:2]
    assert len({tuple(by["random", draw, 5]) for draw in range(3)}) == 3
    assert set(by["random", 1, 5]) <= set(alive.feature)
    assert not any(len(f) > 5 for *_, f in made)  # there are no 400 alive ones
