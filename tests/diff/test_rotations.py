"""Rotations on planted decoders: features that are known to turn, be born, die or stand still."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from stagediff.diff.decoders import Decoder, aligned_blocks, cosines, nearest
from stagediff.diff.rotations import COSINES, births, new_share_of_examples, new_share_of_mass, rotations
from stagediff.diff.spec import STAGES
from stagediff.errors import UserError

F, D = 60, 16


class Folder:
    """An artifact as far as `Decoder` knows it."""

    def __init__(self, path):
        self.path = path

    def local(self, name=""):
        return self.path / name


def decoder(path, W) -> Decoder:
    path.mkdir()
    save_file({"W_dec": W.float().contiguous()}, path / "sae_weights.safetensors")
    return Decoder(Folder(path))


def turned(v: torch.Tensor, degrees: float, seed: int) -> torch.Tensor:
    """`v` turned by that angle in a random plane through it, scaled by 3 (norms must not matter)."""
    other = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit = v / v.norm()
    other -= (other @ unit) * unit
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return 3 * (torch.cos(angle) * unit + torch.sin(angle) * other / other.norm())


@pytest.fixture
def stages(tmp_path):
    """Feature 0 turns by 60 degrees on both last steps, 1 by 40 with the data alone (S->D, M->F_M), 2 by 50 with the model alone, 3 only directly."""
    base = torch.randn(F, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = {s: base.clone() for s in STAGES}
    W["F_D"][0], W["F_M"][0] = turned(base[0], 60, 1), turned(base[0], 60, 2)
    W["D"][1] = W["F_D"][1] = W["F_M"][1] = turned(base[1], 40, 3)
    W["M"][2] = W["F_D"][2] = W["F_M"][2] = turned(base[2], 50, 4)
    W["F_direct"][3] = turned(base[3], 90, 5)
    return W, {s: decoder(tmp_path / s, W[s]) for s in STAGES}


def test_planted_rotations_show_on_the_axes_they_belong_to(stages):
    table = rotations(stages[1]).set_index("feature")
    cos = lambda degrees: np.cos(np.deg2rad(degrees))  # noqa: E731
    assert table.loc[0, ["x", "y"]].tolist() == pytest.approx([cos(60), cos(60)], abs=1e-6)
    assert table.loc[0, "score"] == pytest.approx(2 * cos(60), abs=1e-6)
    assert table.loc[1, ["x", "y", "cos_s_d", "cos_s_m", "cos_d_m"]].tolist() == pytest.approx([1, cos(40), cos(40), 1, cos(40)], abs=1e-6)
    assert table.loc[2, ["x", "y", "cos_s_d", "cos_s_m", "cos_f_f"]].tolist() == pytest.approx([cos(50), 1, 1, cos(50), 1], abs=1e-6)
    assert table.loc[3, ["x", "y", "cos_s_f_direct"]].tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    assert np.allclose(table.loc[4:, list(COSINES)], 1, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, F, 1000])
def test_blocks_cover_every_row_once_and_agree_with_a_loop(stages, block):
    W, decoders = stages
    seen = []
    for start, stop, rows in aligned_blocks(decoders, block):
        seen += range(start, stop)
        for name, (a, b) in COSINES.items():
            for i, value in enumerate(cosines(rows[a], rows[b]).tolist(), start):
                u, v = W[a][i].float().double().numpy(), W[b][i].float().double().numpy()
                assert value == pytest.approx(u @ v / np.sqrt(u @ u) / np.sqrt(v @ v), abs=1e-12), name
    assert seen == list(range(F))


def test_a_zero_row_has_no_cosine(tmp_path):
    a, b = torch.ones(3, D), torch.ones(3, D)
    a[1] = 0
    assert torch.isnan(cosines(a.double(), b.double())).tolist() == [False, True, False]


def test_taken_rows_are_the_decoders(stages):
    W, decoders = stages
    at = np.array([5, 0, 59, 5])
    assert torch.equal(decoders["S"].take(at), W["S"][at].float().double())


def test_dictionaries_of_different_shape_are_refused(stages, tmp_path):
    other = decoder(tmp_path / "other", torch.randn(F + 1, D))
    with pytest.raises(UserError, match="one shape"):
        rotations({**stages[1], "F_D": other})


@pytest.mark.parametrize("block", [3, 2048])
def test_nearest_rows_equal_a_loop_over_all_pairs(block):
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(20, D, generator=g).double(), torch.randn(31, D, generator=g).double()
    cosine, index = nearest(a, b, block)
    for i in range(20):
        values = [float(a[i] @ b[j] / a[i].norm() / b[j].norm()) for j in range(31)]
        assert int(index[i]) == int(np.argmax(values))
        assert float(cosine[i]) == pytest.approx(max(values))


def test_newborns_are_matched_across_indices(stages, tmp_path):
    """Latents born at 10 (F_D) and 20 (F_M) are one; 11 is born at the same index on both paths; 12 has no counterpart but the nearest."""
    W, _decoders = stages
    W = {s: w.clone() for s, w in W.items()}
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64))[0]
    W["F_D"][10], W["F_M"][20] = basis[0], 5 * basis[0]
    W["F_D"][11], W["F_M"][11] = basis[1], basis[1]
    W["F_D"][12] = basis[0] + 0.5 * basis[2]
    made = {s: decoder(tmp_path / f"new-{s}", W[s]) for s in ("F_D", "F_M")}
    alive = {s: np.ones(F, bool) for s in STAGES}
    alive["S"][[10, 11, 12, 20]] = False
    alive["F_D"][20] = alive["F_M"][10] = alive["F_M"][12] = False
    table = pd.DataFrame({f"alive_{s}": a for s, a in alive.items()})
    found = births(made, table).set_index("feature")
    assert found.index.tolist() == [10, 11, 12]
    assert found.partner.tolist() == [20, 11, 20]
    assert found.cosine.tolist() == pytest.approx([1, 1, 1 / np.sqrt(1.25)], abs=1e-6)
    assert found.same_index.tolist() == [False, True, False]
    assert found.mutual.tolist() == [True, True, False]


def test_newborns_of_one_path_alone_have_no_partner(stages):
    alive = {f"alive_{s}": np.ones(F, bool) for s in STAGES}
    alive["alive_S"] = alive["alive_F_M"] = np.arange(F) != 7
    found = births(stages[1], pd.DataFrame(alive))
    assert found.feature.tolist() == [7]
    assert found.partner.tolist() == [-1]
    assert not found.same_index.any()


def test_shares_of_new_rows():
    examples = pd.DataFrame({"feature": [0, 0, 0, 0, 2], "is_new": [True, True, True, False, False]})
    assert new_share_of_examples(examples, 4).tolist() == pytest.approx([0.75, np.nan, 0.0, np.nan], nan_ok=True)
    mass = pd.DataFrame({"mass_base": [1.0, 0.0, 2.0], "mass_new": [3.0, 0.0, 0.0]})
    assert new_share_of_mass(mass).tolist() == pytest.approx([0.75, np.nan, 0.0], nan_ok=True)
