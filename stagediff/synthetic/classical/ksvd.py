"""K-SVD: sparse coding and atom-by-atom updates in turn (Aharon, Elad, Bruckstein 2006), with the approximate update of Rubinstein et al. 2008.

An iteration codes all vectors by pursuit and then goes through the atoms: for those vectors that use atom j, E is what the other atoms leave over; the
atom becomes E^T g / ||E^T g|| with the present coefficients g, which become E d. (The exact method takes E's first singular pair; one such step is
near it and needs no SVD.) An atom that no code uses becomes the worst-represented vector. A vector keeps its former code where the
pursuit, which is greedy, finds a worse one: so the error never rises from one iteration to the next, as long as all data are seen each time
and codes have a fixed length (with an `error` to reach, a shorter code with a larger error may be the better one).

Left alone it often ends with two atoms for one direction, and none for a rarer one. `coherence` is the remedy of the paper's section IV-E: of two atoms
nearer than that the less used one is given up for the worst-represented vector, for which the error may rise for a while.

Memory: the vectors of one iteration, their residuals and k coefficients each; nothing is vectors x atoms. More data than `samples` are read in
turn, `samples` an iteration, in bf16 as SAEs read them. That is a minibatch variant of the published method: codes are not kept, and the error may
rise. Everything is on the CPU.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.batches import Activations, Order, batches, shard_sizes
from stagediff.spec import Value
from stagediff.synthetic.classical.dictionary import AtomDictionary, mean, oriented, random_atoms, unit
from stagediff.synthetic.classical.pursuit import Codes, batch_omp, check_k

__all__ = ["KSVD", "Learnt", "ksvd"]


class Learnt(NamedTuple):
    """A dictionary, and how its error fell."""

    atoms: Tensor
    """[F, d]"""
    codes: Codes
    """Of the last iteration's vectors."""
    errors: list[float]
    """After each iteration: mean of ||x - x_hat||^2 over its vectors."""


class KSVD(Value):
    """Learns a dictionary by K-SVD; its codes are by pursuit."""

    features: PositiveInt
    k: PositiveInt
    """Atoms per vector, at most."""
    error: float = Field(0.0, ge=0)
    """Squared error per vector at which a code is long enough, in learning as in coding (denoising: what the noise makes)."""
    iterations: PositiveInt = 20
    coherence: float = Field(1.0, gt=0)
    """Absolute cosine from which two atoms are one too many, looked at after every iteration but the last; 1: never."""
    samples: PositiveInt = 65_536
    """Vectors of one iteration. Data with no more are used whole every time."""
    centre: bool = False
    """Whether the data's mean is taken off first. (A mean that is itself a sum of atoms is better left in.)"""

    def fit(self, data: Activations, seed: int = 0) -> AtomDictionary:
        """The dictionary, fp32. Raises UserError when k cannot be, when there are fewer vectors than atoms, or when they are not finite."""
        check_k(self.k, data.d, self.features)
        whole = data.n_tokens <= self.samples
        offset = mean(data) if self.centre else torch.zeros(data.d)
        parts = _whole(data, self.iterations) if whole else _in_turn(data, self.samples, self.iterations, seed)
        learnt = ksvd(
            (x - offset for x in parts), self.features, self.k, seed, self.error, self.coherence, keep_codes=whole and not self.error
        )
        return AtomDictionary(oriented(learnt.atoms, learnt.codes), offset, self.k, self.error)


@torch.no_grad()
def ksvd(
    parts: Iterator[Tensor], features: int, k: int, seed: int, error: float = 0.0, coherence: float = 1.0, *, keep_codes: bool = True
) -> Learnt:
    """One iteration per part [n, d]. `keep_codes`: all parts are the same vectors, so that former codes count."""
    atoms, left, former, codes = torch.empty(0), torch.empty(0), torch.empty(0), None
    errors: list[float] = []
    for x in parts:
        if not errors:
            atoms = random_atoms(x, features, seed)
        elif coherence < 1 and codes is not None:
            _renew(atoms, _twins(atoms, codes, coherence), former, left)
        fresh = batch_omp(x, atoms, k, error)
        codes = _better(x, atoms, fresh, codes) if keep_codes and codes is not None else fresh
        left = x - _sum(codes, atoms)
        _renew(atoms, _uses(codes, features) == 0, x, left)
        _sweep(left, atoms, codes)
        former = x
        errors.append(float(left.square().sum(1).mean(dtype=torch.float64)))
    assert codes is not None
    return Learnt(atoms, codes, errors)


def _sum(codes: Codes, atoms: Tensor) -> Tensor:
    """codes @ atoms, [n, d], without a dense matrix of codes."""
    out = codes.value.new_zeros(len(codes.value), atoms.shape[1])
    for slot in range(codes.atom.shape[1]):
        out.addcmul_(atoms[codes.atom[:, slot]], codes.value[:, slot, None])
    return out


def _better(x: Tensor, atoms: Tensor, fresh: Codes, former: Codes) -> Codes:
    """Of each vector the code with the smaller error."""
    was, now = ((x - _sum(codes, atoms)).square().sum(1) for codes in (former, fresh))
    keep = (was < now)[:, None]
    return Codes(torch.where(keep, former.atom, fresh.atom), torch.where(keep, former.value, fresh.value))


def _uses(codes: Codes, features: int) -> Tensor:
    """How many vectors use each atom, [F]."""
    return codes.atom[codes.value != 0].bincount(minlength=features)


def _twins(atoms: Tensor, codes: Codes, coherence: float) -> Tensor:
    """Which atoms [F] have another one that near, which is used more."""
    uses = _uses(codes, len(atoms))
    rank = torch.empty_like(uses).scatter_(0, uses.argsort(descending=True, stable=True), torch.arange(len(atoms)))
    return (((atoms @ atoms.t()).abs() > coherence) & (rank[None] < rank[:, None])).any(1)


def _renew(atoms: Tensor, which: Tensor, x: Tensor, left: Tensor) -> None:
    """The atoms of the mask `which` [F] become the vectors x [n, d] with the largest errors left [n, d], in place."""
    at = which.nonzero()[:, 0][: len(x)]
    atoms[at] = unit(x[left.square().sum(1).topk(len(at)).indices])


def _sweep(left: Tensor, atoms: Tensor, codes: Codes) -> None:
    """Updates every atom and its coefficients, and the residuals left [n, d], in place."""
    k = codes.atom.shape[1]
    place = torch.where(codes.value != 0, codes.atom, len(atoms)).flatten()  # code slots without a coefficient come last
    order = place.argsort(stable=True)
    counts = place.bincount(minlength=len(atoms) + 1).tolist()
    values = codes.value.view(-1)
    for atom, slots in enumerate(order.split(counts)[:-1]):
        if not len(slots):
            continue
        rows = slots // k
        E = torch.addr(left[rows], values[slots], atoms[atom])  # [users, d]
        direction = values[slots] @ E
        norm = direction.norm()
        if not norm > 0:
            continue
        direction /= norm
        g = E @ direction
        left[rows] = E.addr_(g, direction, alpha=-1)
        atoms[atom], values[slots] = direction, g


def _whole(data: Activations, times: int) -> Iterator[Tensor]:
    x = torch.cat([_finite(data.read_shard(i).float()) for i in range(data.n_shards)])
    for _ in range(times):
        yield x


def _in_turn(data: Activations, samples: int, times: int, seed: int) -> Iterator[Tensor]:
    for x in batches(data, Order(seed, shard_sizes(data)), samples, 0, times):
        yield x.float()


def _finite(x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise UserError(
            "The vectors to learn a dictionary from hold NaN or infinite values; finite ones were expected. Check where they come from."
        )
    return x
