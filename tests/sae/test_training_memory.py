"""`stagediff plan` predicts a training's memory: checked against the tensors that a training holds."""

import gc
from types import SimpleNamespace

import pytest
import torch

from stagediff.sae.estimate import CHUNK, training_memory
from stagediff.sae.initial import fresh
from stagediff.sae.parallel import Team
from stagediff.sae.sharded import Shards
from stagediff.sae.sparse.engine import CHUNK_BYTES
from stagediff.sae.spec import Budget, DictionaryConfig
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
    batch_part = training_memory(spec, config.model_copy(update={"features": 0}), d, ranks, "features")
    predicted = training_memory(spec, config, d, ranks, "features") - batch_part
    assert held + copies == pytest.approx(predicted, rel=0.03)
    assert outcome.gradients


def test_a_wide_dictionary_fits_eight_gpus_and_not_one():
    """F 262,144 at d 4,096, batch 4,096, k 64: 36 bytes for each of 2^30 numbers of the encoder and the decoder."""
    config = DictionaryConfig(architecture="topk", features=262_144, k=64, auxk=0)
    spec = SimpleNamespace(budget=Budget(tokens=1 << 20), compute="bf16")
    one, eight = training_memory(spec, config, 4096), training_memory(spec, config, 4096, 8, "features")
    assert 36 * 2**30 <= one < 38 * 2**30
    assert 36 * 2**27 <= eight < 6 * 2**30
    assert training_memory(spec, config, 4096, 8, "batch") > 36 * 2**30, "data parallel ranks hold all of it"


def test_both_know_the_same_chunk():
    assert CHUNK_BYTES["cuda"] == CHUNK
