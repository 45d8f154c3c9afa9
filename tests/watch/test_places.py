"""Where checkpoints are found: folders, buckets, hub repositories."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagediff.errors import UserError
from stagediff.lm import sources
from stagediff.lm.models import load_model, load_tokenizer
from stagediff.store.objects import open_objects
from stagediff.watch.complete import State, judge
from stagediff.watch.config import WatchConfig
from stagediff.watch.places import Place, open_place

from .conftest import age


def place(**settings: Any) -> Place:
    return open_place(WatchConfig(**settings))


def states(found: Any, **options: Any) -> dict[int, State]:
    import time

    return {step: judge(files, **{"quiet": 60, "now": time.time(), **options}).state for step, files in found.items()}


def upload(folder: Path, url: str, only: str = "") -> None:
    objects = open_objects(url)
    for file in sorted(folder.iterdir()):
        if not only or file.name == only:
            objects.put(file.name, file.read_bytes())


def test_a_folders_checkpoints_come_in_the_order_of_their_steps(save, tmp_path):
    for step in (100, 9, 20):
        save(step)
    (tmp_path / "lm" / "checkpoint-x").mkdir()
    (tmp_path / "lm" / "checkpoint-30.partial").mkdir()
    (tmp_path / "lm" / "checkpoint-040").mkdir()
    (tmp_path / "lm" / "checkpoint-50").write_text("no folder")
    found = place(source=str(tmp_path / "lm")).find()
    assert list(found) == [9, 20, 100]
    assert str(found[9]) == str(tmp_path / "lm" / "checkpoint-9")


@pytest.mark.parametrize("template", ["run/step{step}/hf", "run.{step}", "a+b/{step}-final"])
def test_any_template_finds_them(save, tmp_path, template):
    save(0, folder=template)
    save(12, folder=template)
    found = place(source=str(tmp_path / template)).find()
    assert states(found) == {0: State.COMPLETE, 12: State.COMPLETE}


def test_a_training_that_has_not_begun_has_no_checkpoints(tmp_path):
    assert place(source=str(tmp_path / "nothing" / "yet")).find() == {}


def test_a_place_that_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"watch\.source .* cannot be listed"):
        place(source=str(tmp_path / "file")).find()


def test_a_buckets_checkpoints_are_judged_by_their_heads(save, s3_root):
    whole = save(1, shard="20KB")
    upload(whole, f"{s3_root}/checkpoint-10")
    upload(whole, f"{s3_root}/checkpoint-9", only="config.json")
    open_objects(s3_root).put("checkpoint-9/deeper/optimizer", b"1")
    found = place(source=s3_root).find()
    assert list(found) == [9, 10]
    assert states(found) == {9: State.SETTLING, 10: State.SETTLING}  # on S3 the Trainer's state may be uploaded before the weights
    assert states(found, quiet=0) == {9: State.REFUSED, 10: State.COMPLETE}
    assert states(found, announced=True) == {9: State.SETTLING, 10: State.COMPLETE}
    shard = sorted(whole.glob("model-*.safetensors"))[1]
    open_objects(s3_root).put(f"checkpoint-10/{shard.name}", shard.read_bytes()[:-3])
    verdict = judge(place(source=f"{s3_root}/checkpoint-{{step}}").find()[10], quiet=0, now=2e9)
    assert verdict.state is State.REFUSED
    assert shard.name in verdict.why


def test_a_bucket_that_is_absent_or_closed_is_told_in_a_users_words(s3_root, strict_s3_endpoint, monkeypatch):
    with pytest.raises(UserError, match=r"watch\.source 's3://absent-bucket/run/.*The bucket 'absent-bucket'.* does not exist"):
        place(source="s3://absent-bucket/run").find()
    with pytest.raises(UserError, match="names no bucket"):
        place(source="s3://{step}/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", strict_s3_endpoint)
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as error:
        place(source="s3://some-bucket/run").find()
    assert "The store" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="does not answer"):
        place(source="s3://some-bucket/run").find()


def test_a_model_on_s3_is_the_same_model_as_in_a_folder(save, s3_root, own_cache, monkeypatch):
    monkeypatch.setattr("stagediff.store.remote._modified", lambda info: 0.0)  # all in one second: S3 counts no finer
    folder, url = save(3), f"{s3_root}/checkpoint-3"
    upload(folder, url)
    local, remote = sources.resolve_model(name=str(folder)), sources.resolve_model(name=url)
    assert remote.digest == local.digest
    assert remote.name == url
    assert sources.resolve_tokenizer(name=url).digest == sources.resolve_tokenizer(name=str(folder)).digest
    loaded = load_model(remote)
    for name, tensor in load_model(local).model.state_dict().items():
        assert tensor.equal(loaded.model.state_dict()[name])
    assert load_tokenizer(sources.resolve_tokenizer(name=url)).vocab_size == 97
    assert not list(own_cache.rglob("trainer_state.json"))  # only what makes the model is copied
    # new weights under the same name are seen
    upload(save(4), url, only="model.safetensors")
    with pytest.raises(UserError, match="has changed since this run was planned"):
        load_model(remote)


def test_a_url_without_a_model_is_told(s3_root, save):
    with pytest.raises(UserError, match="There is no model below"):
        sources.resolve_model(name=f"{s3_root}/checkpoint-5")
    upload(save(1), f"{s3_root}/checkpoint-6", only="config.json")
    with pytest.raises(UserError, match="no weights"):
        sources.resolve_model(name=f"{s3_root}/checkpoint-6")


def test_what_changes_while_it_is_copied_is_refused(save, s3_root, monkeypatch, own_cache):
    from stagediff.store.remote import RemoteObjects

    folder, url = save(3), f"{s3_root}/checkpoint-3"
    upload(folder, url)
    real = RemoteObjects.download

    def download(self: RemoteObjects, key: str, path: Path) -> None:
        real(self, key, path)
        self.put("config.json", (folder / "config.json").read_bytes() + b" ")

    monkeypatch.setattr(RemoteObjects, "download", download)
    with pytest.raises(UserError, match="changed while it was copied"):
        sources.resolve_model(name=url)
    assert not list(own_cache.rglob("model.safetensors"))


@pytest.fixture
def hub_cache(save, tmp_path, monkeypatch) -> Path:
    """The local cache of the hub with three revisions of one repository, the last of them half there, and a branch that is no step."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for step, ref in ((1, "step1"), (2, "step2"), (3, "step3"), (2, "main")):
        commit = f"{step:040x}"
        (repository / "refs" / ref).write_text(commit)
        if not (repository / "snapshots" / commit).exists():
            shutil.copytree(save(step), repository / "snapshots" / commit)
    (repository / "snapshots" / f"{3:040x}" / "model.safetensors").unlink()
    return repository


def test_a_hub_repositorys_revisions_are_found_in_the_local_cache(hub_cache):
    found = place(source="owner/model", revision="step{step}").find()
    assert states(found) == {1: State.COMPLETE, 2: State.COMPLETE, 3: State.REFUSED}
    assert (found[2].name, found[2].revision) == ("owner/model", f"{2:040x}")


def test_the_hubs_answer_goes_before_the_cache(hub_cache, monkeypatch):
    class Api:
        """Two branches and a tag; the files of a commit as the hub lists them."""

        def list_repo_refs(self, name: str) -> Any:
            def ref(name: str, step: int) -> Any:
                return SimpleNamespace(name=name, target_commit=f"{step:040x}")

            return SimpleNamespace(branches=[ref("main", 5), ref("step5", 5)], tags=[ref("step6", 6)])

        def list_repo_tree(self, name: str, revision: str, recursive: bool) -> list[Any]:
            files = [SimpleNamespace(path="config.json", size=2), SimpleNamespace(path="folder", tree_id="1")]
            return files + ([SimpleNamespace(path="model.safetensors", size=10)] if revision == f"{5:040x}" else [])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config = hub_cache / "config.json"
    config.write_text(json.dumps({"model_type": "gpt_neox"}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(config))
    found = place(source="owner/model", revision="step{step}").find()
    config.write_text("{}")
    assert states(found) == {5: State.COMPLETE, 6: State.REFUSED}


def test_a_repository_that_nobody_knows_is_told(hub_cache):
    with pytest.raises(UserError, match="nobody/nothing"):
        place(source="nobody/nothing", revision="step{step}").find()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": " "}, "source is empty"),
        ({"source": "a/{step}/{step}"}, "more than once"),
        ({"source": "a/b{step}", "revision": "step{step}"}, "both tell the step"),
        ({"source": "a/b", "revision": "main"}, "should hold {step} once"),
        ({"source": "a", "every": 0}, "greater than or equal to 1"),
        ({"source": "a", "evry": 9}, "Extra inputs"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        WatchConfig(**settings)


def test_an_old_checkpoint_needs_no_proof(save, tmp_path):
    age(save(1, done=False))
    assert states(place(source=str(tmp_path / "lm")).find()) == {1: State.COMPLETE}
