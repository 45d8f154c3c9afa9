"""Only whole checkpoints that nobody writes to any more count."""

import json
import shutil
import time
from pathlib import Path

import pytest

from stagediff.watch.complete import State, judge
from stagediff.watch.places import FolderFiles

from .conftest import age

NOW = time.time()


def state(folder: Path, **options) -> State:
    return judge(FolderFiles(folder), **{"quiet": 60, "now": time.time(), **options}).state


def why(folder: Path, **options) -> str:
    return judge(FolderFiles(folder), **{"quiet": 60, "now": time.time(), **options}).why


def test_what_the_trainer_has_finished_counts_at_once(save):
    assert state(save(1)) is State.COMPLETE


def test_without_a_proof_it_counts_when_announced_or_after_the_quiet_time(save):
    folder = save(1, done=False)
    assert state(folder) is State.SETTLING
    assert "counts after 60 s" in why(folder)
    assert state(folder, announced=True) is State.COMPLETE
    assert state(age(folder)) is State.COMPLETE


def test_a_trainers_state_that_is_being_written_proves_nothing(save):
    folder = save(1)
    (folder / "trainer_state.json").write_text('{"global_step": 1')
    assert state(folder) is State.SETTLING


@pytest.mark.parametrize("announced", [False, True])
def test_every_cut_of_the_weights_is_seen(save, announced):
    folder = save(1)
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 4, 8, header // 2, header, header + 1, len(whole) - 1, len(whole) + 1):
        (folder / "model.safetensors").write_bytes((whole + b"\0")[:size])
        assert state(folder, announced=announced) is State.SETTLING, size
        assert state(age(folder), announced=announced) is State.REFUSED, size
        assert "model.safetensors" in why(folder)
    (folder / "model.safetensors").write_bytes(whole)
    assert state(folder) is State.COMPLETE


def test_all_shards_of_the_index_have_to_be_there_and_whole(save):
    folder = save(1, shard="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert state(folder) is State.COMPLETE
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(last[:-1])
    assert state(folder) is State.SETTLING
    shards[-1].unlink()
    assert "1 of its" in why(folder)
    assert state(age(folder)) is State.REFUSED
    shards[-1].write_bytes(last)
    assert state(folder) is State.COMPLETE
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')
    assert state(folder) is State.SETTLING


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"optimizer.pt": b"x", "trainer_state.json": b"{}"}, "holds no config.json"),
        ({"config.json": b"{}", "pytorch_model_fsdp.bin": b"x", "trainer_state.json": b"{}"}, "no weights"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "PEFT adapter, not a model"),
        ({"config.json": b"{", "model.safetensors": b"x"}, "cannot be read"),
    ],
)
def test_what_holds_no_model_is_refused_with_the_reason_but_only_when_it_is_quiet(tmp_path, files, says):
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    assert state(tmp_path) is State.SETTLING
    age(tmp_path)
    assert state(tmp_path) is State.REFUSED
    assert says in why(tmp_path)


def test_an_adapter_counts_where_adapters_are_wanted(save, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert state(age(tmp_path / "a"), adapters=True) is State.REFUSED
    shutil.copy(save(1) / "model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    assert state(tmp_path / "a", adapters=True) is State.SETTLING
    assert state(age(tmp_path / "a"), adapters=True) is State.COMPLETE


def test_old_weight_files_count_once_they_are_quiet(save):
    folder = save(1, done=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert state(folder) is State.SETTLING
    assert state(age(folder)) is State.COMPLETE


def test_a_folder_that_goes_away_is_no_error(save):
    folder = save(1)
    files = FolderFiles(folder)
    shutil.rmtree(folder)
    assert judge(files, quiet=0, now=NOW).state is State.SETTLING


def test_the_real_trainer_writes_its_state_last(save, tmp_path):
    """What `judge` trusts: whatever the Trainer saves into a checkpoint is there when trainer_state.json is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    seen: list[set[str]] = []

    class Spy(Trainer):
        def _save_rng_state(self, folder):
            super()._save_rng_state(folder)
            seen.append({p.name for p in Path(folder).iterdir()})

    model = save(1)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(model, pad_token="<eos>")
    Spy(AutoModelForCausalLM.from_pretrained(model), arguments, train_dataset=rows, processing_class=tokenizer).train()
    for before, folder in zip(seen, (tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2"), strict=True):
        assert {"config.json", "model.safetensors", "tokenizer.json", "optimizer.pt"} <= before
        assert {p.name for p in folder.iterdir()} - before == {"trainer_state.json"}
        assert state(folder) is State.COMPLETE
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"]
