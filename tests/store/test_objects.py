"""The blob layer, on disk and on S3: atomic, create-only, and clear about faults."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from stagediff.errors import StagediffError, UserError
from stagediff.store import Store
from stagediff.store.objects import Objects, open_objects


@pytest.fixture
def objects(root) -> Objects:
    return open_objects(root)


def test_bytes_come_back_whole_and_in_part(objects):
    objects.put("a/b.bin", b"0123", memoryview(b"456"), b"789")
    assert objects.get("a/b.bin") == b"0123456789"
    assert objects.size("a/b.bin") == 10
    first, second = bytearray(3), bytearray(4)
    objects.read_into("a/b.bin", 2, [memoryview(first), memoryview(second)])
    assert (bytes(first), bytes(second)) == (b"234", b"5678")
    for offset, length in ((8, 3), (10, 1), (50, 2)):
        with pytest.raises(EOFError):
            objects.read_into("a/b.bin", offset, [memoryview(bytearray(length))])
    objects.put("a/b.bin", b"new")
    assert objects.get("a/b.bin") == b"new"


def test_what_is_not_there_says_so(objects):
    assert objects.size("nothing") is None
    assert objects.entries("nothing") == {}
    assert objects.folders("nothing") == []
    objects.delete("nothing")
    objects.delete_tree("nothing")
    with pytest.raises(FileNotFoundError):
        objects.get("nothing")
    with pytest.raises(FileNotFoundError):
        objects.read_into("nothing", 0, [memoryview(bytearray(1))])


def test_listings_are_never_stale(objects):
    for i in range(3):
        objects.put(f"kind/key/{i}/x", b"1" * i)
        assert {k: e.size for k, e in objects.entries("kind/key").items()} == {f"{j}/x": j for j in range(i + 1)}
        assert objects.folders("kind/key") == [str(j) for j in range(i + 1)]
    objects.put("kind/keyed", b"")  # not below kind/key
    assert len(objects.entries("kind/key")) == 3
    objects.delete("kind/key/1/x")
    assert set(objects.entries("kind/key")) == {"0/x", "2/x"}


def test_a_tree_moves_and_goes_as_a_whole(objects):
    for name in ("manifest.json", "a", "b/c"):
        objects.put(f"old/{name}", name.encode())
    objects.move_tree("old", "new/place", first=["manifest.json"])
    assert objects.entries("old") == {}
    assert {name: objects.get(f"new/place/{name}") for name in objects.entries("new/place")} == {
        n: n.encode() for n in ("manifest.json", "a", "b/c")
    }
    objects.delete_tree("new", first=["place/a"])
    assert objects.entries("new") == {}


def test_of_racing_creators_exactly_one_wins(objects):
    for round_ in range(5):
        wins, barrier = [], threading.Barrier(8)

        def race(i: int, round_: int = round_, wins: list = wins, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if objects.create(f"claim/{round_}", f"racer {i}".encode()):
                wins.append(i)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert objects.get(f"claim/{round_}") == f"racer {wins[0]}".encode()


def test_creating_from_a_file_keeps_what_is_there(objects, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    assert objects.create_file("x/file", tmp_path / "one")
    assert not objects.create_file("x/file", tmp_path / "two")
    objects.download("x/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"one" * 1000


def test_a_file_made_in_place_takes_the_name_its_maker_gives(objects):
    def make(path):
        path.write_bytes(b"abc")
        return "name-3"

    assert objects.put_made("folder", make) == "folder/name-3"
    assert {k: e.size for k, e in objects.entries("folder").items()} == {"name-3": 3}

    def fail(path):
        path.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        objects.put_made("folder", fail)
    assert set(objects.entries("folder")) == {"name-3"}
    assert objects.leftovers() == {}


def test_a_process_killed_while_it_writes_leaves_no_torn_object(tmp_path):
    """A put of 64 MB in small pieces, killed in the middle."""
    code = """
import sys
from stagediff.store.objects import open_objects
objects = open_objects(sys.argv[1])
objects.put("x", b"old")
print("ready", flush=True)
while True:
    objects.put("x", *[b"n" * 4096] * 4096)
"""
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        threading.Event().wait(0.05)
        process.kill()
        process.wait()
        assert open_objects(str(tmp_path)).get("x") in (b"old", b"n" * 4096 * 4096)


def test_a_forked_process_reads_too(objects, root):
    """DataLoader workers on Linux may be forks: the client of the parent is not used in them."""
    objects.put("x", b"1")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def inherited() -> None:
        queue.put(objects.get("x"))

    process = context.Process(target=inherited)
    process.start()
    try:
        assert queue.get(timeout=30) == b"1"
    finally:
        process.kill()
        process.join()


# Faults of a remote store


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr("stagediff.store.remote._FIRST_PAUSE", 0.01)


class Faulty:
    """Stands before a method of the client: fails the first `times` calls, before or after the call takes effect."""

    def __init__(self, real, times: int, error: Exception, after: bool = False):
        self.real, self.times, self.error, self.after, self.calls = real, times, error, after, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls <= self.times:
            if self.after:
                self.real(*args, **kwargs)
            raise self.error
        return self.real(*args, **kwargs)


def test_a_lost_reply_to_ones_own_create_is_a_win(s3_root, fast, monkeypatch):
    objects = open_objects(s3_root)
    faulty = Faulty(objects._fs.pipe_file, 1, ConnectionResetError("reply lost"), after=True)
    monkeypatch.setattr(objects._fs, "pipe_file", faulty)
    assert objects.create("claim", b"mine")
    assert faulty.calls == 2
    assert not objects.create("claim", b"another's")


def test_a_fault_that_passes_is_retried(s3_root, fast, monkeypatch):
    objects = open_objects(s3_root)
    faulty = Faulty(objects._fs.pipe_file, 4, OSError(errno.EBUSY, "Reduce your request rate"))
    monkeypatch.setattr(objects._fs, "pipe_file", faulty)
    objects.put("x", b"1")
    assert faulty.calls == 5
    assert objects.get("x") == b"1"


def test_a_fault_that_lasts_is_a_clear_error(s3_root, fast, monkeypatch):
    objects = open_objects(s3_root, retry_seconds=0.2)
    monkeypatch.setattr(objects._fs, "pipe_file", Faulty(None, 10**9, OSError(errno.EBUSY, "Service Unavailable")))
    with pytest.raises(StagediffError, match=r"could not write x.*Service Unavailable.*Run again"):
        objects.put("x", b"1")


def test_a_refusal_is_not_retried(s3_root, monkeypatch):
    objects = open_objects(s3_root)
    faulty = Faulty(None, 10**9, PermissionError("Access Denied"))
    monkeypatch.setattr(objects._fs, "pipe_file", faulty)
    with pytest.raises(UserError, match="refused to write x"):
        objects.put("x", b"1")
    assert faulty.calls == 1


def test_a_truncated_answer_is_not_taken_for_data(s3_root, monkeypatch):
    objects = open_objects(s3_root)
    objects.put("x", b"0123456789")
    monkeypatch.setattr(objects._fs, "cat_file", lambda *args, **kwargs: b"012")
    with pytest.raises(EOFError):
        objects.read_into("x", 0, [memoryview(bytearray(5))])


@pytest.mark.slow
def test_an_upload_in_parts_is_create_only_too(s3_root, tmp_path):
    objects = open_objects(s3_root)
    path = tmp_path / "big"
    path.write_bytes(os.urandom(1 << 20) * 110)  # s3fs sends 110 MiB in parts
    assert objects.create_file("big", path)
    assert not objects.create_file("big", path)
    assert objects.size("big") == 110 << 20
    assert objects.leftovers() == {}


def test_a_bucket_that_does_not_exist_is_named(s3_root):
    store = Store("s3://there-is-no-such-bucket/x")
    with pytest.raises(UserError, match="'there-is-no-such-bucket'.*does not exist"):
        store.refs()
    with pytest.raises(UserError, match="does not exist"):
        _ = store.artifact("toys/" + "0" * 20).state


def test_no_credentials_is_a_clear_error(s3_root, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"No credentials.*AWS_ACCESS_KEY_ID"):
        Store(s3_root).refs()


def test_wrong_credentials_are_a_clear_error(strict_s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", strict_s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(UserError, match=r"refused to open.*InvalidAccessKeyId"):
        Store("s3://bucket/x").refs()


@pytest.mark.slow
def test_a_dead_endpoint_is_a_clear_error(s3_root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"does not answer.*AWS_ENDPOINT_URL"):
        Store(s3_root).refs()


def test_a_url_without_a_bucket_or_of_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="names no bucket"):
        Store("s3://")
    with pytest.raises(UserError, match="cannot be opened"):
        Store("nonsense://bucket/x").refs()
