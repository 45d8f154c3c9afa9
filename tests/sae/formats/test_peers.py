"""All three formats with the packages themselves (extra `peers`): what each makes of our files, and we of its, to 1e-6 in fp64."""

import warnings

import peer_saves
import pytest
import torch
from made import ARCHITECTURES, TOLERANCE, D, F, apart, dictionary, inputs, put, reconstructed

from stagediff import steps
from stagediff.sae.dictionary import SAE
from stagediff.sae.formats import export, resolve_import

CASES = [(to, a) for to in ("saelens", "dictionary_learning") for a in ARCHITECTURES] + [("sparsify", "topk")]
CLASSES = (
    "AutoEncoder",
    "april",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def package(name: str) -> None:
    """Skips the test where the package (or what it imports) is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = {"saelens": "sae_lens", "dictionary_learning": "dictionary_learning.training", "sparsify": "sparsify"}[name]
        pytest.importorskip(module, exc_type=ImportError)


def forward(name: str, folder, x: torch.Tensor) -> torch.Tensor:
    """The package's reconstruction."""
    if name == "saelens":
        import sae_lens

        with torch.no_grad():
            return sae_lens.SAE.load_from_disk(str(folder)).double()(x)
    return {"dictionary_learning": peer_saves.dictionary_learning_forward, "sparsify": peer_saves.sparsify_forward}[name](folder, x)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Class -> folder, trained on activations that dictionary_learning divided by their norm."""
    package("dictionary_learning")
    return peer_saves.dictionary_learning(tmp_path_factory.mktemp("trained"), D, F, 5, normalize=True)


@pytest.fixture
def taken_in(store, quiet):
    return lambda folder: store.artifact(steps.run(resolve_import(folder), store, device="cpu", progress=quiet))


@pytest.mark.parametrize(("to", "architecture"), CASES)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("scale", [0.037, 7.3])
def test_the_package_reconstructs_raw_activations_as_we_do(to, architecture, subtract, norm, scale, tmp_path, store):
    package(to)
    sae, x = dictionary(architecture, scale=scale, subtract_b_dec=subtract, decoder_norm=norm), inputs() * (0.037 / scale)
    folder = export(put(store, sae), tmp_path / "out", to=to)
    assert apart(forward(to, folder, x), reconstructed(sae, x)) < TOLERANCE


@pytest.mark.parametrize("name", CLASSES)
def test_what_dictionary_learning_trained_comes_in_and_goes_out_again(name, tmp_path, trained, taken_in):
    x = peer_saves.planted(D)[0].double()
    theirs = forward("dictionary_learning", trained[name], x)
    artifact = taken_in(trained[name])
    assert apart(reconstructed(SAE.load(artifact), x), theirs) < TOLERANCE
    again = export(artifact, tmp_path / "again", to="dictionary_learning")
    assert apart(forward("dictionary_learning", again, x), theirs) < TOLERANCE


def test_what_sparsify_saved_comes_in_and_goes_out_again(tmp_path, taken_in):
    package("sparsify")
    folder, x = peer_saves.sparsify(tmp_path / "theirs", D, F, 5), inputs()
    theirs = forward("sparsify", folder, x)
    artifact = taken_in(folder)
    assert apart(reconstructed(SAE.load(artifact), x), theirs) < TOLERANCE
    assert apart(forward("sparsify", export(artifact, tmp_path / "again", to="sparsify"), x), theirs) < TOLERANCE


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_scale_is_folded_as_dictionary_learning_folds_its_own(architecture, tmp_path, store):
    package("dictionary_learning")
    from dictionary_learning.utils import load_dictionary

    unscaled, scaled = dictionary(architecture, scale=1.0), dictionary(architecture, scale=0.25)
    theirs, _ = load_dictionary(str(export(put(store, unscaled), tmp_path / "1", to="dictionary_learning")), "cpu")
    ours, _ = load_dictionary(str(export(put(store, scaled), tmp_path / "0.25", to="dictionary_learning")), "cpu")
    theirs.scale_biases(4.0)  # what its training does with a norm of 4
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
