"""Tokens that are explained badly count for more: how much, and that rare new directions are learned so."""

import numpy as np
import pytest
import torch

from stagediff import steps
from stagediff.lm.spec import ActivationData
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.focus import MOST, weights
from stagediff.sae.parallel import Team
from stagediff.sae.sharded import Shards
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec
from stagediff.sae.trainer import Trainer
from stagediff.spec import Ref

D, KNOWN, NEW, RARE = 32, 48, 8, 0.02


def test_a_weight_is_the_squared_error_to_a_power_and_one_on_average():
    squares = torch.tensor([1.0, 2.0, 4.0, 4.0, 1000.0])
    found = weights(squares, 2.0, Team()).numpy()
    expected = np.array([1 / 4, 2 / 4, 1, 1, MOST]) ** 2  # of the median, 4; the last one counts as MOST times that
    assert found == pytest.approx(expected / expected.mean(), rel=1e-6)
    assert weights(squares, 0.0, Team()).tolist() == [1.0] * 5
    assert weights(torch.zeros(5), 3.0, Team()).tolist() == [1.0] * 5, "nothing is explained badly"


def test_a_slice_is_weighted_as_part_of_the_whole_batch(monkeypatch):
    squares = torch.rand(8, generator=torch.Generator().manual_seed(0)) * 10
    whole = weights(squares, 3.0, Team())
    monkeypatch.setattr(Team, "everyones", lambda self, own: squares)
    assert torch.equal(torch.cat([weights(half, 3.0, Team()) for half in squares.chunk(2)]), whole)
    assert Shards(8).everyones(squares[:3]).tolist() == squares[:3].tolist(), "where features are split each rank has all tokens"


def test_without_a_focus_a_spec_keeps_its_key():
    """The key that this spec had before there was a focus."""
    data = ActivationData(base=Ref("activations/" + "b" * 20), rows=5)
    spec = FinetuneSpec(start=Ref("dictionaries/" + "a" * 20), data=data, budget=Budget(tokens=10))
    assert spec.key == "ed14cbc699825b7606c4"
    assert spec.model_copy(update={"budget": Budget(tokens=10, focus=1.0)}).key != spec.key


def mixture(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base tokens, tokens of which RARE hold three of NEW more directions as well, and these directions."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(KNOWN + NEW, D, generator=g), dim=1)

    def tokens(n: int, share: float) -> torch.Tensor:
        codes = torch.zeros(n, KNOWN + NEW)
        codes[:, :KNOWN] = (torch.rand(n, KNOWN, generator=g) < 3 / KNOWN) * (0.5 + torch.rand(n, KNOWN, generator=g))
        new = torch.rand(n, 1, generator=g) < share
        codes[:, KNOWN:] = new * (torch.rand(n, NEW, generator=g) < 3 / NEW) * (0.5 + torch.rand(n, NEW, generator=g))
        return codes @ directions + 0.02 * torch.randn(n, D, generator=g)

    return tokens(16_384, 0.0), tokens(32_768, RARE), directions[KNOWN:]


def born(store, start, data, new, quiet, focus: float, seed: int) -> int:
    budget = Budget(tokens=256 * 1000, batch=256, lr=6e-3, focus=focus)
    made = store.artifact(steps.run(FinetuneSpec(start=start, data=data, budget=budget, seed=seed), store, device="cpu", progress=quiet))
    return int(((SAE.load(made).directions() @ new.t()).amax(0) > 0.8).sum())


def test_rare_new_directions_are_learned(store, stored, quiet):
    """One token in fifty holds new directions: over three seeds, at least twice as many are found, and more than half of all."""
    plain, focused = 0, 0
    for seed in range(3):
        base, mix, new = mixture(seed)
        dictionary = DictionaryConfig(features=64, l1=2.0)
        budget = Budget(tokens=256 * 800, batch=256, lr=3e-3)
        spec = TrainSpec(data=stored(store, base, name=f"base{seed}"), budget=budget, dictionary=dictionary, seed=seed)
        start = steps.run(spec, store, device="cpu", progress=quiet)
        data = stored(store, mix, name=f"mix{seed}")
        plain += born(store, start, data, new, quiet, 0.0, seed)
        focused += born(store, start, data, new, quiet, 2.0, seed)
    assert focused > 2 * plain
    assert focused > 3 * NEW / 2


def test_the_step_is_the_weighted_one(planted):
    """A trainer's gradient with a focus is the sum of what each token alone would give, by its weight."""
    x = planted(64, D, 40)[0]
    config = resolved(DictionaryConfig(features=48, l1=1.0), D)
    g = torch.Generator().manual_seed(0)
    sae = SAE(torch.randn(D, 48, generator=g), torch.zeros(48), torch.randn(48, D, generator=g), torch.zeros(D), config)

    def trainer(batch: int, focus: float) -> Trainer:
        return Trainer(sae, Budget(tokens=batch, batch=batch, focus=focus, clip=0), 1, False, torch.float32)

    found = {name: value.clone() for name, value in trainer(64, 2.0).train_on(x).gradients.items()}
    squares = (sae.decode(sae.encode(x)) - x).square().sum(1)
    counts = weights(squares, 2.0, Team())
    expected = {name: torch.zeros_like(value) for name, value in found.items()}
    for token, count in zip(x, counts, strict=True):
        for name, value in trainer(1, 0.0).train_on(token[None]).gradients.items():
            expected[name] += count / 64 * value
    for name, value in expected.items():
        assert float((found[name] - value).norm()) < 1e-4 * float(value.norm()), name
