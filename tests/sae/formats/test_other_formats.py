"""dictionary_learning's and sparsify's files without their packages: against their forward passes by hand, and against what the packages saved."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import by_hand
import pytest
import torch
import wrong
from made import ARCHITECTURES, SCALE, TOLERANCE, D, F, apart, dictionary, inputs, put, reconstructed
from safetensors.torch import load_file, save_file

from stagediff import steps
from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.formats import FORMATS, export, resolve_import
from stagediff.store import Store

FROZEN = Path(__file__).parent / "frozen"
FORWARD = {"dictionary_learning": by_hand.dictionary_learning, "sparsify": by_hand.sparsify}
CASES = [("dictionary_learning", a) for a in ARCHITECTURES] + [("sparsify", "topk")]
"""What each format has a place for."""


@pytest.fixture
def taken_in(store, quiet):
    """folder -> the dictionary, by the import step."""
    return lambda folder: SAE.load(store.artifact(steps.run(resolve_import(folder), store, device="cpu", progress=quiet)))


@pytest.mark.parametrize(("to", "architecture"), CASES)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("norm", ["unit", "free"])
def test_the_other_library_reconstructs_raw_activations_as_we_do(to, architecture, subtract, norm, tmp_path, store):
    sae, x = dictionary(architecture, subtract_b_dec=subtract, decoder_norm=norm), inputs(60)
    folder = export(put(store, sae), tmp_path / "out", to=to)
    assert apart(FORWARD[to](folder, x), reconstructed(sae, x)) < TOLERANCE


@pytest.mark.parametrize(("to", "architecture"), CASES)
@pytest.mark.parametrize("subtract", [True, False])
def test_exported_and_taken_in_again_it_is_the_same_dictionary(to, architecture, subtract, tmp_path, store, taken_in):
    sae, x = dictionary(architecture, subtract_b_dec=subtract), inputs()
    again = taken_in(export(put(store, sae), tmp_path / "out", to=to))
    assert again.config == sae.config
    assert again.input_scale == sae.input_scale == SCALE
    assert apart(reconstructed(again, x), reconstructed(sae, x)) < TOLERANCE
    if architecture != "relu":  # its decoder norms have gone into the activations
        assert torch.equal(again.encode(x) > 0, sae.encode(x) > 0)
        assert torch.allclose(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)


def test_features_go_out_in_raw_units_with_a_unit_decoder(tmp_path, store):
    sae, x = dictionary("topk"), inputs()
    state = torch.load(export(put(store, sae), tmp_path / "out", to="dictionary_learning") / "ae.pt", weights_only=True)
    assert torch.allclose(state["decoder.weight"], sae.W_dec.t(), rtol=1e-6)
    pre = torch.nn.functional.linear(x.float() - state["b_dec"], state["encoder.weight"], state["encoder.bias"])
    active = sae.encode(x)
    assert torch.allclose(pre[active > 0], active[active > 0] / SCALE, rtol=1e-3)


def test_a_relu_dictionary_leaves_with_decoder_norm_1_even_where_a_feature_has_none(tmp_path, store):
    sae, x = dictionary("relu"), inputs(60)
    sae.W_dec[7] = 0
    folder = export(put(store, sae), tmp_path / "out", to="dictionary_learning")
    state = torch.load(folder / "ae.pt", weights_only=True)
    assert torch.allclose(state["decoder.weight"].norm(dim=0), torch.ones(F), rtol=0, atol=1e-6)
    assert apart(by_hand.dictionary_learning(folder, x), reconstructed(sae, x)) < TOLERANCE


def test_a_threshold_not_yet_seen_stays_one(tmp_path, store, taken_in):
    sae = dictionary("batchtopk")
    assert sae.threshold is not None
    sae.threshold.fill_(-1)
    folder = export(put(store, sae), tmp_path / "out", to="dictionary_learning")
    assert torch.load(folder / "ae.pt", weights_only=True)["threshold"] == -1
    assert torch.equal(taken_in(folder).threshold, sae.threshold)


@pytest.mark.parametrize("name", sorted(p.name for p in FROZEN.iterdir() if p.is_dir()))
def test_what_the_packages_saved_is_taken_in_unchanged(name, taken_in):
    sae, expected = taken_in(FROZEN / name), load_file(FROZEN / name / "expected.safetensors")
    assert sae.input_scale == 1
    assert apart(reconstructed(sae, expected["x"]), expected["x_hat"]) < TOLERANCE


@pytest.mark.parametrize("name", sorted(p.name for p in FROZEN.iterdir() if p.is_dir()))
def test_by_hand_is_what_the_packages_compute(name):
    expected = load_file(FROZEN / name / "expected.safetensors")
    forward = by_hand.sparsify if name == "SparseCoder" else by_hand.dictionary_learning
    assert apart(forward(FROZEN / name, expected["x"]), expected["x_hat"]) < TOLERANCE


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning"])
def test_what_was_taken_in_goes_out_for_another_library(to, tmp_path, store, quiet, taken_in):
    spec = resolve_import(FROZEN / "BatchTopKSAE")
    folder = export(store.artifact(steps.run(spec, store, device="cpu", progress=quiet)), tmp_path / "out", to=to)
    expected = load_file(FROZEN / "BatchTopKSAE" / "expected.safetensors")
    assert apart(reconstructed(taken_in(folder), expected["x"]), expected["x_hat"]) < TOLERANCE
    if to == "dictionary_learning":
        assert json.loads((folder / "config.json").read_text())["trainer"]["lm_name"] == "a/model"


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.3.hook_resid_pre", 2),
        ("blocks.3.hook_resid_post", 3),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.3.hook_mlp_out", None),
    ],
)
def test_dictionary_learning_s_layer_is_the_block_whose_output_was_read(hook, layer, tmp_path, store):
    folder = export(put(store, dictionary("topk"), {"hook_name": hook, "context_size": 9}), tmp_path / "out", to="dictionary_learning")
    config = json.loads((folder / "config.json").read_text())
    assert config["trainer"].get("layer") == layer
    assert config["trainer"]["submodule_name"] == hook
    assert config["buffer"] == {"ctx_len": 9, "d_submodule": D}


@pytest.mark.parametrize("architecture", ["relu", "batchtopk", "jumprelu"])
def test_sparsify_refuses_what_is_no_topk_and_says_who_takes_it(architecture, tmp_path, store):
    with pytest.raises(UserError, match=rf"is {architecture}, and sparsify holds topk only.*dictionary_learning or saelens"):
        export(put(store, dictionary(architecture)), tmp_path / "out", to="sparsify")
    assert not (tmp_path / "out").exists()


def test_two_dictionaries_in_one_folder_are_refused(tmp_path, store):
    artifact = put(store, dictionary("topk"))
    folder = export(artifact, tmp_path / "out", to="saelens")
    with pytest.raises(UserError, match="holds a dictionary in the format saelens. Choose another folder for sparsify"):
        export(artifact, folder, to="sparsify")
    (folder / "sae.safetensors").touch()
    with pytest.raises(UserError, match="files of saelens and sparsify"):
        resolve_import(folder)


def test_a_folder_without_a_dictionary_is_told_the_three_layouts_and_where_there_is_one(tmp_path, store):
    export(put(store, dictionary("topk")), tmp_path / "trainer_0", to="dictionary_learning")
    with pytest.raises(UserError) as refused:
        resolve_import(tmp_path)
    for name, fmt in FORMATS.items():
        assert name in str(refused.value)
        assert all(file in str(refused.value) for file in fmt.FILES)
    assert "Folders in it that do: trainer_0." in str(refused.value)


@pytest.mark.parametrize("to", ["dictionary_learning", "sparsify"])
def test_the_command_writes_a_format_and_takes_it_in(to, tmp_path, store):
    artifact, x = put(store, dictionary("topk")), inputs()
    out = wrong.stagediff("export", artifact.ref, tmp_path / "out", "--format", to, "--store", store.root)
    assert out.exit_code == 0, out.stderr
    taken = wrong.stagediff("import", tmp_path / "out", "--store", tmp_path / "other")
    assert taken.exit_code == 0, taken.stderr
    other = Store(str(tmp_path / "other"))
    again = SAE.load(other.artifact(other.find(taken.stdout.strip())))
    assert apart(reconstructed(again, x), reconstructed(SAE.load(artifact), x)) < TOLERANCE


def test_the_command_refuses_what_sparsify_cannot_hold(tmp_path, store):
    asked = ("export", put(store, dictionary("relu")).ref, tmp_path / "out", "--format", "sparsify", "--store", store.root)
    wrong.refused(wrong.stagediff(*asked), "is relu, and sparsify holds topk only")


def _config(change):
    return lambda folder: _edit(folder / "config.json", change)


def _cfg(change):
    return lambda folder: _edit(folder / "cfg.json", change)


def _edit(file, change):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(_changed(change, content)))


def _changed(change, content):
    """What `change` returns, where that takes the content's place, else the content that it changed."""
    result = change(content)
    return result.content if isinstance(result, Replaced) else content


@dataclass
class Replaced:
    content: Any


def _state(change):
    def edit(folder):
        state = torch.load(folder / "ae.pt", weights_only=True)
        torch.save(_changed(change, state), folder / "ae.pt")

    return edit


def _tensors(change):
    def edit(folder):
        tensors = load_file(folder / "sae.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae.safetensors")

    return edit


class Harmful:
    """What unpickling would run."""

    def __reduce__(self):
        return pytest.fail, ("the file was opened as any pickle",)


BROKEN = [
    ("dictionary_learning", _config(lambda c: c["trainer"].update(dict_class="GatedAutoEncoder")), "'GatedAutoEncoder'; AutoEncoder, "),
    ("dictionary_learning", _config(lambda c: Replaced([1])), r"config\.json cannot be read as dictionary_learning's config"),
    ("dictionary_learning", _config(lambda c: c["trainer"].update(k=6)), "k is 5 in .*ae.pt and 6 in config.json"),
    (
        "dictionary_learning",
        _config(lambda c: c["stagediff"].update(input_scale=0)),
        "not what stagediff writes .*input_scale is 0.*Export",
    ),
    (
        "dictionary_learning",
        _config(lambda c: c["stagediff"]["config"].update(architecture="relu", auxk=0)),
        "says relu, the file holds topk",
    ),
    ("dictionary_learning", _state(lambda s: s.update(b_dec=torch.zeros(3))), r"b_dec has shape \(3,\).*do not belong together"),
    ("dictionary_learning", _state(lambda s: s["encoder.bias"].fill_(float("inf"))), "encoder.bias holds NaN or infinite"),
    ("dictionary_learning", _state(lambda s: s.pop("encoder.weight")), "holds no matrix encoder.weight"),
    ("dictionary_learning", _state(lambda s: Replaced([1, 2])), "holds no state dict"),
    ("dictionary_learning", _state(lambda s: Replaced({"encoder.weight": Harmful()})), "cannot be read .*plain tensors was expected"),
    ("dictionary_learning", lambda folder: (folder / "ae.pt").write_bytes(b"nothing"), r"ae\.pt cannot be read"),
    ("sparsify", _cfg(lambda c: c.update(transcode=True)), r"predicts a module's output.*plain autoencoder"),
    ("sparsify", _cfg(lambda c: c.update(skip_connection=True)), "skip connection"),
    ("sparsify", _tensors(lambda t: t.update(W_skip=torch.zeros(D, D))), "skip connection"),
    ("sparsify", _cfg(lambda c: c.update(signed=True)), "keeps negative activations"),
    ("sparsify", _cfg(lambda c: c.update(activation="groupmax")), "activation 'groupmax'; topk was expected"),
    ("sparsify", _cfg(lambda c: c.update(k=0)), f"k is 0.*1 to its {F} latents"),
    ("sparsify", _cfg(lambda c: c.pop("num_latents")), "does not say d_in, k, and num_latents or expansion_factor"),
    ("sparsify", _cfg(lambda c: c.update(d_in=3)), r"encoder.weight has shape \(40, 24\).*do not belong together"),
    ("sparsify", _cfg(lambda c: Replaced([1])), "does not say d_in"),
    ("sparsify", _tensors(lambda t: t.pop("W_dec")), "W_dec has shape None"),
    ("sparsify", lambda folder: (folder / "sae.safetensors").write_bytes(b"x"), "cannot be read.*saved by sparsify was expected"),
]


@pytest.mark.parametrize(("to", "change", "words"), BROKEN)
def test_files_that_cannot_be_taken_in_are_refused_with_what_is_wrong(to, change, words, tmp_path, store):
    folder = export(put(store, dictionary("topk")), tmp_path / "out", to=to)
    FORMATS[to].read(folder)  # it could be, until now
    change(folder)
    with pytest.raises(UserError, match=words):
        FORMATS[to].read(folder)


def test_a_file_gone_since_it_was_planned_is_refused(tmp_path, store, quiet):
    folder = export(put(store, dictionary("topk")), tmp_path / "out", to="sparsify")
    spec = resolve_import(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no sae\.safetensors any more"):
        steps.run(spec, store, device="cpu", progress=quiet)
