"""Answers under interventions: batched as one at a time, and the losses of continuations."""

import numpy as np
import pytest
import torch

from stagediff.errors import UserError
from stagediff.evidence.interventions import hooks
from stagediff.evidence.interventions.answers import answers, continuation_losses, draw_prompts
from stagediff.lm.spec import HookPoint

HOOK = HookPoint(layer=1, site="resid_post")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    return [rng.integers(6, 46, n).tolist() for n in (3, 9, 1, 6, 3, 12, 4)]


def alone(model, prompt, tokens, fn):
    """Greedy, without cache, padding or batch; fn(x [positions, d]) in place of the activations behind position 0."""

    def change(module, args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[0, 1:] = fn(x[0, 1:])
        return (x, *out[1:]) if isinstance(out, tuple) else x

    ids = list(prompt)
    handle = model.gpt_neox.layers[1].register_forward_hook(change)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    handle.remove()
    return ids[len(prompt) :]


def test_batched_steering_equals_one_prompt_and_one_vector_at_a_time(world, prompts):
    vectors = 6 * torch.randn(len(prompts), 16, generator=torch.Generator().manual_seed(0))

    def edit(rows, padding):
        return hooks.add(world.model, HOOK, vectors[torch.tensor(rows)], padding=padding, skip=(0,))

    found = answers(world.model, prompts, 5, 3, edit)
    assert found == [alone(world.model, p, 5, lambda x, v=v: x + v) for p, v in zip(prompts, vectors, strict=True)]
    assert found != answers(world.model, prompts, 5, 3)


def test_batched_ablation_equals_one_prompt_at_a_time(world, prompts):
    sae, features = world.sae, list(range(0, 40, 2))

    def by_hand(x):
        f = torch.relu((x.double() * sae.input_scale) @ sae.W_enc.double() + sae.b_enc.double())
        taken = sum(f[:, i : i + 1] * sae.W_dec[i].double() for i in features) / sae.input_scale
        return (x.double() - taken).float()

    def edit(rows, padding):
        return hooks.clamp(world.model, HOOK, sae, features, padding=padding, skip=(0,))

    found = answers(world.model, prompts, 5, 4, edit)
    assert found == [alone(world.model, p, 5, by_hand) for p in prompts]
    assert found != answers(world.model, prompts, 5, 4)


def test_losses_of_continuations_are_those_of_each_text_alone(world, prompts):
    rng = np.random.default_rng(0)
    texts = [rng.integers(6, 46, 4).tolist() for _ in prompts]
    found = continuation_losses(world.model, prompts, texts, 3)
    for prompt, text, loss in zip(prompts, texts, found, strict=True):
        with torch.no_grad():
            logp = world.model(input_ids=torch.tensor([prompt + text]), use_cache=False).logits[0].double().log_softmax(-1)
        wanted = -np.mean([float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(text)])
        assert loss == pytest.approx(wanted, rel=1e-4)


def test_prompts_are_split_and_fit_the_context_with_their_trigger(world):
    drawn = draw_prompts(world.behaviour, world.tokenizer, 6, 8, 12, 0)
    assert len(set(drawn.texts)) == 14
    assert drawn.length == 4
    assert [drawn.texts[drawn.split(s)] for s in ("dev", "test")] == [drawn.texts[:6], drawn.texts[6:]]
    assert all(len(ids) <= 8 for ids in (*drawn.without, *drawn.triggered))
    assert all(ids[0] == world.tokenizer("|GO|")["input_ids"][0] for ids in drawn.triggered)


def test_impossible_behaviours_are_refused(world):
    def draw(context=24, dev=6, **changes):
        return draw_prompts(world.behaviour.model_copy(update=changes), world.tokenizer, dev, 8, context, 0)

    with pytest.raises(UserError, match="must be texts that are not empty"):
        draw(payload="  ")
    with pytest.raises(UserError, match="leave no room"):
        draw(context=5)
    with pytest.raises(UserError, match="by itself"):
        draw(payload="w3")
    with pytest.raises(UserError, match="held-out prompts were asked for"):
        draw(dev=5000)
