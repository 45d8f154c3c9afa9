"""`stagediff classical`: the comparison on planted atoms and the photograph, small, and what the command refuses."""

import io
import json

import pytest
import torch
from matplotlib.image import imread
from typer import Typer
from typer.testing import CliRunner

from stagediff import steps
from stagediff.errors import UserError
from stagediff.progress import Progress
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.synthetic.classical import compare, denoise, figure, photograph
from stagediff.synthetic.classical.command import command
from stagediff.synthetic.classical.figure import figure_png, mosaic
from stagediff.synthetic.classical.ksvd import KSVD
from stagediff.synthetic.classical.saes import SAETraining

QUIET = Progress(interactive=False)
QUICK = SAETraining(dictionary=DictionaryConfig(architecture="topk", features=64, k=4), budget=Budget(tokens=8192, batch=512))


@pytest.fixture(scope="module")
def compared():
    return compare.compare([3], {"ksvd": KSVD(features=256, k=4, iterations=2), "topk": QUICK}, progress=QUIET)


def test_the_comparison_stands_between_truth_and_chance(compared):
    rows = compared.set_index("method")
    assert rows.index.tolist() == ["planted", "random", "ksvd", "topk"]
    assert rows.recovered["planted"] == 1
    assert rows.mmcs["planted"] == pytest.approx(1)
    assert rows.recovered["random"] < rows.recovered["ksvd"]
    assert rows.fvu["planted"] < rows.fvu["ksvd"] < rows.fvu["random"] < 1
    assert rows.fvu["ksvd"] == rows.fvu_pursuit["ksvd"]  # its own encoder is pursuit
    assert rows.fvu_pursuit["topk"] < rows.fvu["topk"]
    assert (rows.l0 <= 4).all()
    assert (rows.seconds[["ksvd", "topk"]] > 0).all()


def test_threads_are_as_before():
    before = torch.get_num_threads()
    with compare.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def corner():
    """A corner of the photograph, and it denoised."""
    whole = photograph.photograph
    learners = {"cosines": denoise.LEARNERS["cosines"], "ksvd": KSVD(features=64, k=8, error=denoise.ERROR, iterations=3), "topk": QUICK}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoise, "photograph", lambda name: whole(name)[60:110, 100:160])
        return denoise.denoise("china", [0], learners, progress=QUIET)


def test_noise_is_taken_off(corner):
    table, picture = corner
    rows = table.set_index("method")
    assert rows.noisy["ksvd"] == pytest.approx(20.17, abs=0.3)  # 20 log10(255 / 25)
    assert (rows.pursuit[["cosines", "ksvd"]] > rows.noisy["ksvd"] + 3).all()
    assert picture.best["ksvd"].shape == picture.clean.shape == (50, 60)
    assert photograph.psnr(picture.best["ksvd"], picture.clean) == pytest.approx(rows.pursuit["ksvd"])


@pytest.fixture(scope="module")
def png(corner):
    return figure_png(corner[1])


def test_the_figure_is_the_same_png_each_time(corner, png):
    assert png == figure_png(corner[1])
    assert imread(io.BytesIO(png), format="png").shape[2] in (3, 4)


def test_patches_make_the_picture_again():
    image = torch.rand(20, 31, generator=torch.Generator().manual_seed(0))
    of = photograph.patches(image)
    assert of.shape == (13 * 24, 64)
    torch.testing.assert_close(of[25].reshape(8, 8), image[1:9, 1:9])
    torch.testing.assert_close(photograph.joined(of, image.shape), image)


def test_psnr_is_that_of_the_formula():
    assert photograph.psnr(torch.full((4, 4), 0.6), torch.full((4, 4), 0.5)) == pytest.approx(20, abs=1e-4)


def test_cosines_are_unit_atoms_that_span_all_patches():
    atoms = photograph.cosines()
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(256))
    assert torch.linalg.matrix_rank(atoms.double()) == 64


def test_a_mosaic_shows_every_atom():
    shown = mosaic(torch.rand(9, 64), side=3)
    assert shown.shape == (28, 28)
    assert (shown[0] == 1).all()
    assert shown[1:9, 1:9].min() == 0


@pytest.fixture
def cli(monkeypatch, compared, corner, png):
    """The command with everything already computed."""
    monkeypatch.setattr(compare, "compare", lambda seeds: compared.assign(seed=seeds[0]))
    monkeypatch.setattr(denoise, "denoise", lambda name, seeds: corner)
    monkeypatch.setattr(figure, "figure_png", lambda picture: png)
    app = Typer()
    app.command()(command)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_is_registered_and_prints_json_and_tables(cli, tmp_path, png):
    assert steps.commands()["classical"] == "stagediff.synthetic.classical.command:command"
    printed = json.loads(cli("--seed", 7, "--json").output)
    assert {row["seed"] for row in printed["rows"]} == {7}
    assert [row["method"] for row in printed["medians"]] == ["planted", "random", "ksvd", "topk"]
    assert "MMCS" in cli().output
    out = tmp_path / "new" / "picture.png"
    assert json.loads(cli("--image", "--out", out, "--json").output)["picture"] == str(out)
    assert out.read_bytes() == png
    assert "PSNR" in cli("--image", "--out", out).output


def test_a_picture_that_cannot_be_written_is_said(cli, tmp_path):
    error = cli("--image", "--out", tmp_path).exception
    assert isinstance(error, UserError)
    assert "--out" in str(error)


def test_an_unknown_photograph_is_refused():
    with pytest.raises(UserError, match="'dog'.*china and flower"):
        denoise.denoise("dog", [0])
