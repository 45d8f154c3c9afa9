"""A whole tracked run on a tiny organism: what it computes, what it keeps, what growing costs."""

import shutil

import pytest
from tiny import tiny_track

from stagediff.config import make_plan, parse_config
from stagediff.plan import Plan, execute
from stagediff.store import State, Store


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple[Plan, Store, list[int]]:
    """A finished run that keeps tables only, and how many checkpoints' activations lay on disk after each step. Read only."""
    store = Store(tmp_path_factory.mktemp("track") / "store")
    plan = make_plan(parse_config(tiny_track(store.root)), store)
    on_disk = []

    def count(_) -> None:
        on_disk.append(sum(store.artifact(n.ref).state is State.COMPLETE for n in plan if n.name.startswith("harvest-step")))

    execute(plan, store, device="cpu", keep="tables", on_done=count)
    return plan, store, on_disk


def copy_of(tracked, tmp_path) -> Store:
    shutil.copytree(tracked[1].root, tmp_path / "copy")
    return Store(tmp_path / "copy")


def test_it_computes_nothing_when_it_is_finished(tracked):
    plan, store, _ = tracked
    done = []
    execute(plan, store, device="cpu", keep="tables", on_done=done.append)
    assert done == []


def test_only_the_probe_rows_stay(tracked):
    plan, store, _ = tracked
    activations = {n.name: store.artifact(n.ref).state for n in plan if n.spec.kind == "activations"}
    kept = {name for name, state in activations.items() if state is State.COMPLETE}
    assert kept == {"probe-reference", *(f"probe-step{t}" for t in (0, 1, 2, 4))}
    assert {state for name, state in activations.items() if name not in kept} == {State.EVICTED}


def test_two_checkpoints_activations_lie_on_disk_at_once(tracked):
    assert max(tracked[2]) == 2  # the one that is read, and the one ahead


def test_a_checkpoint_is_added_without_touching_the_others(tracked, tmp_path):
    store = copy_of(tracked, tmp_path)
    longer = make_plan(parse_config(tiny_track(store.root, steps=[0, 1, 2, 4, 8])), store)
    ran = []
    execute(longer, store, device="cpu", keep="tables", on_done=lambda node: ran.append(node.name))
    analysis = {"kinds", "formation", "drift", "patterns", "phases", "efficiency", "probe-reference", "report"}
    chain = [name for name in ran if name not in analysis]
    assert sorted(chain) == sorted(f"{what}-step8" for what in ("harvest", "probe", "follow", "statistics", "quality"))


def test_every_table_has_a_value_or_a_reason(tracked):
    plan, store, _ = tracked
    formed = store.artifact(plan["formation"].ref).read_table("formed.parquet")
    assert formed.formed_step.notna().to_numpy()[formed.reason.isna().to_numpy()].all()
    kinds = store.artifact(plan["kinds"].ref).read_table("kinds.parquet")
    assert len(kinds) == 4 * 256
    assert (kinds.kind.notna() | kinds.reason.notna()).all()
    patterns = store.artifact(plan["patterns"].ref).read_table("patterns.parquet")
    assert len(patterns) == 3 * 256
    assert (patterns.pattern.notna() | patterns.reason.notna()).all()
    quality = store.artifact(plan["efficiency"].ref).read_table("quality.parquet")
    assert set(quality.how) == {"chained", "scratch_full", "scratch_short"}
    assert quality.explained_variance.between(-1, 1).all()
