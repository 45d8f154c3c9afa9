"""The store as its users see it: states, listings, eviction, quarantine, garbage, names."""

import json
import os
import pickle
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
from toystep import ToySpec, fill, shard_rows

from stagediff.errors import DamagedError, UserError
from stagediff.spec import Ref, Spec
from stagediff.store import Manifest, State, Store
from stagediff.store.claims import Session, is_alive


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "log.txt")


class Downstream(Spec):
    step = "downstream"
    kind = "others"
    upstream: Ref


def test_states_go_from_absent_over_partial_to_complete_and_evicted(root, log):
    store, spec = Store(root), ToySpec()
    artifact = store.artifact(spec.ref)
    assert artifact.state is State.ABSENT
    assert not artifact.is_complete
    with store.write(spec):
        assert artifact.state is State.PARTIAL
    with pytest.raises(UserError, match="only a part"):
        artifact.require()
    fill(spec, store, log)
    assert artifact.state is State.COMPLETE
    assert artifact.require() is artifact
    store.evict(spec.ref)
    assert artifact.state is State.EVICTED
    assert artifact.is_complete
    with pytest.raises(UserError, match="not there"):
        store.artifact(ToySpec(seed=9).ref).require()


def test_the_manifest_says_what_was_made_from_what(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    with store.write(Downstream(upstream=spec.ref), numerics={"device": "cpu"}) as writer:
        writer.write_bytes("a.bin", b"abc")
        writer.commit(figures={"share": np.float32(0.5), "n": np.int64(3), "nan": float("nan")}, notes={"tokens/s": 1.5})
    manifest = store.artifact(Downstream(upstream=spec.ref).ref).manifest
    assert manifest.upstream == [spec.ref]
    assert manifest.figures == {"share": 0.5, "n": 3, "nan": None}
    assert manifest.notes == {"tokens/s": 1.5}
    assert manifest.numerics == {"device": "cpu"}
    assert manifest.writers[0].numerics == {"device": "cpu"}
    assert manifest.spec == {"upstream": spec.ref}
    assert manifest.file("a.bin").bytes == 3
    assert manifest.file("a.bin").crc32c == "364b3fb7"  # of b"abc", Castagnoli
    assert manifest.same_bytes is None
    assert manifest.stagediff
    assert manifest.created.startswith("20")
    assert manifest.ref == Downstream(upstream=spec.ref).ref


def test_files_folders_and_json_come_back(root, tmp_path, cache):
    store, spec = Store(root), ToySpec()
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "w.bin").write_bytes(bytes(range(256)) * 1000)
    (model / ".hidden").write_text("no")
    with store.write(spec) as writer:
        writer.write_file("step4", model)
        writer.write_file("one.bin", model / "sub" / "w.bin")
        assert writer.has("step4/sub/w.bin")
        assert not writer.has("step4/.hidden".replace("/.", "/"))
        assert writer.read_bytes("step4/config.json") == b"{}"
        writer.write_json("a.json", {"x": (1, 2), "array": np.arange(2)})
        writer.write_json("a.json", {"x": (1, 2), "array": np.arange(3)})  # replaced
        writer.commit(figures={})
    artifact = store.artifact(spec.ref)
    assert artifact.read_json("a.json") == {"x": [1, 2], "array": [0, 1, 2]}
    assert artifact.names("step4") == ["step4/config.json", "step4/sub/w.bin"]
    for _ in range(2):
        folder = artifact.local("step4")
        assert (folder / "sub" / "w.bin").read_bytes() == (model / "sub" / "w.bin").read_bytes()
        assert artifact.local("one.bin").stat().st_size == 256_000
    with pytest.raises(UserError, match="has no file 'nothing'"):
        artifact.read_bytes("nothing")
    with pytest.raises(UserError, match="has no file 'nothing'"):
        artifact.local("nothing")


def test_a_cached_copy_that_was_changed_is_fetched_again(s3_root, cache):
    store, spec = Store(s3_root), ToySpec()
    with store.write(spec) as writer:
        writer.write_bytes("a.bin", b"abc")
        writer.commit(figures={})
    artifact = store.artifact(spec.ref)
    artifact.local("a.bin").write_bytes(b"xyz")
    assert artifact.local("a.bin").read_bytes() == b"abc"


def test_scratch_is_there_while_writing_and_gone_afterwards(root):
    with Store(root).write(ToySpec()) as writer:
        folder = writer.scratch()
        (folder / "x").write_text("1")
        assert writer.scratch() == folder
    assert not folder.exists()


BAD_NAMES = ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "..", ".hidden", "a/.b", "a\\b", "a/", "a\n"]
BAD_NAMES += ["_work/x", "manifest.json", "spec.json", "x.partial"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_cannot_leave_the_artifact_or_take_the_stores_own(tmp_path, name):
    with Store(tmp_path / "store").write(ToySpec()) as writer:
        writes = [
            lambda: writer.write_bytes(name, b""),
            lambda: writer.array(name, shape=(1,), dtype="uint8", chunk_rows=1, shard_rows=1),
            lambda: writer.write_file(name, __file__),
        ]
        for write in writes:
            with pytest.raises(ValueError, match="artifact|keeps for itself"):
                write()
    assert {p.name for p in tmp_path.iterdir()} == {"store"}


def test_ls_and_refs_show_every_artifact_with_its_state(root, log):
    store = Store(root)
    assert list(store.ls()) == []
    assert store.refs() == []
    done, part = ToySpec(seed=1), ToySpec(seed=2)
    fill(done, store, log)
    with store.write(part) as writer:
        writer.write_bytes("a.bin", b"abc")
    listed = {entry.ref: entry for entry in store.ls()}
    assert set(store.refs()) == set(store.refs("toys")) == set(listed) == {done.ref, part.ref}
    assert store.refs("others") == []
    assert (listed[done.ref].state, listed[done.ref].step) == (State.COMPLETE, "toy")
    assert listed[done.ref].figures["total"] > 0
    assert listed[done.ref].bytes == store.artifact(done.ref).manifest.size
    assert (listed[part.ref].state, listed[part.ref].step) == (State.PARTIAL, "toy")
    assert store.find(done.ref.key[:6]) == done.ref
    assert store.find(done.ref) == done.ref
    with pytest.raises(UserError, match="2 artifacts"):
        store.find("toys/")
    with pytest.raises(UserError, match="no artifact"):
        store.find("zz")


def test_eviction_drops_arrays_and_keeps_everything_else(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    freed = store.evict(spec.ref)
    assert freed == 4 * (3 * (8 * 16 * 2 + 4) + 52) + (1 * (8 * 16 * 2 + 4) + 52)
    artifact = store.artifact(spec.ref).require()
    assert artifact.manifest.evicted
    assert artifact.read_json("about/total.json")["total"] == artifact.manifest.figures["total"]
    assert len(artifact.read_table("sums.parquet")) == 5
    assert artifact.verify() == []
    with pytest.raises(UserError, match="evicted"):
        artifact.array()
    assert not any("/c/" in name for name in store.objects.entries(spec.ref))
    assert store.evict(spec.ref) == 0


def test_an_array_that_another_writer_dropped_is_described_again(root, log):
    """One that stores nothing takes away what is left of an array, just as one that stores it has begun."""
    store, spec = Store(root), ToySpec()
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        with store.write(spec) as other:
            other.drop("data")
        for shard in array.pending():
            array.write_shard(shard, shard_rows(spec, shard, array.rows_of(shard)))
        writer.commit(figures={})
    assert np.array_equal(store.artifact(spec.ref).array().read_shard(0), shard_rows(spec, 0, 24))


def test_an_interrupted_eviction_is_finished_by_garbage_collection(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    shard = store.objects.get(f"{spec.ref}/data/c/0/0")
    store.evict(spec.ref)
    store.objects.put(f"{spec.ref}/data/c/0/0", shard)
    assert [g.path for g in store.collect_garbage(older_than=0)] == [f"{spec.ref}/data/c/0/0"]
    assert not store.objects.exists(f"{spec.ref}/data/c/0/0")


def test_a_forced_recomputation_says_whether_the_bytes_agree(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    old = store.quarantine(spec.ref)
    assert isinstance(old, Manifest)
    assert not store.artifact(spec.ref).is_complete
    fill(spec, store, log)  # commits without being told what it replaces: the store remembers
    assert store.artifact(spec.ref).manifest.same_bytes is True
    store.quarantine(spec.ref)
    aside = f"_quarantine/{spec.ref}/{store.objects.folders(f'_quarantine/{spec.ref}')[-1]}"
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        for shard in array.pending():
            block = shard_rows(spec, shard, array.rows_of(shard))
            array.write_shard(shard, block ^ (shard == 4))  # the last bit of the last shard
        for name in ("sums.parquet", "about/total.json"):
            writer.write_bytes(name, store.objects.get(f"{aside}/{name}"))
        writer.commit(figures={}, replaces=old)
    assert store.artifact(spec.ref).manifest.same_bytes is False
    assert store.artifact(spec.ref).verify() == []


def test_a_forced_run_that_was_killed_goes_on_when_forced_again(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    store.quarantine(spec.ref)
    with store.write(spec) as writer:  # killed after one shard
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        array.write_shard(0, shard_rows(spec, 0, 24))
    again = store.quarantine(spec.ref)
    assert again is not None
    assert store.objects.exists(f"{spec.ref}/data/c/0/0")
    fill(spec, store, log)
    assert store.artifact(spec.ref).manifest.same_bytes is True


def test_a_kill_in_the_middle_of_quarantine_loses_no_manifest(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    manifest = store.artifact(spec.ref).manifest
    store.objects.move_tree(spec.ref, f"_quarantine/{spec.ref}/0", first=["manifest.json"])
    assert store.quarantine(spec.ref) == manifest


def test_unfinished_work_is_not_forced_but_gone_on_with(root, log):
    store, spec = Store(root), ToySpec()
    assert store.quarantine(spec.ref) is None
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=8, shard_rows=24)
        array.write_shard(0, shard_rows(spec, 0, 24))
    assert store.quarantine(spec.ref, "a mark") is None
    assert store.objects.exists(f"{spec.ref}/data/c/0/0")
    fill(spec, store, log)
    assert store.artifact(spec.ref).manifest.forced == "a mark"


def test_garbage_is_what_no_run_needs(root, log):
    store, done, dead, alive = Store(root), ToySpec(seed=1), ToySpec(seed=2), ToySpec(seed=3)
    fill(done, store, log)
    store.quarantine(done.ref)
    fill(done, store, log)
    with store.write(dead) as writer:
        writer.write_bytes("a.bin", b"abc")
    with store.write(alive) as writer:
        writer.write_bytes("a.bin", b"abc")
        assert store.collect_garbage(older_than=timedelta(hours=1)) == []
        planned = store.collect_garbage(older_than=0, dry_run=True)
        assert {g.path for g in planned} == {dead.ref, f"_quarantine/{done.ref}"}
        assert all(g.bytes > 0 for g in planned)
        assert store.artifact(dead.ref).state is State.PARTIAL
        assert store.collect_garbage(older_than=0) == planned
        assert store.artifact(dead.ref).state is State.ABSENT
        writer.commit(figures={})
    assert store.collect_garbage(older_than=0) == []
    assert all(not problems for _, _, problems in store.verify())


def test_leftovers_of_killed_processes_are_garbage(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "toys" / ToySpec().key).mkdir(parents=True)
    left = tmp_path / "toys" / ToySpec().key / ".abc.partial"
    left.write_bytes(b"half")
    dead = Session(store.objects, ToySpec(seed=7).ref)
    dead.close(keep=True)
    scratch = tmp_path / "_scratch" / f"toys-{ToySpec(seed=7).key}-{dead.id}-abc"
    scratch.mkdir(parents=True)
    (scratch / "big.bin").write_bytes(b"12345")
    with store.write(ToySpec(seed=8)) as writer:
        (writer.scratch() / "model.bin").write_bytes(b"in use")
        garbage = {g.path for g in store.collect_garbage(older_than=0, dry_run=True)}
        assert garbage == {f"toys/{ToySpec().key}/.abc.partial", f"_scratch/{scratch.name}", ToySpec(seed=7).ref}
    store.remove(ToySpec(seed=8).ref)
    assert store.objects.entries(ToySpec().ref) == {}
    assert {g.path for g in store.collect_garbage(older_than=0)} == garbage
    assert not left.exists()
    assert not scratch.exists()


def test_unfinished_uploads_are_garbage(s3_root):
    store = Store(s3_root)
    bucket, _, prefix = s3_root.removeprefix("s3://").partition("/")
    store.objects._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/toys/{'0' * 20}/big")
    store.objects._fs.call_s3("create_multipart_upload", Bucket=bucket, Key="elsewhere/big")
    found = store.collect_garbage(older_than=0)
    assert [g.path.partition("?")[0] for g in found] == [f"toys/{'0' * 20}/big"]
    assert store.collect_garbage(older_than=0) == []


def test_removing_takes_everything(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    store.remove(spec.ref)
    assert store.artifact(spec.ref).state is State.ABSENT
    assert store.objects.entries(spec.ref) == {}


def test_every_flipped_byte_anywhere_is_found_by_verify(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    rng = np.random.default_rng(0)
    names = sorted(store.objects.entries(spec.ref))
    assert "manifest.json" in names
    assert len(names) >= 9
    for name in names:
        body = store.objects.get(f"{spec.ref}/{name}")
        for position in rng.integers(0, len(body), 10 if store.objects.is_local else 1):
            flipped = bytearray(body)
            flipped[position] ^= 1 << int(rng.integers(0, 8))
            store.objects.put(f"{spec.ref}/{name}", bytes(flipped))
            assert [p.path for p in store.artifact(spec.ref).verify()] == [name]
            with pytest.raises(DamagedError):
                read_everything(store.artifact(spec.ref))
        store.objects.put(f"{spec.ref}/{name}", body)
    assert store.artifact(spec.ref).verify() == []


def read_everything(artifact) -> None:
    for name in artifact.names():
        if "/c/" not in name:
            artifact.read_bytes(name)
    array = artifact.array()
    for shard in range(array.n_shards):
        array.read_shard(shard)


def test_missing_cut_and_foreign_files_are_found_by_verify(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    store.objects.delete(f"{spec.ref}/data/c/1/0")
    store.objects.put(f"{spec.ref}/sums.parquet", b"short")
    store.objects.put(f"{spec.ref}/foreign.bin", b"x")
    [(ref, state, problems)] = list(store.verify())
    assert (ref, state) == (spec.ref, State.DAMAGED)
    assert {p.path: p.what.split(" ")[0] for p in problems} == {"data/c/1/0": "is", "sums.parquet": "has", "foreign.bin": "is"}
    with pytest.raises(DamagedError, match=r"bytes instead of.*--force"):
        store.artifact(spec.ref).read_table("sums.parquet")
    old = store.quarantine(spec.ref)
    fill(spec, store, log)
    assert store.artifact(spec.ref).verify() == []
    assert store.artifact(spec.ref).manifest.same_bytes is (old is not None)


def test_a_damaged_manifest_is_a_clear_error_and_force_heals_it(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    store.objects.put(f"{spec.ref}/manifest.json", store.objects.get(f"{spec.ref}/manifest.json")[:-40])
    with pytest.raises(DamagedError, match="manifest"):
        store.artifact(spec.ref).require()
    assert [entry.state for entry in store.ls()] == [State.DAMAGED]
    assert store.quarantine(spec.ref) is None
    fill(spec, store, log)
    assert store.artifact(spec.ref).state is State.COMPLETE


def test_a_manifest_in_another_artifacts_folder_is_refused(root, log):
    store, one, two = Store(root), ToySpec(seed=1), ToySpec(seed=2)
    fill(one, store, log)
    store.objects.put(f"{two.ref}/manifest.json", store.objects.get(f"{one.ref}/manifest.json"))
    with pytest.raises(DamagedError, match="mixed up"):
        store.artifact(two.ref).require()


def test_an_array_begun_with_another_layout_is_refused(root):
    store = Store(root)
    with store.write(ToySpec()) as writer:
        writer.array("data", shape=(10, 2), dtype="uint16", chunk_rows=1, shard_rows=2)
    with store.write(ToySpec()) as writer, pytest.raises(Exception, match="begun with another shape"):
        writer.array("data", shape=(11, 2), dtype="uint16", chunk_rows=1, shard_rows=2)


def test_a_store_below_a_file_or_in_a_forbidden_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file stands in its way"), Store(tmp_path / "file" / "store").write(ToySpec()):
        pass


def test_importing_the_store_is_light():
    heavy = ["torch", "pandas", "zarr", "pyarrow", "fsspec", "s3fs", "numpy", "transformers"]
    code = f"import sys, stagediff.store as s; s.Store('x').artifact('toys/' + 20 * '0').state; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_store_can_be_sent_to_another_process(root, log):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    assert pickle.loads(pickle.dumps(store)).artifact(spec.ref).state is State.COMPLETE


def test_the_state_of_a_complete_artifact_is_looked_up_fast(tmp_path, log):
    """What an untouched rerun does for every step."""
    store, spec = Store(tmp_path), ToySpec()
    fill(spec, store, log)
    began = time.monotonic()
    for _ in range(100):
        assert store.artifact(spec.ref).is_complete
    assert time.monotonic() - began < 1


def test_spec_json_is_readable_and_leads_back_to_the_key(root):
    store, spec = Store(root), ToySpec(seed=4)
    with store.write(spec):
        body = json.loads(store.objects.get(f"{spec.ref}/spec.json"))
    assert body["step"] == "toy"
    assert ToySpec.model_validate(body["spec"]).key == spec.key


def test_the_process_id_of_a_dead_process_taken_by_another_is_not_a_live_writer(root):
    store = Store(root)
    session = Session(store.objects, ToySpec().ref)
    body = json.loads(store.objects.get(f"{ToySpec().ref}/_work/writers/{session.id}.json"))
    assert body["pid"] == os.getpid()
    assert is_alive(body)
    assert not is_alive({**body, "start": "1"})
    assert not is_alive({**body, "pid": 2**22 + 1})
    assert is_alive({**body, "pid": 2**22 + 1, "machine": "another"})  # cannot be known from here before the lease is over
    assert not is_alive({**body, "pid": 2**22 + 1, "machine": "another", "beat": time.time() - 1000})
    session.close(keep=True)
    assert not is_alive(json.loads(store.objects.get(f"{ToySpec().ref}/_work/writers/{session.id}.json")))


def test_two_forced_runs_at_the_same_time_move_the_old_artifact_once(root, log, monkeypatch):
    store, spec = Store(root), ToySpec()
    fill(spec, store, log)
    old = store.artifact(spec.ref).manifest
    other = Store(root)
    real = Store._set_aside

    def slower(self, ref):
        other.quarantine(ref)  # the other run is faster, between this one's look and its move
        with other.write(spec) as writer:
            writer.write_bytes("a.bin", b"new work")
        real(self, ref)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_set_aside", lambda self, ref: (patch.undo(), slower(self, ref)))
        assert store.quarantine(spec.ref) == old
    assert store.artifact(spec.ref).state in (State.ABSENT, State.PARTIAL)
    fill(spec, store, log)
    assert store.artifact(spec.ref).verify() == []
