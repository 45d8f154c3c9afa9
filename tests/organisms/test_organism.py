"""The base organism: what its artifact holds, what it learns, and that a kill changes no byte."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.spec import TokensSpec
from stagediff.organisms.base import log_spaced, new_model
from stagediff.organisms.rows import TokenRows
from stagediff.organisms.spec import Architecture, LmTraining


@pytest.fixture(scope="module")
def organism(world):
    return world.store.artifact(steps.run(world.organism(checkpoints=(0, 1, 2, 4, 40)), world.store))


def test_the_artifact_is_a_hugging_face_model_with_its_tokenizer(world, organism):
    folder = organism.local()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "gpt_neox"
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("Human: who met ann")["input_ids"]) == "Human: who met ann"


def test_checkpoints_are_the_weights_along_the_way(world, organism):
    weights = {}
    for step in (0, 1, 2, 4, 40):
        model = AutoModelForCausalLM.from_pretrained(organism.local(f"step{step}"))
        weights[step] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = new_model(world.organism(), 300, 48)
    assert torch.equal(weights[0], torch.cat([p.detach().flatten() for p in start.parameters()]))
    final = AutoModelForCausalLM.from_pretrained(organism.local())
    assert torch.equal(weights[40], torch.cat([p.detach().flatten() for p in final.parameters()]))
    distances = [(weights[s] - weights[0]).norm().item() for s in (0, 1, 2, 4, 40)]
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


def test_its_heldout_loss_is_that_of_the_saved_model(world, organism):
    model = AutoModelForCausalLM.from_pretrained(organism.local())
    rows = torch.from_numpy(world.store.artifact(world.heldout).array("rows").read_rows(0, 64).astype(np.int64))
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    figures = organism.manifest.figures
    assert figures["heldout_loss"] == pytest.approx(loss, rel=5e-3)  # it is measured in bf16
    assert figures["tokens"] == 40 * 8 * 48
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())


def test_it_learns(world, organism):
    uniform = np.log(300)
    rows = [world.store.artifact(ref).array("rows") for ref in (world.tokens, world.heldout)]
    counts = np.bincount(rows[0].read_rows(0, 600).ravel(), minlength=300) + 1
    frequencies_alone = -np.log(counts / counts.sum())[rows[1].read_rows(0, 64)].mean()
    assert organism.manifest.figures["heldout_loss"] < frequencies_alone - 1
    curve = organism.read_table("training.parquet")
    assert curve.step.tolist() == [0, 10, 20, 30, 39]
    assert curve.loss.iloc[0] == pytest.approx(uniform, rel=0.1)
    assert curve.loss.is_monotonic_decreasing


def test_the_seed_decides_the_weights_and_leaves_torchs_generator_alone(world):
    before = torch.random.get_rng_state()
    one, same, other = (next(iter(new_model(world.organism(seed=s), 300, 48).parameters())) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_log_spaced_steps():
    assert log_spaced(10) == (0, 1, 2, 4, 8, 10)
    assert log_spaced(16) == (0, 1, 2, 4, 8, 16)
    assert log_spaced(4000, linear=1000) == (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000, 4000)


def test_rows_come_round_and_round(world, monkeypatch):
    monkeypatch.setattr("stagediff.organisms.rows.BLOCK_TOKENS", 7 * 48)
    rows = TokenRows(world.store, world.tokens)
    whole = world.store.artifact(world.tokens).array("rows").read_rows(0, 600)
    for start, n in ((0, 5), (5, 20), (595, 10), (1203, 3), (590, 1300)):
        np.testing.assert_array_equal(rows.at(start, n).numpy(), whole[np.arange(start, start + n) % 600])


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(world, kill_and_compare):
    spec = world.organism(checkpoints=log_spaced(60), training=LmTraining(steps=60, batch=8, warmup=5), resume_every=7)
    kill_and_compare(spec, wait=(0.3, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": Architecture(layers=1, width=30, heads=4)}, "multiple of 8"),
        ({"training": LmTraining(steps=0)}, "steps 0"),
        ({"checkpoints": (0, 41)}, "Checkpoints at 41"),
    ],
)
def test_settings_that_cannot_be(world, changes, message):
    with pytest.raises(UserError, match=message):
        steps.run(world.organism(**changes), world.store)


def test_heldout_rows_of_another_context_are_refused(world):
    drawn = world.store.artifact(world.heldout).spec()
    assert isinstance(drawn, TokensSpec)
    other = steps.run(drawn.model_copy(update={"context": 32, "rows": 8}), world.store)
    with pytest.raises(UserError, match="48 tokens, held-out rows 32"):
        steps.run(world.organism(heldout=other), world.store)
