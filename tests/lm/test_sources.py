"""Sources: what a user's words mean, as digests, and mistakes told before any work."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stagediff import digest
from stagediff.errors import UserError
from stagediff.lm import sources
from stagediff.lm.spec import HookPoint, ModelSource
from stagediff.spec import Ref


def test_a_folders_digest_is_its_contents_not_its_place(save_tiny: Any, tmp_path: Path) -> None:
    folder = save_tiny("gpt_neox")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("says nothing about the model")
    one, two = sources.resolve_model(name=str(folder)), sources.resolve_model(name=str(copy))
    assert one.digest == two.digest
    assert one.identity() == two.identity()
    other = save_tiny("gpt_neox", "other", seed=1)
    assert sources.resolve_model(name=str(other)).digest != one.digest


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_change_of_config_weights_or_tokenizer_changes_the_digest(save_tiny: Any, file: str) -> None:
    folder = save_tiny("gpt_neox", tokenizer=True)
    before = sources.resolve_model(name=str(folder))
    body = bytearray((folder / file).read_bytes())
    body[-2] ^= 1
    (folder / file).write_bytes(body)
    assert sources.resolve_model(name=str(folder)).digest != before.digest
    with pytest.raises(UserError, match="has changed since this run was planned"):
        sources.check_unchanged(before)


def test_sharded_weights_all_count(save_tiny: Any, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    tiny("llama").save_pretrained(folder, max_shard_size="40KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    before = sources.resolve_model(name=str(folder)).digest
    body = bytearray(parts[-1].read_bytes())
    body[-1] ^= 1
    parts[-1].write_bytes(body)
    assert sources.resolve_model(name=str(folder)).digest != before


def test_an_adapter_is_part_of_the_digest(save_tiny: Any, tmp_path: Path) -> None:
    folder = save_tiny("llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no PEFT adapter"):
        sources.resolve_model(name=str(folder), adapter=str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"1")
    plain = sources.resolve_model(name=str(folder))
    first = sources.resolve_model(name=str(folder), adapter=str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"2")
    assert len({plain.digest, first.digest, sources.resolve_model(name=str(folder), adapter=str(adapter)).digest}) == 3


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./nowhere", "There is no folder"),
        ("/nowhere/at/all", "There is no folder"),
        ("nobody/nothing-of-this-name", "nobody/nothing-of-this-name"),
    ],
)
def test_a_name_that_nobody_knows_is_one_paragraph(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=says) as error:
        sources.resolve_model(name=name)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_models_say_what_is_missing(save_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        sources.resolve_model(name=str(tmp_path / "empty"))
    folder = save_tiny()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        sources.resolve_model(name=str(folder))
    with pytest.raises(UserError, match="holds no tokenizer"):
        sources.resolve_tokenizer(name=str(folder))
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UserError, match="give this folder as `adapter:`"):
        sources.resolve_model(name=str(folder))


class FakeHub:
    """Stands in for the hub's client: one repository at one commit, or nobody there."""

    def __init__(self, folder: Path, commit: str):
        self.folder, self.commit, self.up = folder, commit, True

    def model_info(self, name: str, revision: str | None = None, timeout: float = 0) -> Any:
        if not self.up:
            raise ConnectionError("no route")
        return type("Info", (), {"sha": self.commit})()

    def snapshot_download(self, name: str, revision: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert revision == self.commit
        return str(self.folder)

    def hf_hub_download(self, name: str, file: str, revision: str | None, local_files_only: bool) -> str:
        assert local_files_only
        return str(self.folder / file)


def test_a_hub_name_is_pinned_to_its_commit(save_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = save_tiny("gpt_neox", commit, tokenizer=True)  # the cache's snapshot folders are named by commit
    hub = FakeHub(folder, commit)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    source = sources.resolve_model(name="owner/model", revision="main")
    assert (source.name, source.revision, source.digest) == ("owner/model", commit, f"commit:{commit}")
    hub.up = False  # the network is gone: the cache still knows
    assert sources.resolve_model(name="owner/model", revision="main") == source
    # the same tokenizer from the hub and from a folder is the same tokenizer
    assert sources.resolve_tokenizer(name="owner/model").digest == sources.resolve_tokenizer(name=str(folder)).digest


def test_models_that_belong_together_pass(save_tiny: Any) -> None:
    base, tuned = save_tiny("llama", "base", tokenizer=True), save_tiny("llama", "tuned", seed=1, tokenizer=True)
    a, b = sources.resolve_model(name=str(base)), sources.resolve_model(name=str(tuned))
    settings = json.loads((tuned / "tokenizer_config.json").read_text())
    (tuned / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    sources.check_models(a, b)
    sources.check_models(a, ModelSource(artifact=Ref("models/" + "0" * 20)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "layers 4.*layers 3"),
        ({"hidden_size": 64}, "hidden size 32.*64"),
        ({"vocab_size": 98}, "vocabulary 97.*98"),
    ],
)
def test_models_of_other_shapes_are_refused_by_name(save_tiny: Any, changes: dict[str, int], says: str) -> None:
    a = sources.resolve_model(name=str(save_tiny("qwen2", "base")))
    folder = save_tiny("qwen2", "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    b = sources.resolve_model(name=str(folder))
    with pytest.raises(UserError, match=says) as error:
        sources.check_models(a, b)
    assert str(folder) in str(error.value)
    assert str(a.name) in str(error.value)


def test_models_with_other_tokenizers_are_refused(save_tiny: Any, tokenizer_into: Any) -> None:
    base, tuned = save_tiny("llama", "base", tokenizer=True), save_tiny("llama", "tuned")
    tokenizer_into(tuned, words=50)
    with pytest.raises(UserError, match="do not share a tokenizer"):
        sources.check_models(sources.resolve_model(name=str(base)), sources.resolve_model(name=str(tuned)))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma3"])
def test_layers_are_counted_from_the_config_alone(save_tiny: Any, family: str) -> None:
    source = sources.resolve_model(name=str(save_tiny(family)))
    sources.check_hook(source, HookPoint(layer=3))
    with pytest.raises(UserError, match="layers 0 to 3"):
        sources.check_hook(source, HookPoint(layer=4))
    sources.check_hook(ModelSource(artifact=Ref("models/" + "0" * 20)), HookPoint(layer=99))


def test_resolving_needs_neither_torch_nor_transformers(save_tiny: Any) -> None:
    import subprocess
    import sys

    folder = save_tiny("gpt_neox", tokenizer=True)
    code = (
        "import sys; from stagediff.lm import sources; from stagediff.lm.spec import HookPoint\n"
        f"s = sources.resolve_model(name={str(folder)!r}); sources.resolve_tokenizer(name=s.name); sources.check_hook(s, "
        "HookPoint(layer=1)); sources.check_models(s, s)\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_big_files_digest_is_remembered_until_it_changes(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    file = tmp_path / "big.bin"
    file.write_bytes(b"a" * (digest.SMALL + 1))
    old = file.stat().st_mtime - 100
    os.utime(file, (old, old))
    want = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest.file_digest(file) == want
    assert len(list((own_cache / "digests").iterdir())) == 1
    reads: list[int] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, n: reads.append(1) or real(f, n))
    assert digest.file_digest(file) == want
    assert not reads
    file.write_bytes(b"b" * (digest.SMALL + 1))  # the same size, another time
    assert digest.file_digest(file) == hashlib.sha256(b"b" * (digest.SMALL + 1)).hexdigest()
    assert reads


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "big.bin"
    file.write_bytes(b"a" * (digest.SMALL + 1))
    digest.file_digest(file)
    assert not (own_cache / "digests").exists()


def test_a_cache_that_cannot_be_written_costs_only_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("STAGEDIFF_CACHE", str(blocked))
    file = tmp_path / "big.bin"
    file.write_bytes(b"a" * (digest.SMALL + 1))
    os.utime(file, (1e9, 1e9))
    assert len(digest.file_digest(file)) == 64
    with pytest.raises(UserError, match="cannot be read"):
        digest.file_digest(tmp_path / "missing.bin")


def test_many_files_are_known_by_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    both = digest.files_digest([tmp_path / "b", tmp_path / "a"], tmp_path)
    assert both == digest.files_digest([tmp_path / "a", tmp_path / "b"], tmp_path)
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").write_text("1")
    assert digest.files_digest([tmp_path / "a", tmp_path / "b"], tmp_path) != both
