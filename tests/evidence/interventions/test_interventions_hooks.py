"""Adding and clamping at a hook point: the maths against float64 loops, and a model left as it was."""

import copy

import numpy as np
import pytest
import torch

from stagediff.evidence.interventions import hooks
from stagediff.lm.spec import HookPoint
from stagediff.organisms.behaviour import generate

HOOK = HookPoint(layer=1, site="resid_post")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def above(model, x):
    """The logits that follow from activations x at the hook point (the last layer and what comes after it)."""
    holder = model.gpt_neox.layers[1].register_forward_hook(lambda m, a, out: (x, *out[1:]) if isinstance(out, tuple) else x)
    try:
        return logits(model, torch.zeros(x.shape[:2], dtype=torch.int64))
    finally:
        holder.remove()


@pytest.fixture
def ids(world):
    return torch.from_numpy(world.rows[:3].astype(np.int64))


def residuals(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[2]


def active(sae, x):
    """f of one vector [d], by the definition, in float64."""
    inner = x.double().numpy() * sae.input_scale
    return np.maximum(inner @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy(), 0)


def test_each_row_has_its_own_vector_added(world, ids):
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    x = residuals(world.model, ids)
    wanted = x.clone()
    for row in range(3):
        for at in range(1, x.shape[1]):
            wanted[row, at] = (x[row, at].double() + vectors[row].double()).float()
    with hooks.add(world.model, HOOK, vectors, skip=(0,)):
        torch.testing.assert_close(logits(world.model, ids), above(world.model, wanted))


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_clamp_takes_out_what_active_features_write_and_keeps_the_error_term(world, ids, value):
    sae, features = world.sae, [3, 11, 30]
    x = residuals(world.model, ids)
    wanted = x.clone()
    for row in range(3):
        for at in range(1, x.shape[1]):
            f = active(sae, x[row, at])
            left = x[row, at].double().numpy().copy()
            for i in features:
                if f[i] > 0:
                    left += (value - f[i]) * sae.W_dec[i].double().numpy() / sae.input_scale
            wanted[row, at] = torch.from_numpy(left)
    with hooks.clamp(world.model, HOOK, sae, features, value=value, skip=(0,)):
        found = logits(world.model, ids)
    torch.testing.assert_close(found, above(world.model, wanted), rtol=1e-4, atol=1e-3)
    assert (found - logits(world.model, ids)).abs().max() > 0.1


def test_a_large_block_is_clamped_in_pieces(world, monkeypatch):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    whole = hooks.Clamp(world.sae, [1, 2, 3])(x)
    monkeypatch.setattr(hooks, "ENCODED_BYTES", 4 * world.sae.features * 7)
    torch.testing.assert_close(hooks.Clamp(world.sae, [1, 2, 3])(x), whole)


def test_the_model_is_bit_for_bit_as_before_after_an_intervention(world, ids):
    before = logits(world.model, ids)
    vectors = torch.ones(3, 16)
    with hooks.add(world.model, HOOK, vectors):
        assert not torch.equal(logits(world.model, ids), before)
    with pytest.raises(ZeroDivisionError), hooks.add(world.model, HOOK, vectors):
        _ = 1 / 0
    with hooks.clamp(world.model, HOOK, world.sae, range(20)):
        assert not torch.equal(logits(world.model, ids), before)
    assert torch.equal(logits(world.model, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamp_that_clamps_nothing_changes_no_bit(world, ids, dtype):
    model = copy.deepcopy(world.model).to(dtype)
    before = logits(model, ids)
    silent = world.sae.copy()
    silent.b_enc[[4, 9]] = -1e6  # never active
    for features in ([], [4, 9]):
        with hooks.clamp(model, HOOK, silent, features):
            assert torch.equal(logits(model, ids), before)
    with hooks.add(model, HOOK, torch.zeros(3, 16)):
        assert torch.equal(logits(model, ids), before)


def test_padding_and_skipped_positions_are_not_touched_with_a_cache(world):
    """What the hook returns, piece by piece: a prompt of 5 positions with 2 of padding, then two single tokens."""
    seen = []
    model = world.model
    watcher = model.gpt_neox.layers[1]
    vectors = torch.ones(2, 16)
    with hooks.add(model, HOOK, vectors, padding=torch.tensor([2, 0]), skip=(0, 4)):
        handle = watcher.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone()))
        generate(model, [[7, 8, 9], [10, 11, 12, 13, 14]], 3, batch=2)
        handle.remove()
    plain = []
    handle = watcher.register_forward_hook(lambda m, a, out: plain.append((out[0] if isinstance(out, tuple) else out).clone()))
    generate(model, [[7, 8, 9], [10, 11, 12, 13, 14]], 1, batch=2)
    handle.remove()
    moved = (seen[0] - plain[0]).abs().amax(-1) > 0.5
    assert moved.tolist() == [[False, False, False, True, True], [False, True, True, True, False]]
    assert [x.shape[1] for x in seen] == [5, 1, 1]
    touched = hooks.Touched(torch.tensor([2, 0]), (0, 4))
    pieces = [touched.of(torch.zeros(2, n, 16)).tolist() for n in (5, 1, 1)]
    assert pieces[1:] == [[[True], [True]], [[False], [True]]]  # position 4 of the shorter prompt is skipped when it comes
