"""Hook points: the right values in every family, nothing computed above, and models left as they were."""

from collections import Counter
from typing import Any

import pytest
import torch

from stagediff.errors import UserError
from stagediff.lm import hooks
from stagediff.lm.spec import HookPoint

FAMILIES = ["gpt_neox", "gpt_neox_sequential", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi"]
IDS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))


def parts_by_hand(model: Any, layer: int) -> tuple[Any, Any]:
    """What each family's own code adds to the residual stream, by its attribute names."""
    block = hooks.decoder_layers(model)[layer]
    kind = model.config.model_type
    if kind in ("gemma2", "gemma3_text", "olmo2"):
        return block.post_attention_layernorm, block.post_feedforward_layernorm
    if kind == "gpt2":
        return block.attn, block.mlp
    if kind == "gpt_neox":
        return block.attention, block.mlp
    return block.self_attn, block.mlp


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_equal_the_full_forwards_hidden_states(tiny: Any, family: str) -> None:
    model = tiny(family)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(4):
        assert torch.equal(hooks.read(model, HookPoint(layer=layer), IDS), states[layer])
    for layer in range(3):  # the last hidden state of Hugging Face is after the final norm
        assert torch.equal(hooks.read(model, HookPoint(layer=layer, site="resid_post"), IDS), states[layer + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_equal_what_the_familys_own_modules_add(tiny: Any, family: str) -> None:
    model = tiny(family)
    got: dict[str, torch.Tensor] = {}
    for site, module in zip(("attn_out", "mlp_out"), parts_by_hand(model, 2), strict=True):
        module.register_forward_hook(lambda m, a, out, site=site: got.__setitem__(site, first(out)))
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    want = dict(got)
    for site in want:
        assert torch.equal(hooks.read(model, HookPoint(layer=2, site=site), IDS), want[site])
    torch.testing.assert_close(states[2] + want["attn_out"] + want["mlp_out"], states[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_above_the_hook_point_runs(tiny: Any, family: str) -> None:
    model = tiny(family)
    layers = hooks.decoder_layers(model)
    calls: Counter[str] = Counter()
    for i, block in enumerate(layers):
        block.register_forward_pre_hook(lambda m, a, i=i: calls.update([f"block {i}"]))
    model.get_output_embeddings().register_forward_pre_hook(lambda m, a: calls.update(["head"]))
    attention, mlp = parts_by_hand(model, 2)
    for name, module in (("attention", attention), ("mlp", mlp)):
        module.register_forward_hook(lambda m, a, o, name=name: calls.update([name]))
    for site in ("resid_pre", "resid_post", "mlp_out", "attn_out"):
        hooks.find(model, HookPoint(layer=2, site=site))  # the first look traces the parts; it is not what is counted
        calls.clear()
        hooks.read(model, HookPoint(layer=2, site=site), IDS)
        assert calls["block 0"] == calls["block 1"] == 1
        assert calls["block 3"] == calls["head"] == 0
        if site == "resid_pre":  # the forward pass stops at block 2's door: nothing inside it runs
            assert calls["attention"] == calls["mlp"] == 0
        if site == "attn_out":  # in the parallel blocks of these families attention comes first too
            assert calls["mlp"] == 0


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma3", "llama", "phi"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "attn_out"])
def test_intervening_acts_on_everything_above_and_only_there(tiny: Any, family: str, site: str) -> None:
    model = tiny(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hook = HookPoint(layer=1, site=site)
    with torch.no_grad():
        clean = model(IDS, use_cache=False).logits
        shift = torch.randn(32)
        below = hooks.read(model, HookPoint(layer=0), IDS)
        x = hooks.read(model, HookPoint(layer=1, site="resid_post"), IDS)
        with hooks.intervene(model, hook, lambda x: x):
            assert torch.equal(model(IDS, use_cache=False).logits, clean)
        with hooks.intervene(model, hook, lambda x: x + shift):
            assert not torch.allclose(model(IDS, use_cache=False).logits, clean)
            assert torch.equal(hooks.read(model, HookPoint(layer=0), IDS), below)
            if site in ("mlp_out", "resid_post"):
                torch.testing.assert_close(hooks.read(model, HookPoint(layer=1, site="resid_post"), IDS), x + shift)
        assert torch.equal(model(IDS, use_cache=False).logits, clean)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_intervening_reaches_generation_with_a_cache(tiny: Any) -> None:
    model = tiny("gpt_neox")
    seen: list[int] = []
    direction = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))

    def push(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[1])
        return x + direction

    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    clean = model.generate(IDS, **options)
    with hooks.intervene(model, HookPoint(layer=2), push):
        pushed = model.generate(IDS, **options)
    assert seen == [20, 1, 1, 1, 1, 1]
    assert not torch.equal(clean, pushed)
    assert torch.equal(model.generate(IDS, **options), clean)


def test_an_error_in_the_function_leaves_no_hook_behind(tiny: Any) -> None:
    model = tiny("llama")

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), hooks.intervene(model, HookPoint(layer=1), fail):
        model(IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_parts_are_refused_where_the_block_scales_them(tiny: Any) -> None:
    model = tiny("granite")
    assert hooks.read(model, HookPoint(layer=1), IDS).shape == (3, 20, 32)
    with pytest.raises(UserError, match="Use site resid_pre"):
        hooks.find(model, HookPoint(layer=1, site="mlp_out"))


def test_a_layer_that_does_not_exist_is_named(tiny: Any) -> None:
    with pytest.raises(UserError, match="layer 4.*layers 0 to 3"):
        hooks.find(tiny("gpt2"), HookPoint(layer=4))


def test_bf16_parts_are_found_too(tiny: Any) -> None:
    model = tiny("gemma2").to(torch.bfloat16)
    assert hooks.read(model, HookPoint(layer=2, site="mlp_out"), IDS).dtype == torch.bfloat16
