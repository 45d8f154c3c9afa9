"""Steps side by side: what runs when, what comes back from a lane, and that none outlives the run."""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from tiny import tiny_config

from stagediff import lanes, steps
from stagediff.config import make_plan, parse_config
from stagediff.errors import StagediffError, UserError
from stagediff.numerics import cores
from stagediff.plan import Run
from stagediff.progress import Progress
from stagediff.ranks import RankLostError
from stagediff.store import Store

TOGETHER = ("finetune-D", "finetune-M", "quality-S")


@pytest.fixture
def torn(finished_run, tmp_path):
    """A copy of the run of which three steps and what reads them are missing."""
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    for node in plan.after(TOGETHER):
        copy.remove(node.ref)
    return plan, copy


def complete(plan, store):
    done = []
    run = Run(plan, store)
    lanes.execute(run, 2, lambda node: lanes.run(node.spec, store, device="cpu", name=node.name), lambda node: done.append(node.name))
    return done


def test_what_is_missing_is_computed_and_a_second_time_the_same_bytes(torn):
    plan, store = torn
    missing = [node.name for node in plan.missing(store)]
    assert set(TOGETHER) < set(missing)
    assert sorted(complete(plan, store)) == sorted(missing)
    assert complete(plan, store) == []
    first = {name: store.artifact(plan[name].ref).manifest for name in missing}
    for name in missing:
        store.remove(plan[name].ref)
    complete(plan, store)
    for name in missing:
        assert store.artifact(plan[name].ref).manifest.data() == first[name].data()
    assert first["finetune-D"].numerics["threads"] == max(1, cores() // 2)


def test_order_and_company(tmp_path):
    """Every step after what it reads, two at a time where there are two, the organism's training by itself and as soon as it may."""
    plan = make_plan(parse_config(tiny_config(str(tmp_path))), Store(tmp_path))
    run, going, seen, pairs = Run(plan, Store(tmp_path)), {}, set(), 0
    while True:
        for node in lanes._startable(run, going, 2):
            assert set(node.spec.refs()) <= seen
            going[object()] = node
        if not going:
            break
        names = [node.name for node in going.values()]
        assert len(names) <= 2
        pairs += len(names) == 2
        if "organism" in names:
            assert names == ["organism"]
            assert len(seen) <= 4, "no other step was begun once it could start"
        node = going.pop(next(iter(going)))
        run.finished(node)
        seen.add(node.ref)
    assert run.is_done
    assert pairs > 10


def test_a_lane_that_dies_is_replaced_and_its_step_goes_on(torn):
    plan, store = torn
    node, told = plan["finetune-D"], []

    def kill(task):
        told.append(task.name)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with lanes.Lanes(2):
        with pytest.raises(RankLostError, match=r"finetune-D.*lost \(signal SIGKILL\)"):
            lanes.run(node.spec, store, device="cpu", name="finetune-D", progress=Progress(False, listener=kill))
        assert told
        for _ in range(2):  # the other lane was killed while it had nothing to do
            try:
                lanes.run(node.spec, store, device="cpu", name="finetune-D")
            except RankLostError:
                continue
        assert store.artifact(node.ref).is_complete
    assert not [c for c in multiprocessing.active_children() if c.name.startswith("lane")]


def test_errors_come_back_as_what_they_are_and_nothing_else_is_started(torn, caplog):
    plan, store = torn
    started = []

    def compute(node):
        started.append(node.name)
        device = "gpu" if node.name == "finetune-D" else "cpu"
        lanes.run(node.spec, store, device=device, name=node.name)

    with caplog.at_level("INFO", "stagediff"), pytest.raises(UserError, match="Device 'gpu' is not known"):
        lanes.execute(Run(plan, store), 2, compute)
    assert sorted(started) == ["finetune-D", "finetune-M"]
    assert store.artifact(plan["finetune-M"].ref).is_complete, "what ran beside it came to its end"
    assert any(record.getMessage().startswith("finetune-M") and "done in" in record.getMessage() for record in caplog.records)


def test_the_error_of_a_step_beside_one_that_failed_is_told_too(torn, caplog):
    plan, store = torn
    both = threading.Barrier(2)

    def compute(node):
        both.wait(60)
        raise UserError(f"{node.name} is not to be")

    with caplog.at_level("INFO", "stagediff"), pytest.raises(UserError) as raised:
        lanes.execute(Run(plan, store), 2, compute)
    first = str(raised.value).split()[0]
    (other,) = {"finetune-D", "finetune-M"} - {first}
    assert f"{other}: {other} is not to be" in caplog.messages


def test_ranks_and_steps_side_by_side_are_refused_together(monkeypatch):
    monkeypatch.setenv("STAGEDIFF_RANKS", "2")
    with pytest.raises(UserError, match=r"--jobs 1, or no ranks"), lanes.Lanes(2):
        pass


def test_a_record_comes_through_whatever_is_in_it():
    """What cannot be sent stays behind."""
    told = []
    record = logging.makeLogRecord(
        {"name": "httpx", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "slow: %s", "args": (object,)}
    )
    record.request = lambda: None
    lanes._Teller(lambda kind, word: told.append(pickle.dumps(word))).emit(record)
    assert pickle.loads(told[0])["msg"] == "slow: <class 'object'>"


def test_a_record_that_cannot_be_written_out_is_no_fault_of_the_step(monkeypatch):
    told, faults = [], []
    teller = lanes._Teller(lambda *word: told.append(word))
    monkeypatch.setattr(teller, "handleError", faults.append)
    record = logging.makeLogRecord({"msg": "careful", "args": (FutureWarning,)})  # no place for it in the text
    teller.emit(record)
    assert (told, faults) == ([], [record])


def test_the_step_of_a_lane_ends_though_ending_is_interrupted(torn, monkeypatch):
    """A second signal comes while the other lane, which does nothing, is waited for."""
    plan, store = torn
    node, begun, let_go = plan["finetune-D"], threading.Event(), threading.Event()

    def stand(task):
        begun.set()
        let_go.wait(60)

    def interrupted(self):
        raise KeyboardInterrupt

    open_lanes = lanes.Lanes(2)
    with open_lanes:
        first, second = open_lanes._all
        open_lanes._free.put(open_lanes._free.get())  # so that the step goes to the second one
        listening = Progress(interactive=False, listener=stand)
        pool = ThreadPoolExecutor(1)
        going = pool.submit(open_lanes.run, node.spec, store, device="cpu", progress=listening)
        assert begun.wait(120)
        assert (first.is_busy, second.is_busy) == (False, True)
        with monkeypatch.context() as patched:
            patched.setattr(lanes._Lane, "end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                open_lanes.end()
        second._process.join(20)
        assert second._process.exitcode == -signal.SIGTERM
        assert first._process.is_alive()
        let_go.set()
        with pytest.raises(StagediffError, match="stopped"):
            going.result(60)
    pool.shutdown()


class Broken(Progress):
    """Shows nothing: its bars fail, as a log handler or a listener may."""

    def task(self, *args, **kwargs):
        raise RuntimeError("no screen")


def test_a_lane_that_was_left_in_the_middle_of_a_step_does_not_answer_for_the_next(torn):
    plan, store = torn
    first, second = plan["finetune-D"], plan["finetune-M"]
    with lanes.Lanes(2) as open_lanes:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no screen"):
                open_lanes.run(first.spec, store, device="cpu", progress=Broken(interactive=False))
        for node in (second, first):
            open_lanes.run(node.spec, store, device="cpu", progress=Progress(interactive=False))
            assert store.artifact(node.ref).is_complete


def test_without_lanes_a_step_runs_here(torn, monkeypatch):
    plan, store = torn
    seen = []
    monkeypatch.setattr(steps, "run", lambda spec, *a, **k: seen.append(os.getpid()) or spec.ref)
    lanes.run(plan["quality-S"].spec, store, device="cpu")
    assert seen == [os.getpid()]


def test_one_step_at_a_time_is_no_side_by_side():
    with pytest.raises(UserError, match="begins with 2"):
        lanes.Lanes(1)


PARENT = """
import time
from multiprocessing import active_children
from stagediff.lanes import Lanes

if __name__ == "__main__":
    with Lanes(2):
        print(*(child.pid for child in active_children()), flush=True)
        time.sleep(60)
"""


def test_lanes_end_with_whoever_opened_them(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
