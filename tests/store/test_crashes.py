"""Writers killed with SIGKILL, racing writers, full disks: nothing is lost, nothing is silently wrong, little is computed twice."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from toystep import SAVE_EVERY, ToySpec, fill, shard_rows

from stagediff.errors import UserError
from stagediff.store import State, Store
from stagediff.store.manifest import FileRecord
from stagediff.store.names import WORK


def undisturbed(tmp_path: Path, spec: ToySpec) -> dict:
    """Data files of the same step computed in peace."""
    store = Store(tmp_path / "undisturbed")
    fill(spec, store, str(tmp_path / "undisturbed-log.txt"))
    return store.artifact(spec.ref).manifest.data()


def assert_whole(root: str, spec: ToySpec, expected: dict) -> None:
    store = Store(root)
    artifact = store.artifact(spec.ref)
    assert artifact.state is State.COMPLETE
    assert artifact.verify() == []
    assert artifact.manifest.data() == expected
    array = artifact.array()
    for shard in range(array.n_shards):
        assert (array.read_shard(shard) == shard_rows(spec, shard, array.rows_of(shard))).all()
    assert not any(name.startswith(WORK) for name in store.objects.entries(spec.ref))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_writer_killed_at_random_moments_ends_with_the_same_bytes(root, runner, tmp_path, seed):
    spec = ToySpec(seed=seed, rows=770, pause=0.02)
    kills = runner.kill_often(root, 6, seed, most=3, spec=spec)
    assert kills >= 3
    assert_whole(root, spec, undisturbed(tmp_path, spec))
    computed = runner.computed("shard")
    assert len(computed) <= len(set(computed)) + kills  # at most the shard at hand, each time


@pytest.mark.slow
def test_a_training_killed_at_random_moments_goes_on_from_its_last_checkpoint(root, runner, tmp_path):
    spec = ToySpec(rows=48, train_steps=20, pause=0.06)
    kills = runner.kill_often(root, 3, seed=5, most=9, spec=spec)
    assert kills >= 2
    assert_whole(root, spec, undisturbed(tmp_path, spec))
    steps = runner.computed("train")
    assert sorted(set(steps)) == list(range(20))
    assert len(steps) <= 20 + kills * SAVE_EVERY


def test_two_racing_writers_compute_every_shard_once(root, runner, tmp_path):
    spec = ToySpec(rows=290, pause=0.05)
    both = [runner.start(root, spec=spec) for _ in range(2)]
    for process in both:
        runner.finish(process)
    assert sorted(runner.computed("shard")) == list(range(13))
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_two_racing_trainings_train_once(root, runner, tmp_path):
    spec = ToySpec(rows=24, train_steps=12, pause=0.05)
    both = [runner.start(root, spec=spec) for _ in range(2)]
    for process in both:
        runner.finish(process)
    assert runner.computed("train") == list(range(12))
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_workers_with_parts_share_the_shards_and_the_last_one_commits(root, runner, tmp_path):
    spec = ToySpec(rows=290, pause=0.05)
    workers = [runner.start(root, part=(i, 3), spec=spec) for i in range(3)]
    for process in workers:
        runner.finish(process)
    assert sorted(runner.computed("shard")) == list(range(13))
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_a_racing_writer_takes_over_from_one_that_is_killed(root, runner, tmp_path):
    spec = ToySpec(rows=290, pause=0.1)
    first, second = (runner.start(root, spec=spec) for _ in range(2))
    while len(runner.computed("shard")) < 4:
        time.sleep(0.01)
    first.kill()
    first.communicate()
    began = time.monotonic()
    runner.finish(second)
    assert time.monotonic() - began < 15  # not the lease's 90 seconds
    computed = runner.computed("shard")
    assert len(computed) <= 14
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_a_stopped_writer_is_overtaken_when_its_lease_is_over_and_does_no_harm_afterwards(root, runner, tmp_path, monkeypatch):
    monkeypatch.setattr("stagediff.store.claims.LEASE_SECONDS", 0.5)
    spec = ToySpec(rows=290, pause=0.2)
    stopped = runner.start(root, spec=spec)
    while len(runner.computed("shard")) < 2:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGSTOP)
    try:
        fill(spec, Store(root), str(runner.log))
        expected = undisturbed(tmp_path, spec)
        assert_whole(root, spec, expected)
    finally:
        stopped.send_signal(signal.SIGCONT)
    runner.finish(stopped)
    Store(root).collect_garbage(older_than=0)  # a late claim or receipt
    assert_whole(root, spec, expected)


def test_an_object_without_a_receipt_is_adopted_when_whole_and_rewritten_when_torn(root, tmp_path):
    spec, store = ToySpec(rows=290), Store(root)
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        for shard in range(2):
            array.write_shard(shard, shard_rows(spec, shard, 24))
    objects = store.objects
    for shard in range(2):
        objects.delete(f"{spec.ref}/_work/receipts/data/c/{shard}/0.json")
    whole = objects.get(f"{spec.ref}/data/c/1/0")
    objects.put(f"{spec.ref}/data/c/1/0", whole[:-300] + bytes(100) + whole[-200:])
    log = tmp_path / "log.txt"
    fill(spec, store, str(log))
    assert [int(line.split()[1]) for line in log.read_text().split("\n") if line] == list(range(1, 13))
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_a_shard_that_vanished_or_shrank_after_its_receipt_is_computed_again(root, tmp_path):
    spec, store = ToySpec(rows=290), Store(root)
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        for shard in range(3):
            array.write_shard(shard, shard_rows(spec, shard, 24))
    store.objects.delete(f"{spec.ref}/data/c/0/0")
    store.objects.put(f"{spec.ref}/data/c/2/0", store.objects.get(f"{spec.ref}/data/c/2/0")[:-1])
    problems = {p.path for p in store.artifact(spec.ref).verify()}
    assert problems == {"data/c/0/0", "data/c/2/0"}
    log = tmp_path / "log.txt"
    fill(spec, store, str(log))
    assert [int(line.split()[1]) for line in log.read_text().split("\n") if line][:2] == [0, 2]
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_a_file_system_that_refuses_further_bytes_is_a_clear_error_and_leaves_nothing_torn(tmp_path, runner):
    root = str(tmp_path / "store")
    spec = ToySpec(rows=2000, width=64)
    process = runner.start(root, limit_bytes=2500, spec=spec)  # a shard has 3,308 bytes
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "size limit" in errors.decode()
    assert "continues where it stopped" in errors.decode()
    artifact = Store(root).artifact(spec.ref)
    assert artifact.state is State.PARTIAL
    assert not list(Path(root).rglob("c/*/0"))
    assert not list(Path(root).rglob("*.partial"))
    runner.finish(runner.start(root, spec=spec))
    assert_whole(root, spec, undisturbed(tmp_path, spec))


def test_a_disk_that_fills_up_is_a_clear_error(tmp_path, monkeypatch):
    spec, store = ToySpec(), Store(tmp_path / "store")
    with store.write(spec) as writer:
        writer.write_bytes("first.bin", b"1")

        def full(self, path, parts, durable):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("stagediff.store.local.LocalObjects._write", full)
            with pytest.raises(UserError, match="disk is full"):
                writer.write_bytes("second.bin", b"2" * 100)
        assert writer.has("first.bin")
        assert not writer.has("second.bin")
    assert not list(tmp_path.rglob("*.partial"))


def test_an_array_that_cannot_fit_is_refused_before_the_work(tmp_path):
    store = Store(tmp_path)
    with store.write(ToySpec()) as writer, pytest.raises(UserError, match="GiB more"):
        writer.array("data", shape=(10**12, 1024), dtype="uint16", chunk_rows=1000, shard_rows=10**9)


def test_who_finds_the_artifact_committed_by_another_leaves_quietly(root):
    spec, store = ToySpec(), Store(root)
    with store.write(spec) as slow:
        with store.write(spec) as fast:
            fast.write_bytes("a.bin", b"fast")
            fast.commit(figures={"who": "fast"})
        slow.write_bytes("a.bin", b"slow")
        raise AssertionError("not reached: writing to a complete artifact ends the block")
    artifact = store.artifact(spec.ref)
    assert artifact.manifest.figures == {"who": "fast"}
    assert artifact.read_bytes("a.bin") == b"fast"
    assert set(store.objects.entries(spec.ref)) == {"a.bin", "manifest.json", "spec.json"}


def test_a_racing_writer_that_never_looks_again_leaves_nothing_behind(root):
    spec, store = ToySpec(), Store(root)
    with store.write(spec) as slow:
        with store.write(spec) as fast:
            fast.commit(figures={})
        slow.add_receipt(FileRecord(path="late.bin", bytes=1, crc32c="00000000"))
    assert set(store.objects.entries(spec.ref)) == {"manifest.json", "spec.json"}


def test_of_two_writers_with_different_content_the_manifest_describes_what_is_stored(root):
    spec, store = ToySpec(), Store(root)
    with store.write(spec) as first, store.write(spec) as second:
        first.write_bytes("a.bin", b"first")
        second.write_bytes("a.bin", b"second")
        first.commit(figures={})
    artifact = store.artifact(spec.ref)
    assert artifact.read_bytes("a.bin") == b"second"
    assert artifact.verify() == []


def test_an_error_in_the_block_keeps_the_work_and_frees_the_claims_at_once(root):
    spec, store = ToySpec(rows=290), Store(root)

    def fail() -> None:
        with store.write(spec) as writer:
            array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
            for shard in array.pending():
                if shard == 2:
                    raise RuntimeError("the model yields NaN")
                array.write_shard(shard, shard_rows(spec, shard, 24))

    with pytest.raises(RuntimeError, match="NaN"):
        fail()
    assert store.artifact(spec.ref).state is State.PARTIAL
    assert not store.has_live_writers(spec.ref)
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        assert array.missing() == list(range(2, 13))
        assert next(iter(array.pending())) == 2


def test_a_commit_with_missing_shards_is_refused(root):
    spec, store = ToySpec(rows=290), Store(root)
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        array.write_shard(0, np.zeros((24, 16), np.uint16))
        with pytest.raises(Exception, match="12 of 13 shards"):
            writer.commit(figures={})
    assert store.artifact(spec.ref).state is State.PARTIAL


def test_the_manifest_names_every_writer_killed_ones_included(tmp_path, runner):
    root, spec = str(tmp_path / "store"), ToySpec(rows=290, pause=0.05)
    killed = runner.start(root, spec=spec)
    while len(runner.computed("shard")) < 3:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    runner.finish(runner.start(root, spec=spec))
    writers = Store(root).artifact(spec.ref).manifest.writers
    assert writers[0].pid == killed.pid
    assert len(writers) == 2
    assert all(w.pid != os.getpid() for w in writers)
    assert json.loads((Path(root) / spec.ref / "spec.json").read_text())["step"] == "toy"
