"""Paths of decoder directions against scikit-learn's PCA, plain loops and paths of known shape."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from stagediff.track.trajectories import cosines, path_length, project


def paths(n: int, T: int, d: int, seed: int = 0, move: float = 0.4) -> torch.Tensor:
    """Random walks of unnormalised rows."""
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(n, 1, d, generator=g, dtype=torch.float64)
    return start + (move * torch.randn(n, T, d, generator=g, dtype=torch.float64)).cumsum(1)


@pytest.mark.parametrize("point", [0, 2, -1])
def test_cosines_equal_float64_loops(point):
    rows = paths(7, 5, 11)
    to_point, to_previous = cosines(rows, point)
    x = rows.numpy()
    for i in range(7):
        for t in range(5):
            u, v = x[i, t], x[i, point]
            assert float(to_point[i, t]) == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), abs=1e-14)
            if t:
                v = x[i, t - 1]
                assert float(to_previous[i, t]) == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), abs=1e-14)
    assert torch.isnan(to_previous[:, 0]).all()


@pytest.mark.parametrize(("n", "T", "d"), [(1, 2, 1), (1, 2, 3), (3, 5, 17), (40, 12, 128), (5, 30, 1000), (2, 7, 9001)])
def test_equal_rows_have_cosine_exactly_one(n, T, d):
    """Whatever the shape of the block: every odd point repeats the one before it, the last one the first, all of them fp32 as stored."""
    rows = paths(n, T, d, seed=d).float().double()
    rows[:, 1::2] = rows[:, : T - T % 2 : 2]
    rows[:, -1] = rows[:, 0]
    to_first, to_previous = cosines(rows, 0)
    assert (to_first[:, -1] == 1).all()
    repeats = torch.arange(1, T - 1, 2)
    assert (to_previous[:, repeats] == 1).all()
    assert (to_first[:, 0] == 1).all()


def test_a_move_far_below_fp32_resolution_still_shows():
    rows = torch.zeros(1, 2, 3, dtype=torch.float64)
    rows[0, :, 0] = 1
    rows[0, 1, 1] = 1e-6
    assert 1 - float(cosines(rows, 0)[0][0, 1]) == pytest.approx(5e-13, rel=1e-3)


def test_a_zero_row_has_no_cosine_no_projection_and_no_length():
    rows = paths(3, 4, 6)
    rows[1, 2] = 0
    to_final, to_previous = cosines(rows, -1)
    assert torch.isnan(to_final[1]).tolist() == [False, False, True, False]
    assert torch.isnan(to_previous[1]).tolist() == [True, False, True, True]
    assert torch.isnan(path_length(to_previous)).tolist() == [False, True, False]
    pc, explained = project(rows)
    assert torch.isnan(pc[1]).all()
    assert torch.isnan(explained).tolist() == [False, True, False]
    assert torch.isfinite(pc[[0, 2]]).all()


@pytest.mark.parametrize(("T", "d"), [(2, 5), (3, 20), (12, 64), (30, 8), (9, 1)])
def test_projection_equals_pca_up_to_sign(T, d):
    rows = paths(20, T, d, seed=T)
    pc, explained = project(rows)
    for i, x in enumerate(rows.numpy()):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        if np.allclose(unit, unit[0]):
            assert np.isnan(explained[i])  # d = 1: a path that never changes its sign
            continue
        pca = PCA(n_components=min(2, T, d), svd_solver="full").fit(unit)
        assert float(explained[i]) == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-9)
        expected = pca.transform(unit)
        for c in range(expected.shape[1]):
            mine = pc[i, :, c].numpy()
            assert min(np.abs(mine - expected[:, c]).max(), np.abs(mine + expected[:, c]).max()) < 1e-7


def test_both_coordinates_grow_from_start_to_end():
    pc, _ = project(paths(200, 8, 16))
    assert (pc[:, -1] > pc[:, 0]).all()


def test_the_sign_of_a_closed_path_is_its_largest_entrys():
    """There and back: start and end are level, so the turning point decides; and the mirrored path gives the same."""
    out = torch.linspace(0, 1, 5, dtype=torch.float64)
    angle = torch.cat([out, out[:-1].flip(0)])
    path = torch.stack([angle.cos(), angle.sin(), torch.zeros(9, dtype=torch.float64)], 1)
    mirrored = path * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    (a, b), _ = project(torch.stack([path, mirrored]))
    assert torch.allclose(a, b)
    assert int(a[:, 0].abs().argmax()) == 4
    assert float(a[4, 0]) > 0


def test_norms_do_not_matter_and_a_still_path_has_no_variance():
    rows = paths(4, 6, 10)
    scaled = rows * torch.rand(4, 6, 1, dtype=torch.float64).add(0.5)
    assert torch.allclose(project(rows).pc, project(scaled).pc, atol=1e-12)
    still = (rows[:, :1] * torch.rand(4, 6, 1, dtype=torch.float64).add(0.5)).float().double()  # equal but for fp32's rounding
    pc, explained = project(still)
    assert torch.isnan(explained).all()
    assert (pc == 0).all()


def test_the_length_of_an_arc_is_its_angle():
    angles = torch.deg2rad(torch.tensor([0.0, 10, 25, 90, 60], dtype=torch.float64))
    arc = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert float(path_length(cosines(arc, -1)[1])[0]) == pytest.approx(10 + 15 + 65 + 30, abs=1e-9)
    assert project(arc).explained.tolist() == pytest.approx([1.0])
