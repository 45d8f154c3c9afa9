"""Each architecture finds a small planted dictionary, in bf16 and fp32, and what training promises on the way."""

import numpy as np
import pytest
import torch

from stagediff.sae.batches import Order, batches, shard_sizes
from stagediff.sae.dictionary import SAE
from stagediff.sae.initial import fresh, measure
from stagediff.sae.metrics import evaluate
from stagediff.sae.optimiser import rate
from stagediff.sae.sparse.kernels import KERNELS
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer

D, PLANTED, F = 24, 32, 48
SETTINGS = {
    "relu": {"l1": 0.9},
    "topk": {"k": 5},
    "batchtopk": {"k": 4},
    "jumprelu": {"l1": 0.3, "bandwidth": 0.3, "initial_threshold": 0.1},
}


def train(
    data, config: DictionaryConfig, steps: int = 700, batch: int = 256, lr: float = 4e-3, compute=torch.float32, start=None, **budget
):
    scale, mean = measure(data)
    sae = start or fresh(config, scale, mean, 0)
    trainer = Trainer(sae, Budget(tokens=max(1, steps) * batch, batch=batch, lr=lr, **budget), max(1, steps), start is None, compute)
    for x in batches(data, Order(0, shard_sizes(data)), batch, 0, steps):
        trainer.train_on(x)
    return trainer


def found(sae: SAE, directions: torch.Tensor) -> torch.Tensor:
    """For each planted direction the best cosine."""
    return (directions @ sae.directions().T).max(1).values


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", SETTINGS)
def test_planted_features_are_found(architecture, compute, planted, reader):
    x, directions = planted(40_000, D, PLANTED, scale=30.0)
    data = reader(x, 5_000)
    sae = train(data, DictionaryConfig(architecture=architecture, features=F, **SETTINGS[architecture]), compute=compute).dictionary()
    quality = evaluate(sae, data.x[:8192].split(1024))
    assert quality.explained_variance > 0.9
    assert (found(sae, directions) > 0.93).float().mean() > 0.9
    assert 2 < quality.l0 < 7  # 3 of 32 are on, on average


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_unit_decoder_rows_stay_unit(architecture, planted, reader):
    x, _ = planted(5_000, D, PLANTED)
    sae = train(reader(x, 1000), DictionaryConfig(architecture=architecture, features=F, k=4), steps=50).dictionary()
    assert torch.allclose(sae.decoder_norms(), torch.ones(F), atol=1e-6)


def test_relu_decoder_norms_are_free(planted, reader):
    x, _ = planted(5_000, D, PLANTED)
    sae = train(reader(x, 1000), DictionaryConfig(features=F), steps=100).dictionary()
    assert sae.decoder_norms().std() > 0.01


def test_the_sparsity_weight_warms_up_from_scratch_and_is_constant_in_finetunes(planted, reader):
    x, _ = planted(2_000, D, PLANTED)
    data = reader(x, 1000)
    scale, mean = measure(data)
    config = DictionaryConfig(features=F, l1=3.0, l1_warmup=0.1)
    budget = Budget(tokens=100 * 64, batch=64)
    for warms_up, expected in ((True, [0.3, 0.6, 0.9]), (False, [3.0, 3.0, 3.0])):
        trainer = Trainer(fresh(config, scale, mean, 0), budget, 100, warms_up, torch.float32)
        weights = []
        for batch in batches(data, Order(0, shard_sizes(data)), 64, 0, 3):
            weights.append(trainer.sparsity_weight)
            trainer.train_on(batch)
        assert weights == pytest.approx(expected)


def test_the_learning_rate_rises_stays_and_falls():
    budget = Budget(tokens=1, batch=1, lr=2.0, warmup=0.1, decay=0.2)
    rates = [rate(step, 100, budget) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:80] == pytest.approx([2.0] * 70)
    assert rates[80:] == pytest.approx([2.0 * (100 - i) / 20 for i in range(80, 100)])


def test_gradients_are_clipped_to_the_limit(planted, reader, monkeypatch):
    """Of the dense algebra, which clips them where they are; compiled kernels do so on the way (test_sparse.py)."""
    monkeypatch.setenv(KERNELS, "reference")
    x, _ = planted(2_000, D, PLANTED, scale=50)
    data = reader(x, 1000)
    norms = {}
    for limit in (1.0, 0.0):
        trainer = train(data, DictionaryConfig(features=F), steps=1, clip=limit, lr=1e-9)
        outcome = trainer.train_on(data.x[:256])
        norms[limit] = torch.stack([g.norm() for g in outcome.gradients.values()]).norm()
    assert norms[1.0] == pytest.approx(1.0, abs=1e-3)
    assert norms[0.0] > 1.02


def test_silence_is_counted_in_tokens(planted, reader):
    x, _ = planted(4_000, D, PLANTED)
    data = reader(x, 1000)
    trainer = train(data, DictionaryConfig(features=F, dead_after=200), steps=0)
    trainer.budget = Budget(tokens=640, batch=64)
    trainer.parameters["b_enc"][5] = -1e6  # never fires
    fired_last = np.zeros(F, dtype=int)
    for step, batch in enumerate(batches(data, Order(0, shard_sizes(data)), 64, 0, 10), start=1):
        f = trainer.train_on(batch).f
        fired_last[(f > 0).any(0).numpy()] = step * 64
        assert (trainer.state()["silent"].numpy() == step * 64 - fired_last).all()
        expected = (step * 64 - fired_last >= min(200, step * 64)).mean()
        assert float(trainer.silent_share()) == pytest.approx(expected)
    assert trainer.state()["silent"][5] == 640


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_auxk_brings_dead_features_back(architecture, planted, reader):
    x, _ = planted(20_000, D, PLANTED)
    data = reader(x, 5_000)
    dead = {}
    for auxk in (0, 12):
        config = DictionaryConfig(architecture=architecture, features=F, k=4, auxk=auxk, dead_after=512, auxk_weight=0.1)
        scale, mean = measure(data)
        sae = fresh(config, scale, mean, 0)
        sae.W_enc[:, :24] *= 0.01  # never among the largest
        trainer = train(data, config, steps=600, start=sae, lr=1e-2)
        dead[auxk] = evaluate(trainer.dictionary(), data.x.split(4096)).dead
    assert dead[0] > 0.3
    assert dead[12] < 0.15


def test_dead_features_do_not_move_without_auxk(planted, reader):
    x, _ = planted(5_000, D, PLANTED)
    data = reader(x, 1000)
    scale, mean = measure(data)
    sae = fresh(DictionaryConfig(features=F), scale, mean, 0)
    sae.b_enc[7] = -1e6
    after = train(data, sae.config, steps=100, start=sae).dictionary()
    cosines = (sae.directions() * after.directions()).sum(1)
    assert cosines[7] == pytest.approx(1.0, abs=1e-6)
    assert cosines.median() < 0.9999


def test_batchtopk_uses_its_threshold_at_inference(planted, reader):
    """Alone or in a batch, a token gets the same activations; on average about k are active."""
    x, _ = planted(20_000, D, PLANTED)
    data = reader(x, 5_000)
    sae = train(data, DictionaryConfig(architecture="batchtopk", features=F, k=4), steps=400).dictionary()
    some = data.x[:64]
    together = sae.encode(some)
    alone = torch.cat([sae.encode(row[None]) for row in some])
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.equal(together > 0, alone > 0)
    l0 = evaluate(sae, data.x.split(4096)).l0
    assert l0 == pytest.approx(4, rel=0.25)
    assert len(set((together > 0).sum(1).tolist())) > 1, "tokens may use more or fewer features"


def test_training_leaves_the_start_dictionary_alone(planted, reader):
    x, _ = planted(2_000, D, PLANTED)
    data = reader(x, 1000)
    scale, mean = measure(data)
    start = fresh(DictionaryConfig(features=F), scale, mean, 0)
    before = start.copy()
    train(data, start.config, steps=5, start=start)
    assert torch.equal(start.W_dec, before.W_dec)
    assert torch.equal(start.W_enc, before.W_enc)
