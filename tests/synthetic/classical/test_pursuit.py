"""Batch-OMP against scikit-learn's, and what it refuses."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp_gram

from stagediff.errors import UserError
from stagediff.synthetic.classical import pursuit
from stagediff.synthetic.classical.dictionary import unit
from stagediff.synthetic.classical.pursuit import batch_omp


def drawn(n: int = 200, d: int = 20, features: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), unit(torch.randn(features, d, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_codes_are_scikit_learns(k):
    x, atoms = drawn()
    theirs = orthogonal_mp_gram((atoms @ atoms.T).numpy(), (atoms @ x.T).numpy(), n_nonzero_coefs=k).reshape(len(atoms), -1).T
    np.testing.assert_allclose(batch_omp(x, atoms, k).dense(len(atoms)).numpy(), theirs, atol=1e-9)


def test_codes_to_an_error_are_scikit_learns():
    x, atoms = drawn()
    theirs = orthogonal_mp_gram(
        (atoms @ atoms.T).numpy(), (atoms @ x.T).numpy(), tol=6.0, norms_squared=x.square().sum(1).numpy(), copy_Gram=True
    ).T
    mine = batch_omp(x, atoms, 20, error=6.0)
    np.testing.assert_allclose(mine.dense(len(atoms)).numpy(), theirs, atol=1e-9)
    lengths = (mine.value != 0).sum(1)
    assert lengths.min() < lengths.max()  # they do differ
    assert ((x - mine.dense(len(atoms)) @ atoms).square().sum(1) <= 6.0 + 1e-9).all()


def test_parts_do_not_matter(monkeypatch):
    x, atoms = drawn()
    whole = batch_omp(x, atoms, 4).dense(len(atoms))
    monkeypatch.setattr(pursuit, "HELD_VALUES", 7 * 4 * len(atoms))  # seven vectors at a time
    torch.testing.assert_close(batch_omp(x, atoms, 4).dense(len(atoms)), whole)


def test_a_vector_that_is_a_sum_of_fewer_atoms_gets_no_more():
    atoms = torch.eye(6, dtype=torch.float64)
    x = torch.stack([2 * atoms[1] - 3 * atoms[4], torch.zeros(6, dtype=torch.float64)])
    codes = batch_omp(x, atoms, 4)
    torch.testing.assert_close(codes.dense(6), x)
    assert (codes.value != 0).sum(1).tolist() == [2, 0]


def test_a_repeated_atom_is_taken_once():
    x, atoms = drawn(n=30, d=8, features=6)
    twice = torch.cat([atoms, atoms])
    codes = batch_omp(x, twice, 7)
    assert torch.isfinite(codes.value).all()
    torch.testing.assert_close(codes.dense(12) @ twice, batch_omp(x, atoms, 6).dense(6) @ atoms)


@pytest.mark.parametrize(("k", "said"), [(0, "k is 0"), (21, "1 to 20 of 50 atoms"), (-3, "k is -3")])
def test_an_impossible_k_is_refused(k, said):
    x, atoms = drawn()
    with pytest.raises(UserError, match=said):
        batch_omp(x, atoms, k)


def test_another_width_is_refused():
    x, atoms = drawn()
    with pytest.raises(UserError, match=r"\(200, 19\).*width 20"):
        batch_omp(x[:, :19], atoms, 3)
