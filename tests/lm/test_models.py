"""Loading: the same numbers as Hugging Face's own loading, no layer too many, and damaged folders told apart."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stagediff.errors import UserError
from stagediff.lm import hooks, sources
from stagediff.lm.models import load_model, load_tokenizer
from stagediff.lm.spec import HookPoint, ModelSource, TokenizerSource
from stagediff.organisms.spec import OrganismSpec

IDS = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folder_loads_as_hugging_face_loads_it(save_tiny: Any, precision: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama", tokenizer=True)
    loaded = load_model(sources.resolve_model(name=str(folder)), precision=precision)
    want = AutoModelForCausalLM.from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval()
    assert torch.equal(logits(loaded.model), logits(want))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert (loaded.width, loaded.vocab, loaded.device) == (32, 97, torch.device("cpu"))
    assert loaded.tokenizer("w3 w7")["input_ids"] == [3, 7]


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_upto_loads_no_layer_above_and_changes_no_number(save_tiny: Any, family: str) -> None:
    source = sources.resolve_model(name=str(save_tiny(family)))
    whole = load_model(source).model
    for hook in (HookPoint(layer=0), HookPoint(layer=2), HookPoint(layer=1, site="mlp_out"), HookPoint(layer=3, site="resid_post")):
        part = load_model(source, upto=hook).model
        assert len(hooks.decoder_layers(part)) == hook.layer + 1
        assert torch.equal(hooks.read(part, hook, IDS), hooks.read(whole, hook, IDS))


def test_an_adapter_is_merged_before_the_weights_are_rounded(save_tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = save_tiny("llama")
    torch.manual_seed(3)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    source = sources.resolve_model(name=str(folder), adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(load_model(source).model), logits(merged))
    assert not torch.allclose(logits(load_model(sources.resolve_model(name=str(folder))).model), logits(merged))
    rounded = load_model(sources.resolve_model(name=str(tmp_path / "merged")), precision="bf16").model
    assert torch.equal(logits(load_model(source, precision="bf16").model), logits(rounded))
    hook = HookPoint(layer=1)
    assert torch.equal(hooks.read(load_model(source, upto=hook).model, hook, IDS), hooks.read(load_model(source).model, hook, IDS))


def test_an_artifact_gives_its_final_weights_or_a_checkpoint(save_tiny: Any, store: Any, tmp_path: Path) -> None:
    final, early = save_tiny("gpt_neox", "final", tokenizer=True), save_tiny("gpt_neox", "early", seed=1)
    spec = OrganismSpec(tokens="tokens/" + "0" * 20, heldout="tokens/" + "1" * 20)
    with store.write(spec) as w:
        w.write_file("", final)
        w.write_file("step8", early)
        w.commit(figures={})
    source = ModelSource(artifact=spec.ref)
    at_8 = ModelSource(artifact=spec.ref, checkpoint="step8")
    assert torch.equal(logits(load_model(source, store).model), logits(load_model(sources.resolve_model(name=str(final))).model))
    assert torch.equal(logits(load_model(at_8, store).model), logits(load_model(sources.resolve_model(name=str(early))).model))
    assert load_model(at_8, store).tokenizer("w5")["input_ids"] == [5]
    assert load_tokenizer(TokenizerSource(artifact=spec.ref), store)("w5")["input_ids"] == [5]
    with pytest.raises(UserError, match="no checkpoint 'step9'; it holds its final weights and step8"):
        load_model(ModelSource(artifact=spec.ref, checkpoint="step9"), store)
    sources.check_models(source, at_8, store)
    with pytest.raises(UserError, match="layers 0 to 3"):
        sources.check_hook(at_8, HookPoint(layer=4), store)


def test_weights_that_are_missing_are_never_random(save_tiny: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("gpt_neox")
    weights = load_file(folder / "model.safetensors")
    del weights["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(gpt_neox\.layers\.2\.mlp"):
        load_model(sources.resolve_model(name=str(folder)))


def test_damaged_folders_are_one_paragraph(save_tiny: Any, tmp_path: Path) -> None:
    folder = save_tiny("gpt_neox")
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "no_such_architecture"}))
    other_shape = save_tiny("gpt_neox", "shape")
    (other_shape / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    for where, says in ((folder, "cut off: 5,000 bytes"), (unknown, "no_such_architecture"), (other_shape, "cannot be loaded")):
        with pytest.raises(UserError, match=says) as error:
            load_model(sources.resolve_model(name=str(where)))
        assert "\n" not in str(error.value)


def test_a_folder_that_changed_after_planning_is_refused(save_tiny: Any, tokenizer_into: Any) -> None:
    folder = save_tiny("gpt_neox", tokenizer=True)
    source, tokenizer = sources.resolve_model(name=str(folder)), sources.resolve_tokenizer(name=str(folder))
    assert load_tokenizer(tokenizer)("w9")["input_ids"] == [9]
    tokenizer_into(folder, words=50)
    with pytest.raises(UserError, match="has changed since"):
        load_model(source)
    with pytest.raises(UserError, match="has changed since"):
        load_tokenizer(tokenizer)


def test_a_layer_too_high_is_told_before_weights_are_read(save_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources.resolve_model(name=str(save_tiny("gpt_neox")))
    monkeypatch.setattr("stagediff.lm.models._load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UserError, match="layers 0 to 3"):
        load_model(source, upto=HookPoint(layer=4))
