"""What a look takes, in which order, and which runs are due for it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stagediff.config import make_plan, parse_config
from stagediff.errors import DamagedError, UserError
from stagediff.plan import execute
from stagediff.store import Store
from stagediff.track.spec import KindsSpec
from stagediff.watch.watcher import Look, Watcher

from .conftest import age
from .runs import tiny_diff, tiny_watch


def watcher(body: dict[str, Any]) -> Watcher:
    return Watcher(parse_config(body))


def states(look: Look) -> dict[int, str]:
    return {seen.step: seen.state for seen in look.seen}


def due(watched: Watcher) -> list[Any]:
    return list(watched.due(watched.look()))


def steps_of(run: Any) -> list[int]:
    spec = run.plan["kinds"].spec
    assert isinstance(spec, KindsSpec)
    return [point.step for point in spec.points]


def test_a_chain_begins_with_two_and_takes_each_checkpoint_once(save, tmp_path):
    watched = watcher(tiny_watch(tmp_path))
    assert watched.look().waits_for.startswith("a second checkpoint")
    assert due(watched) == []
    save(10)
    assert due(watched) == []
    save(20)
    look = watched.look()
    assert states(look) == {10: "taken", 20: "complete"}
    (run,) = watched.due(look)
    assert steps_of(run) == [10, 20]
    assert states(watched.look()) == {10: "taken", 20: "taken"}


def test_what_is_found_has_the_keys_of_a_run_that_names_it(save, tmp_path):
    for step in (10, 20, 30):
        save(step)
    (run,) = due(watcher(tiny_watch(tmp_path)))
    body = tiny_watch(
        tmp_path,
        model={"name": str(tmp_path / "lm/checkpoint-{step}")},
        checkpoints={"steps": [10, 20, 30]},
        retrain_null={"at": 20, "repeats": 1},
    )
    del body["watch"]
    named = make_plan(parse_config(body), watcher(tiny_watch(tmp_path)).store)
    assert {n.name: n.ref for n in named if n.name != "report"} == {n.name: n.ref for n in run.plan if n.name != "report"}


def test_one_more_checkpoint_costs_one_harvest_one_training_and_the_tables(save, tmp_path):
    save(10), save(20), save(30)
    watched = watcher(tiny_watch(tmp_path, scratch={"at": [20]}))
    (before,) = due(watched)
    save(40)
    (after,) = due(watched)
    there = {n.ref for n in before.plan}
    analysis = {"kinds", "formation", "drift", "patterns", "phases", "efficiency", "probe-reference", "report"}
    added = {n.name for n in after.plan if n.ref not in there}
    assert added == {f"{what}-step40" for what in ("harvest", "probe", "follow", "statistics", "quality")} | analysis


def test_a_half_written_checkpoint_holds_back_those_after_it_until_it_is_whole_or_given_up(save, tmp_path):
    save(10), save(20)
    half = save(30)
    weights = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(weights[:-5])
    save(40)
    watched = watcher(tiny_watch(tmp_path))
    assert states(watched.look()) == {10: "complete", 20: "complete", 30: "settling", 40: "settling"}
    assert steps_of(due(watched)[0]) == [10, 20]
    (half / "model.safetensors").write_bytes(weights)
    assert steps_of(due(watched)[0]) == [10, 20, 30, 40]
    other = save(50)
    (other / "model.safetensors").write_bytes(weights[:-5])
    age(other)
    save(60)
    look = watched.look()
    assert states(look)[50] == "refused"
    assert "cut off" in look.having("refused")[0].why
    assert steps_of(next(watched.due(look))) == [10, 20, 30, 40, 60]
    (other / "model.safetensors").write_bytes(weights)  # too late: a chain only grows at its end
    look = watched.look()
    assert states(look)[50] == "late"
    assert steps_of(next(watched.due(look))) == [10, 20, 30, 40, 60]


def test_the_checkpoints_that_the_config_names_come_first(save, tmp_path):
    watched = watcher(tiny_watch(tmp_path, checkpoints={"steps": [0, 20]}))
    save(0), save(10), save(30)
    look = watched.look()
    assert look.waits_for == "checkpoints [20], which the config names"
    assert 10 not in states(look)  # passed over: the config's own selection goes up to 20
    assert list(watched.due(look)) == []
    assert states(look) == {0: "complete", 30: "settling"}  # 30 is not taken before 20
    save(20)
    assert steps_of(due(watched)[0]) == [0, 20, 30]


def test_only_multiples_are_taken_when_the_settings_say_so(save, tmp_path):
    for step in (5, 10, 15, 20):
        save(step)
    (run,) = due(watcher(tiny_watch(tmp_path, watch={"source": str(tmp_path / "lm"), "multiple_of": 10})))
    assert steps_of(run) == [10, 20]


def test_a_checkpoint_that_was_overwritten_is_told(save, tmp_path):
    save(10), save(20)
    watched = watcher(tiny_watch(tmp_path))
    watched.look()
    shutil.rmtree(tmp_path / "lm/checkpoint-10")
    save(10, seed=99)
    with pytest.raises(UserError, match="checkpoint-10 is not the checkpoint any more that this run has taken.*another name"):
        watched.look()


def test_a_record_that_cannot_be_read_is_told(save, tmp_path):
    save(10), save(20)
    watched = watcher(tiny_watch(tmp_path))
    watched.look()
    record = next((tmp_path / "store/_watch").rglob("10.json"))
    record.write_text("{")
    with pytest.raises(DamagedError, match="Delete it"):
        watched.look()


def test_checkpoints_deleted_after_they_were_read_stay_in_the_chain(save, tmp_path):
    save(10), save(20)
    watched = watcher(tiny_watch(tmp_path, keep="tables"))
    (run,) = due(watched)
    execute(run.plan, watched.store, device="cpu", keep="tables")
    assert due(watched) == []
    shutil.rmtree(tmp_path / "lm/checkpoint-10")  # as save_total_limit does
    save(30)
    (run,) = due(watched)
    assert steps_of(run) == [10, 20, 30]
    done: list[str] = []
    execute(run.plan, watched.store, device="cpu", keep="tables", on_done=lambda node: done.append(node.name))
    assert [name for name in done if name.startswith(("train", "follow"))] == ["follow-step30"]
    assert due(watched) == []
    # one that went before it was read is left out; the newest has to be there
    save(40), watched.look()
    shutil.rmtree(tmp_path / "lm/checkpoint-40")
    assert due(watched) == []
    save(50)
    assert steps_of(due(watched)[0]) == [10, 20, 30, 50]


def test_first_checkpoints_may_lie_elsewhere(save, tmp_path):
    save(0, folder="old/step{step}"), save(10, folder="old/step{step}")
    save(10, seed=5), save(20)  # the first is another training's
    body = tiny_watch(tmp_path, model={"name": str(tmp_path / "old/step{step}")}, checkpoints={"steps": [0, 10]})
    (run,) = due(watcher(body))
    assert steps_of(run) == [0, 10, 20]
    assert run.plan["harvest-step10"].spec.model.name == str(tmp_path / "old/step10")
    assert run.plan["harvest-step20"].spec.model.name == str(tmp_path / "lm/checkpoint-20")


def test_a_config_whose_model_is_a_template_needs_no_source(save, tmp_path):
    save(10), save(20)
    body = tiny_watch(tmp_path, model={"name": str(tmp_path / "lm/checkpoint-{step}")}, checkpoints={"steps": [10, 20]}, watch={"every": 5})
    (run,) = due(watcher(body))
    assert steps_of(run) == [10, 20]


def test_a_chain_on_s3_is_the_chain_of_the_same_checkpoints_in_folders(save, tmp_path, s3_root):
    from stagediff.store.objects import open_objects

    for step in (10, 20):
        for file in save(step).iterdir():
            open_objects(f"{s3_root}/checkpoint-{step}").put(file.name, file.read_bytes())
    (local,) = due(watcher(tiny_watch(tmp_path)))
    watched = watcher(tiny_watch(tmp_path, name="bucket", watch={"source": s3_root, "quiet": 0}))
    (remote,) = due(watched)
    assert {n.name: n.ref for n in local.plan if n.name != "report"} == {n.name: n.ref for n in remote.plan if n.name != "report"}
    open_objects(s3_root).delete_tree("checkpoint-10")
    assert states(watched.look()) == {10: "gone", 20: "taken"}


def test_each_checkpoint_is_diffed_against_the_reference(save, tmp_path):
    base = save(0, folder="base")
    for step in (200, 30):
        save(step)
    watched = watcher(tiny_diff(tmp_path, base))
    runs = due(watched)
    assert [run.step for run in runs] == [30, 200]
    assert [run.plan.name for run in runs] == ["tiny-diff-step30", "tiny-diff-step200"]
    first, second = (run.plan for run in runs)
    shared = {n.name for n in first if n.name in second and second[n.name].ref == n.ref}
    assert {"train-S", "finetune-D", "harvest-base", "statistics-S"} <= shared
    assert not {"harvest-finetuned", "finetune-M", "diff", "report"} & shared
    execute(first, watched.store, device="cpu")
    assert [run.step for run in due(watched)] == [200]


def test_adapters_are_checkpoints_of_a_stagewise_run(save, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    base = save(0, folder="base")
    folder = tmp_path / "lm/checkpoint-5"
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)
    age(folder)
    (run,) = due(watcher(tiny_diff(tmp_path, base)))
    model = run.plan["harvest-finetuned"].spec.model
    assert (model.name, model.adapter) == (str(base), str(folder))
    track = watcher(tiny_watch(tmp_path, name="other")).look()
    assert "PEFT adapter" in track.having("refused")[0].why


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"watch": {"source": "lm", "evry": 5}}, r"watch\.evry is not a setting, did you mean every"),
        ({"watch": {"every": 5}}, "model is missing"),
        ({"checkpoints": {"direction": "backward"}}, "watch needs direction: forward"),
        ({"model": {"organism": {}}}, "watch cannot follow an organism"),
        ({"watch": {"source": ""}}, "source is empty"),
    ],
)
def test_configs_that_cannot_be_watched_are_refused(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        parse_config(tiny_watch(tmp_path, **changes))


def test_a_config_that_says_nothing_of_watching_is_told(tmp_path):
    body = tiny_watch(tmp_path, model={"name": "lm/checkpoint-{step}"}, checkpoints={"steps": [1, 2]})
    del body["watch"]
    with pytest.raises(UserError, match="has no `watch`"):
        watcher(body)
    body = tiny_diff(tmp_path, Path("base"), models={"base": {"name": "base"}, "finetuned": {"name": "ft"}}, watch={"every": 5})
    with pytest.raises(UserError, match=r"watch\.source is missing"):
        watcher(body)


def test_a_run_by_itself_asks_for_the_checkpoints_that_only_watching_finds(save, tmp_path):
    with pytest.raises(UserError, match="stagediff watch"):
        make_plan(parse_config(tiny_watch(tmp_path)), Store(tmp_path / "store"))
    with pytest.raises(UserError, match="stagediff watch"):
        make_plan(parse_config(tiny_diff(tmp_path, save(0, folder="base"))), Store(tmp_path / "store"))
