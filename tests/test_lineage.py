"""Runs of kind both: what is said once, and how the diff goes on from the chain."""

from pathlib import Path

import pytest

from stagediff.config import load_config, make_plan, parse_config, read_yaml
from stagediff.errors import UserError
from stagediff.sae.spec import FinetuneSpec
from stagediff.store import Store

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def demo_plan(tmp_path, **overrides):
    return make_plan(load_config(DEMO, overrides=overrides), Store(str(tmp_path)))


def test_the_diff_goes_on_from_the_chains_last_model_and_dictionary(tmp_path):
    plan = demo_plan(tmp_path)
    settle = plan["settle-S"].spec
    assert isinstance(settle, FinetuneSpec)
    assert settle.start == plan["follow-step500"].ref
    assert not settle.rescale
    assert plan["harvest-base"].spec.model == plan["harvest-step500"].spec.model
    assert plan["finetune-D"].spec.start == settle.ref
    assert [n.name for n in plan if n.spec.step == "organism"] == ["organism"]
    assert [n.name for n in plan if n.spec.step == "tokenizer"] == ["tokenizer"]


def test_what_both_need_is_said_once(tmp_path):
    config = load_config(DEMO, overrides={"track.hook.layer": 1, "track.context": 64, "seed": 7})
    assert config.stagewise.hook == config.track.hook
    assert (config.stagewise.context, config.stagewise.seed, config.track.seed) == (64, 7, 7)
    assert config.stagewise.data.base.builtin == "stdlib"


def test_a_config_reads_the_same_after_it_was_written(tmp_path):
    config = load_config(DEMO)
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"track.checkpoints.direction": "backward"}, "needs direction: forward"),
        ({"stagewise.hook": {"layer": 1}}, "read different hook points"),
        ({"stagewise.start": "some/folder"}, "start cannot be set"),
        ({"track.checkpoints.steps": [4, 2]}, "steps must ascend"),
        ({"stagewise": None}, "stagewise"),
    ],
)
def test_what_cannot_be_one_lineage_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        parse_config(read_yaml(DEMO), overrides=changes)
