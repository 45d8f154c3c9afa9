"""What aligned scores and the retrain null add to a run's plan."""

import pytest
from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.diff.stages import STAGE_DATA, STAGE_MODEL
from stagediff.errors import UserError
from stagediff.store import Store


def plan_of(**changes):
    return make_plan(parse_config(tiny_config("unused", **changes)), Store("unused"))


QUANTILE = {"kind": "quantile", "value": 0.05}


def test_aligned_scores_are_always_part_of_a_run_and_the_null_only_where_asked_for():
    names = {n.name for n in plan_of()}
    assert {"align", "statistics-F_D-on-base", "statistics-F_M-on-base"} <= names
    assert not [n for n in names if n.startswith("retrain")]
    more = {n.name for n in plan_of(evidence={"null_seeds": 2})}
    expected = {f"{kind}retrain-{stage}-{k}" for kind in ("", "statistics-") for stage in "DM" for k in range(2)} | {"retrain-null"}
    assert more - names == expected


def test_the_contrast_reads_the_base_models_rows_and_can_be_left_out():
    plan = plan_of()
    on_base = plan["statistics-F_D-on-base"].spec
    assert on_base.dictionary == plan["finetune-F_D"].ref
    assert on_base.data == plan["statistics-D"].spec.data
    assert on_base.data != plan["statistics-F_D"].spec.data
    without = plan_of(diff={"cut": QUANTILE, "random_sample": 100, "aligned": {"contrast": False}})
    assert "statistics-F_D-on-base" not in without
    assert without["align"].spec.base_statistics == {}


def test_nulls_read_what_their_stage_read_with_its_budget_and_the_first_in_its_order():
    plan = plan_of(evidence={"null_seeds": 3})
    for stage, path in (("D", "F_D"), ("M", "F_M")):
        own, real = plan[f"finetune-{stage}"].spec, plan[f"finetune-{path}"].spec
        orders = []
        for k in range(3):
            null = plan[f"retrain-{stage}-{k}"].spec
            assert null.start == plan[f"finetune-{stage}"].ref == real.start
            assert null.data == own.data
            assert null.budget == real.budget
            orders.append(null.order_seed)
            measured = plan[f"statistics-retrain-{stage}-{k}"].spec
            assert measured.data == plan[f"statistics-{stage}"].spec.data
            assert measured.base_rows_only == (STAGE_DATA[stage] == "base")
        assert orders[0] == real.order_seed
        assert len(set(orders)) == 3
    assert STAGE_MODEL["D"] == "base"


def test_a_null_leaves_the_published_scores_alone_and_the_fdr_cut_waits_for_it():
    usual, with_null = plan_of(), plan_of(evidence={"null_seeds": 2})
    assert with_null["diff"].ref == usual["diff"].ref
    assert with_null["align"].spec.null == with_null["retrain-null"].ref
    cut = plan_of(evidence={"null_seeds": 2}, diff={"cut": {"kind": "fdr", "value": 0.1}, "random_sample": 100})
    assert cut["diff"].spec.null == cut["retrain-null"].ref


def test_the_fdr_cut_without_a_null_or_out_of_its_reach_is_refused_before_anything_runs():
    with pytest.raises(UserError, match=r"set evidence\.null_seeds to at least 1"):
        plan_of(diff={"cut": {"kind": "fdr", "value": 0.1}})
    with pytest.raises(UserError, match=r"0\.001 cannot be reached: with 256 null values the smallest p is 0\.0039"):
        plan_of(diff={"cut": {"kind": "fdr", "value": 0.001}}, evidence={"null_seeds": 1})


def test_the_rotation_is_taken_out_everywhere_or_nowhere():
    plan = plan_of(diff={"cut": QUANTILE, "random_sample": 100, "take_out_rotation": True}, evidence={"null_seeds": 1})
    assert plan["diff"].spec.take_out_rotation
    assert plan["align"].spec.take_out_rotation
    assert plan["retrain-null"].spec.take_out_rotation
    assert plan["diff"].ref != plan_of()["diff"].ref
