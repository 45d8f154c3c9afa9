"""The common rotation against scipy's, and what taking it out does."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import expm, orthogonal_procrustes

from stagediff.diff.decoders import Decoder
from stagediff.diff.procrustes import Turned, common_rotation
from stagediff.diff.rotations import rotations
from stagediff.diff.spec import STAGES

F, D = 120, 16


class Folder:
    """An artifact as far as `Decoder` knows it."""

    def __init__(self, path):
        self.path = path

    def local(self, name=""):
        return self.path / name


@pytest.fixture
def decoders(tmp_path):
    """make(stage -> rows) -> stage -> Decoder."""

    def make(rows):
        made = {}
        for stage, W in rows.items():
            folder = tmp_path / stage
            folder.mkdir()
            save_file({"W_dec": W.float().contiguous()}, folder / "sae_weights.safetensors")
            made[stage] = Decoder(Folder(folder))
        return made

    return make


def rotation(angle: float, seed: int = 0) -> torch.Tensor:
    raw = np.random.default_rng(seed).standard_normal((D, D))
    return torch.from_numpy(expm(np.radians(angle) * (raw - raw.T) / np.sqrt(2 * D)))


def rows(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(F, D, generator=g, dtype=torch.float64) * torch.rand(F, 1, generator=g, dtype=torch.float64)


def unit(W) -> np.ndarray:
    W = W.float().double().numpy()
    return W / np.linalg.norm(W, axis=1, keepdims=True)


def test_it_is_scipys_on_unit_rows_of_alive_features(decoders):
    S = rows(0)
    M = S @ rotation(20) + 0.1 * rows(1)
    alive = np.arange(F) % 3 > 0
    found = common_rotation(decoders({"S": S, "M": M}), alive)
    expected, _ = orthogonal_procrustes(unit(S)[alive], unit(M)[alive])
    np.testing.assert_allclose(found.matrix.numpy(), expected, atol=1e-10)
    assert found.features == alive.sum()
    assert found.before == pytest.approx((unit(S) * unit(M)).sum(1)[alive].mean())
    assert found.after == pytest.approx(((unit(S) @ expected) * unit(M)).sum(1)[alive].mean())
    assert found.after > found.before


def test_a_pure_rotation_is_found_and_so_is_its_angle(decoders):
    S, Q = rows(0), rotation(25)
    found = common_rotation(decoders({"S": S, "M": 3 * S @ Q}), np.ones(F, bool))
    np.testing.assert_allclose(found.matrix.numpy(), Q.numpy(), atol=1e-5)
    turned = np.degrees(np.arccos(((unit(S) @ Q.numpy()) * unit(S)).sum(1)))
    assert found.angle == pytest.approx(turned.mean(), abs=1e-3)
    assert found.after == pytest.approx(1, abs=1e-6)


def test_without_alive_features_nothing_is_turned(decoders):
    found = common_rotation(decoders({"S": rows(0), "M": rows(1)}), np.zeros(F, bool))
    assert torch.equal(found.matrix, torch.eye(D, dtype=torch.float64))
    assert found.features == 0


def test_taking_it_out_leaves_what_turned_by_itself(decoders):
    """All of the finetuned model is turned by 30 degrees; feature 5 by 60 more."""
    S, Q = rows(0), rotation(30)
    W = {s: S.clone() for s in STAGES}
    for stage in ("M", "F_D", "F_M", "F_direct"):
        W[stage] = S @ Q
    own = W["F_D"][5] / W["F_D"][5].norm()
    other = torch.randn(D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    other -= (other @ own) * own
    W["F_D"][5] = 0.5 * own + np.sqrt(0.75) * other / other.norm()
    made = decoders(W)
    plain = rotations(made)
    assert plain.x.drop(5).max() < 0.999
    found = common_rotation(made, np.ones(F, bool))
    turned = rotations({**made, **{s: Turned(made[s], found) for s in ("S", "D")}})
    for name in ("x", "cos_s_m", "cos_d_m", "cos_s_f_direct"):
        assert turned[name].drop(5).min() > 1 - 1e-6, name
    assert turned.x[5] == pytest.approx(0.5, abs=1e-5)
    np.testing.assert_allclose(turned.y, plain.y)
    np.testing.assert_allclose(turned.cos_s_d, plain.cos_s_d, atol=1e-12)


def test_turned_rows_can_be_taken(decoders):
    made = decoders({"S": rows(0), "M": rows(0) @ rotation(10)})
    turned = Turned(made["S"], common_rotation(made, np.ones(F, bool)))
    np.testing.assert_allclose(turned.take(np.array([7, 2])).numpy(), turned.rows(0, F)[[7, 2]].numpy())
