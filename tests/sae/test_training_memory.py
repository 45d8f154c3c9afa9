"""`stagediff plan` predicts a training's memory: checked against the tensors that a training holds."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from peak import peak_mib

from stagediff import steps
from stagediff.sae.estimate import AT_ONCE, CHUNK, figures_memory, step_memory, training_memory
from stagediff.sae.initial import fresh
from stagediff.sae.parallel import Team
from stagediff.sae.sharded import Shards
from stagediff.sae.sparse.engine import CHUNK_BYTES
from stagediff.sae.spec import Budget, DictionaryConfig, TrainSpec
from stagediff.sae.train import EVALUATED_VALUES, FEWEST_TOKENS
from stagediff.sae.trainer import Trainer


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_what_a_training_holds_between_steps_is_what_is_predicted(architecture, ranks, monkeypatch):
    """Tensors that are alive after a step, with its gradients: predicted to 3 percent, without what belongs to a batch."""
    d, features, batch = 64, 4096, 8
    config = DictionaryConfig(architecture=architecture, features=features, k=4, auxk=0 if architecture == "topk" else None)
    spec = SimpleNamespace(budget=Budget(tokens=batch, batch=batch), compute="bf16")
    sae = fresh(config, 1.0, torch.zeros(d), seed=0)
    team = Team()
    if ranks > 1:  # the first of four, which no others answer
        team = Shards(features)
        team.size, team.own_features = ranks, features // ranks
        monkeypatch.setattr(Shards, "total", lambda self, value: value)
        monkeypatch.setattr(Shards, "_least", lambda self, keys, k: keys.amin(1))
    trainer = Trainer(team.own(sae), spec.budget, 1, True, torch.bfloat16, team=team)
    del sae
    outcome = trainer.train_on(torch.randn(batch, d))
    gc.collect()
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() > d
    }
    own = features // ranks
    held = sum(size for size in seen.values() if size >= 2 * own * d and size % (2 * own * d) == 0)
    copies = 4 * own * d if architecture == "relu" and ranks > 1 else 0  # dense steps make them anew
    batch_part = step_memory(spec, config.model_copy(update={"features": 0}), d, ranks, "features")
    predicted = step_memory(spec, config, d, ranks, "features") - batch_part
    assert held + copies == pytest.approx(predicted, rel=0.03)
    assert outcome.gradients


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_a_steps_gradients_are_gone_before_the_next_ones_come(architecture, store, stored, planted, quiet, monkeypatch):
    """Kernels of their own memory use it again; on a GPU they take new memory for every step."""
    monkeypatch.setenv("STAGEDIFF_KERNELS", "reference")
    held, seen, real = [], [], Trainer.train_on

    def looks(self, x):
        seen.append(any(gradient() is not None for gradient in held))
        outcome = real(self, x)
        held[:] = [weakref.ref(gradient) for gradient in outcome.gradients.values()]
        return outcome

    monkeypatch.setattr(Trainer, "train_on", looks)
    data = stored(store, planted(1024, 24, 32)[0])
    dictionary = DictionaryConfig(architecture=architecture, features=40, k=4)
    steps.run(TrainSpec(data=data, budget=Budget(tokens=64 * 8, batch=64), dictionary=dictionary), store, device="cpu", progress=quiet)
    assert seen == [False] * 8


def test_a_wide_dictionary_fits_eight_gpus_and_not_one():
    """F 262,144 at d 4,096, batch 4,096, k 64: 36 bytes for each of 2^30 numbers of the encoder and the decoder."""
    config = DictionaryConfig(architecture="topk", features=262_144, k=64, auxk=0)
    spec = SimpleNamespace(budget=Budget(tokens=1 << 20), compute="bf16")
    one, eight = training_memory(spec, config, 4096), step_memory(spec, config, 4096, 8, "features")
    assert 36 * 2**30 <= one < 38 * 2**30
    assert 36 * 2**27 <= eight < 6 * 2**30
    assert training_memory(spec, config, 4096, 8, "features") == figures_memory(config, 4096) < 12 * 2**30, "whole, once it is trained"
    assert training_memory(spec, config, 4096, 8, "batch") > 36 * 2**30, "data parallel ranks hold all of it"


FIGURES = """
import sys, torch
from stagediff.sae.initial import fresh
from stagediff.sae.metrics import evaluate
from stagediff.sae.spec import DictionaryConfig
config = DictionaryConfig.model_validate_json(sys.argv[1])
sae = fresh(config, 1.0, torch.zeros(16), seed=0)
evaluate(sae, (torch.randn(int(sys.argv[2]), 16) for _ in range(3)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_what_a_finished_dictionarys_figures_take_is_what_is_predicted(architecture):
    config = DictionaryConfig(architecture=architecture, features=1 << 16, k=8, auxk=0)
    few = 16
    measured = peak_mib(FIGURES, config.model_dump_json(), str(AT_ONCE[0])) - peak_mib(FIGURES, config.model_dump_json(), str(few))
    predicted = (figures_memory(config, 16) - 8 * (1 << 16) * 16) * (AT_ONCE[0] - few) / AT_ONCE[0] / 2**20
    assert measured == pytest.approx(predicted, rel=0.05)


def test_both_know_the_same():
    assert CHUNK_BYTES["cuda"] == CHUNK
    assert (FEWEST_TOKENS, EVALUATED_VALUES) == AT_ONCE
