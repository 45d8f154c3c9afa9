"""K-SVD, online learning and an SAE on an easy planted dictionary, through the interface that they share."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.sae.layout import from_bytes, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.synthetic.classical.compare import recovery
from stagediff.synthetic.classical.dictionary import AtomDictionary, InMemory, by_pursuit, random_atoms
from stagediff.synthetic.classical.ksvd import KSVD, _renew, _twins, _uses, ksvd
from stagediff.synthetic.classical.online import OnlineLearning
from stagediff.synthetic.classical.pursuit import batch_omp
from stagediff.synthetic.classical.saes import SAETraining

LEARNERS = {
    "ksvd": KSVD(features=32, k=2, iterations=12),
    "ksvd in parts": KSVD(features=32, k=2, iterations=12, samples=1000),
    "online": OnlineLearning(features=32, k=2, l1=0.1, batch=128, epochs=3),
    "topk": SAETraining(
        dictionary=DictionaryConfig(architecture="topk", features=32, k=2, dead_after=10_000),
        budget=Budget(tokens=200_000, batch=256, lr=5e-3),
    ),
}


@pytest.fixture(scope="module")
def learnt(easy):
    return {name: learner.fit(InMemory(easy[0], shard=700), 1) for name, learner in LEARNERS.items()}


@pytest.mark.parametrize("name", LEARNERS)
def test_planted_atoms_are_found_where_drawn_vectors_are_not_enough(name, learnt, easy):
    x, atoms = easy
    drawn, _ = recovery(random_atoms(x, 32, 1), atoms)
    found, mmcs = recovery(learnt[name].directions(), atoms)
    assert drawn < 0.5 < 0.7 < found
    assert mmcs > 0.9


@pytest.mark.parametrize("name", LEARNERS)
def test_the_interface_is_one(name, learnt, easy):
    dictionary, x = learnt[name], easy[0][:10]
    assert (dictionary.d, dictionary.features) == (16, 32)
    f = dictionary.encode(x)
    assert f.shape == (10, 32)
    assert ((f != 0).sum(1) <= 2).all()
    assert dictionary.decode(f).shape == (10, 16)
    torch.testing.assert_close(dictionary.directions().norm(dim=1), torch.ones(32))
    pursued = by_pursuit(dictionary, 2)
    torch.testing.assert_close(pursued.decode(torch.zeros(1, 32)), dictionary.decode(torch.zeros(1, 32)))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_gives_the_same_bytes(name, learnt, easy):
    again, other = (LEARNERS[name].fit(InMemory(easy[0], shard=700), seed).directions() for seed in (1, 2))
    assert again.numpy().tobytes() == learnt[name].directions().numpy().tobytes()
    assert not torch.equal(again, other)


@pytest.mark.parametrize("seed", range(3))
def test_ksvds_error_never_rises(seed, easy):
    x = easy[0][:600]
    errors = ksvd(iter([x] * 15), 32, 3, seed).errors
    assert len(errors) == 15
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    start = random_atoms(x, 32, seed)
    undone = (x - batch_omp(x, start, 3).dense(32) @ start).square().sum(1).mean()
    assert errors[0] < 0.9 * undone
    assert errors[-1] < 0.5 * errors[0]


def test_ksvds_errors_are_those_of_its_codes(easy):
    x = easy[0][:600]
    made = ksvd(iter([x] * 4), 32, 3, 0)
    error = (x.double() - made.codes.dense(32).double() @ made.atoms.double()).square().sum(1).mean()
    assert made.errors[-1] == pytest.approx(float(error), rel=1e-4)


def test_an_atom_that_is_given_up_becomes_the_worst_represented_vector():
    x, atoms = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 3.0, 4.0]]), torch.eye(4)[[0, 1, 0]]
    codes = batch_omp(x, atoms, 1)
    assert _uses(codes, 3).tolist() == [1, 1, 0]
    which = _twins(atoms, codes, 0.9)
    assert which.tolist() == [False, False, True]
    _renew(atoms, which, x, x - codes.dense(3) @ atoms)
    torch.testing.assert_close(atoms[2], torch.tensor([0, 0, 0.6, 0.8]))


def test_giving_up_twins_leaves_fewer_of_them_and_finds_no_less(easy):
    x, atoms = easy
    twins, found = {}, {}
    for coherence in (1.0, 0.9):
        learnt = [KSVD(features=40, k=2, iterations=12, coherence=coherence).fit(InMemory(x[:1500]), seed).atoms for seed in range(3)]
        twins[coherence] = sum(int(((a @ a.T).abs().fill_diagonal_(0) > 0.9).sum()) for a in learnt)
        found[coherence] = sum(recovery(a, atoms)[0] for a in learnt)
    assert twins[0.9] < twins[1.0]
    assert found[0.9] >= found[1.0]


@pytest.mark.parametrize("learner", [KSVD(features=32, k=2, iterations=6, centre=True), OnlineLearning(features=32, k=2, centre=True)])
def test_a_mean_can_be_taken_off(learner, easy):
    x = easy[0] + 10.0
    dictionary = learner.fit(InMemory(x))
    torch.testing.assert_close(dictionary.decode(torch.zeros(1, 32))[0], x.mean(0))
    assert (x - dictionary.decode(dictionary.encode(x))).square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_atoms_point_where_their_coefficients_are_positive(learnt, easy):
    for name in ("ksvd", "online"):
        assert (learnt[name].encode(easy[0]).sum(0) > -1e-3).float().mean() > 0.9


def test_atoms_as_an_sae_are_a_dictionary_artifacts_files(learnt, easy):
    x, atoms = easy[0], learnt["ksvd"]
    sae = from_bytes(*to_bytes(atoms.as_sae()))
    assert isinstance(sae, SAE)
    torch.testing.assert_close(sae.directions(), atoms.directions())
    correlations = (x @ atoms.atoms.T).topk(2).values.clamp_min(0).sum(1)
    torch.testing.assert_close(sae.encode(x).sum(1), correlations)

    def left(d):
        return float((x - d.decode(d.encode(x))).square().sum())

    assert left(atoms) < left(sae) < float(x.square().sum())


@pytest.mark.parametrize("kind", [KSVD, OnlineLearning])
def test_what_cannot_be_learnt_is_refused(kind, easy):
    data = InMemory(easy[0])
    with pytest.raises(UserError, match="1 to 16 of 32 atoms"):
        kind(features=32, k=17).fit(data)
    with pytest.raises(UserError, match="1 to 4 of 4 atoms"):
        kind(features=4, k=5).fit(data)
    with pytest.raises(UserError, match=r"5000 atoms.*has 3000"):
        kind(features=5000, k=2).fit(data)
    with pytest.raises(UserError, match="NaN or infinite"):
        kind(features=32, k=2).fit(InMemory(easy[0] / 0))
    with pytest.raises(ValidationError, match="greater than 0"):
        kind(features=32, k=0)


def test_less_than_a_batch_is_refused(easy):
    few = InMemory(easy[0][:100])
    with pytest.raises(UserError, match="less than one batch of 256"):
        OnlineLearning(features=32, k=2, epochs=1).fit(few)
    with pytest.raises(UserError, match="less than one batch of 256"):
        SAETraining(dictionary=DictionaryConfig(), budget=Budget(tokens=255, batch=256)).fit(few)


def test_an_impossible_dictionary_is_refused_before_it_is_used():
    with pytest.raises(UserError, match="k is 9"):
        AtomDictionary(torch.eye(8), torch.zeros(8), 9)
