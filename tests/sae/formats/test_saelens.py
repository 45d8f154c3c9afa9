"""Files in SAELens' layout: what the real package makes of ours, and we of its."""

import json
import warnings

import made
import pytest
import torch
from made import ARCHITECTURES, D, F, dictionary

from stagediff import steps
from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.formats import export, resolve_import
from stagediff.sae.layout import CFG, WEIGHTS, from_bytes, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, TrainSpec


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


def inputs() -> torch.Tensor:
    return made.inputs().float()


def save(sae: SAE, folder):
    folder.mkdir(exist_ok=True)
    cfg, weights = to_bytes(sae, {"hook_name": "blocks.3.hook_resid_pre"})
    (folder / CFG).write_bytes(cfg)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def load_theirs(sae_lens, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an old-layout converter would warn
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return sae_lens.SAE.load_from_disk(str(folder))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subtract", [True, False])
def test_sae_lens_computes_the_same_from_our_files(architecture, subtract, tmp_path, sae_lens):
    sae, x = dictionary(architecture, subtract_b_dec=subtract), inputs()
    theirs = load_theirs(sae_lens, save(sae, tmp_path / "sae"))
    f = sae.encode(x)
    assert (f > 0).any()
    assert (f == 0).any()
    assert torch.allclose(theirs.encode(x), f, atol=1e-4)
    assert torch.equal(theirs.encode(x) > 0, f > 0)
    assert torch.allclose(theirs.decode(f), sae.decode(f), rtol=1e-4, atol=1e-3)
    assert theirs.cfg.architecture() == {"relu": "standard", "batchtopk": "jumprelu"}.get(architecture, architecture)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_pre"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_files_read_back_as_the_same_dictionary(architecture):
    sae = dictionary(architecture)
    again = from_bytes(*to_bytes(sae))
    assert again.config == sae.config
    assert again.architecture == architecture, "batchtopk is not taken for the jumprelu it is exported as"
    assert again.input_scale == sae.input_scale
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.allclose(getattr(again, name), getattr(sae, name), rtol=3e-7), name
    assert (again.threshold is None) == (sae.threshold is None)
    assert torch.equal(again.encode(inputs()) > 0, sae.encode(inputs()) > 0)


def test_the_same_dictionary_gives_the_same_bytes():
    assert to_bytes(dictionary("jumprelu")) == to_bytes(dictionary("jumprelu"))


def theirs(sae_lens, architecture: str, **config):
    """An SAE made by sae_lens, with weights that are not its initial ones."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    made = {"standard": (StandardSAE, StandardSAEConfig), "topk": (TopKSAE, TopKSAEConfig), "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig)}
    kind, cfg = made[architecture]
    sae = kind(cfg(d_in=D, d_sae=F, **({"k": 6} if architecture == "topk" else {}), **config))
    g = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g)
    if architecture == "jumprelu":
        sae.threshold.data = torch.rand(F, generator=g) * 3
    return sae


CASES = [
    ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("jumprelu", {}),
]


@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_an_sae_of_sae_lens_is_taken_in_unchanged(architecture, config, tmp_path, sae_lens, store, quiet):
    original, x = theirs(sae_lens, architecture, **config), inputs()
    original.save_model(tmp_path / "theirs")
    spec = resolve_import(tmp_path / "theirs")
    ours = SAE.load(store.artifact(steps.run(spec, store, device="cpu", progress=quiet)))
    assert ours.input_scale == 1
    with torch.no_grad():
        f = original.encode(x)
        assert (f > 0).any()
        assert torch.allclose(ours.encode(x), f, rtol=1e-4, atol=1e-3)
        assert torch.allclose(ours.decode(f), original.decode(f), rtol=1e-4, atol=1e-3)
        again = load_theirs(sae_lens, export(store.artifact(spec.ref), tmp_path / "out"))
        assert torch.allclose(again(x), original(x), rtol=1e-4, atol=1e-3)


def test_an_imported_sae_can_be_finetuned(tmp_path, sae_lens, store, stored, planted, quiet):
    theirs(sae_lens, "jumprelu").save_model(tmp_path / "theirs")
    start = steps.run(resolve_import(tmp_path / "theirs"), store, device="cpu", progress=quiet)
    x, _ = planted(1024, D, 32)
    spec = FinetuneSpec(data=stored(store, x), budget=Budget(tokens=640, batch=64), start=start)
    after = SAE.load(store.artifact(steps.run(spec, store, device="cpu", progress=quiet)))
    assert after.architecture == "jumprelu"
    assert after.input_scale == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_dictionary_exports_with_hook_and_model(architecture, tmp_path, sae_lens, store, stored, planted, quiet):
    x, _ = planted(1024, D, 32, scale=40.0)
    spec = TrainSpec(
        data=stored(store, x), budget=Budget(tokens=1280, batch=64), dictionary=DictionaryConfig(architecture=architecture, features=F, k=5)
    )
    artifact = store.artifact(steps.run(spec, store, device="cpu", progress=quiet))
    other = load_theirs(sae_lens, export(artifact, tmp_path / "out", store))
    ours = SAE.load(artifact)
    assert torch.allclose(other.encode(x[:100]), ours.encode(x[:100]), atol=1e-4)
    assert torch.allclose(other(x[:100]), ours.decode(ours.encode(x[:100])), rtol=1e-4, atol=1e-3)
    assert other.cfg.metadata.hook_name == "blocks.3.hook_resid_pre"
    assert other.cfg.metadata.context_size == 9


def test_the_import_spec_is_known_by_content(tmp_path, sae_lens):
    for name in ("a", "b"):
        theirs(sae_lens, "standard").save_model(tmp_path / name)
    assert resolve_import(tmp_path / "a").key == resolve_import(tmp_path / "b").key
    weights = tmp_path / "b" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert resolve_import(tmp_path / "a").key != resolve_import(tmp_path / "b").key


def test_a_folder_that_is_no_sae_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no cfg\.json"):
        resolve_import(tmp_path)


def test_a_folder_changed_since_it_was_planned_is_refused(tmp_path, store, quiet):
    folder = save(dictionary("relu"), tmp_path / "sae")
    spec = resolve_import(folder)
    save(dictionary("topk"), folder)
    with pytest.raises(UserError, match="not the one"):
        steps.run(spec, store, device="cpu", progress=quiet)


BROKEN = [
    (lambda cfg: cfg.update(architecture="gated"), "architecture is 'gated'"),
    (lambda cfg: cfg.update(normalize_activations="layer_norm"), "normalises its inputs"),
    (lambda cfg: cfg.update(d_sae=41), "do not belong together"),
    (lambda cfg: cfg.pop("d_in"), "does not say d_in"),
    (lambda cfg: cfg.update(k=0), "k is 0"),
    (lambda cfg: cfg["metadata"].update(stagediff={"config": {}}), "not what stagediff writes"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_broken_files_are_refused_with_what_is_wrong(change, message):
    cfg_bytes, weights = to_bytes(dictionary("topk"))
    cfg = json.loads(cfg_bytes)
    change(cfg)
    with pytest.raises(UserError, match=message):
        from_bytes(json.dumps(cfg).encode(), weights)


def test_unreadable_files_and_weights_that_are_not_finite_are_refused():
    sae = dictionary("relu")
    cfg, weights = to_bytes(sae)
    for bad in ((b"{", weights), (cfg, weights[:-10]), (cfg, b"")):
        with pytest.raises(UserError, match="cannot be read"):
            from_bytes(*bad)
    sae.W_dec[3, 3] = float("nan")
    with pytest.raises(UserError, match="W_dec holds NaN"):
        from_bytes(*to_bytes(sae))
