"""Wrong stores, through the command: one paragraph that names the store and what to do, and no secret in it."""

import os
import time
from pathlib import Path

import pytest
from tiny import tiny_config
from toystep import ToySpec
from wrong import refused, stagediff

from stagediff.errors import UserError
from stagediff.store import Store


@pytest.fixture
def config(tmp_path) -> Path:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_config(str(tmp_path / "store"))))
    return path


def test_a_bucket_that_does_not_exist(s3_root, config):
    for command in ("plan", "run"):
        refused(stagediff(command, config, "--store", "s3://no-such-bucket/x"), r"bucket 'no-such-bucket'.*does not exist\. Create it")
    refused(stagediff("ls", "s3://no-such-bucket/x"), "does not exist")


def test_bad_credentials_are_refused_without_showing_the_secret(strict_s3_endpoint, config, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", strict_s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-show-me")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    said = refused(stagediff("run", config, "--store", "s3://bucket/x"), r"s3://bucket/x refused to open.*Check AWS_ACCESS_KEY_ID")
    assert "do-not-show-me" not in said


def test_credentials_in_the_url_are_refused_and_not_repeated(config):
    said = refused(
        stagediff("plan", config, "--store", "s3://me:do-not-show-me@bucket/x"), "must not hold credentials.*Set AWS_ACCESS_KEY_ID"
    )
    assert "do-not-show-me" not in said


def test_an_endpoint_that_is_no_url(s3_root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    refused(stagediff("ls", s3_root), "Invalid endpoint: nonsense.*AWS_ENDPOINT_URL")


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("", "name is empty. Expected a folder"),
        ("s3:/bucket/x", "slash missing. Expected"),
        ("s3://", r"names no bucket. Expected something like s3://bucket"),
        ("nonsense://bucket/x", "cannot be opened.*Use a local path"),
    ],
)
def test_a_store_that_cannot_be(config, store, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(stagediff("run", config, "--store", store), words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("place", "words"),
    [("file/store", "a file stands in its way: .*file.*Choose another"), ("/proc/store", "cannot be made.*Choose another")],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(config, tmp_path, place, words):
    (tmp_path / "file").write_text("x")
    refused(stagediff("run", config, "--store", tmp_path / place), words)


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_a_mistyped_store_is_not_taken_for_an_empty_one(tmp_path, command):
    refused(stagediff(command, tmp_path / "rnus"), r"rnus does not exist\. Give the folder")
    (tmp_path / "file").write_text("x")
    refused(stagediff(command, tmp_path / "file"), "file is a file")
    assert not (tmp_path / "rnus").exists()


def test_a_folder_that_is_no_store_is_nothing_to_verify(tmp_path):
    refused(stagediff("verify", tmp_path), "holds no artifacts")
    assert "holds no artifacts" in stagediff("ls", tmp_path).stdout


def test_garbage_collection_in_a_wrong_folder_touches_nothing(tmp_path):
    other = tmp_path / "downloads" / "film.partial"
    other.parent.mkdir()
    other.write_bytes(b"half")
    os.utime(other, (time.time() - 10**6,) * 2)
    assert stagediff("gc", tmp_path, "--older-than", 0).exit_code == 0
    assert other.exists()


def test_a_disk_that_fills_up_under_a_library_that_writes_by_itself(tmp_path):
    store = Store(tmp_path)

    def save() -> None:
        with store.write(ToySpec()) as writer:
            writer.scratch()
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(UserError, match=r"_scratch/.*the disk is full.*continues where it stopped"):
        save()
    assert not store.artifact(ToySpec().ref).is_complete
