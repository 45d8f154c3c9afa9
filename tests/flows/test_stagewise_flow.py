"""The Prefect flow: runs the whole plan, skips what is there, tries faults of the moment again."""

import shutil

import pytest
from prefect.testing.utilities import prefect_test_harness
from tiny import tiny_config

from flows.stagewise import stagewise
from stagediff import steps
from stagediff.errors import UserError
from stagediff.numerics import cores
from stagediff.store import Store
from tasks import steps as step_tasks


@pytest.fixture(scope="module", autouse=True)
def prefect_server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


def test_the_flow_runs_what_is_missing_and_only_that(finished_run, tmp_path, monkeypatch):
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    copy.remove(plan["finetune-M"].ref)
    copy.remove(plan["diff"].ref)
    ran = []
    monkeypatch.setattr(steps, "run", recording(steps.run, ran))
    report = stagewise(tiny_config(copy.root), device="cpu")
    assert report == plan["report"].ref
    assert ran == ["finetune", "diff"]
    for name in ("finetune-M", "diff"):
        assert copy.artifact(plan[name].ref).manifest.data() == store.artifact(plan[name].ref).manifest.data()


def test_a_fault_of_the_moment_is_tried_again_and_a_users_mistake_is_not(finished_run, tmp_path, monkeypatch):
    plan, store = finished_run
    node = plan["diff"]
    monkeypatch.setattr(step_tasks, "FIRST_DELAY", 0.01)
    step_tasks.task_for.cache_clear()
    for fault, tries in ((OSError("the disk was away"), 2), (UserError("wrong"), 1)):
        seen = []

        def once(*args, fault=fault, seen=seen, **kwargs):
            seen.append(1)
            if len(seen) == 1:
                raise fault
            return node.ref

        monkeypatch.setattr(steps, "run", once)
        call = lambda: step_tasks.compute("diff", "diff", node.spec.model_dump(mode="json"), store.root)  # noqa: E731
        if isinstance(fault, UserError):
            with pytest.raises(UserError):
                call()
        else:
            assert call() == node.ref
        assert len(seen) == tries
    step_tasks.task_for.cache_clear()


def recording(function, names):
    def run(spec, *args, **kwargs):
        names.append(spec.step)
        return function(spec, *args, **kwargs)

    return run


@pytest.mark.parametrize("allowed", ["", "1"])
def test_two_steps_at_a_time(finished_run, tmp_path, monkeypatch, allowed):
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    gone = [plan[name] for name in ("finetune-D", "finetune-M", "diff")]
    for node in gone:
        copy.remove(node.ref)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert stagewise(tiny_config(copy.root), device="cpu", jobs=2) == plan["report"].ref
    threads = {node.name: copy.artifact(node.ref).manifest.numerics["threads"] for node in gone}
    assert set(threads.values()) == {1 if allowed else max(1, cores() // 2)}
