"""What an SAE and a classical dictionary have in common, and the classical one.

A classical dictionary's encoder is a search (orthogonal matching pursuit), not a matrix and an activation function: as an SAE "architecture" it would
have encoder weights that mean nothing and a gradient that nothing trains. So both satisfy a small protocol instead, and what learns them another:
`learner.fit(data, seed)` gives a dictionary with `encode`, `decode` and `directions`. Where something has to read an SAE (statistics, a diff, an
artifact of kind `dictionaries`), `as_sae` gives the same atoms with the nearest encoder that an SAE has.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.batches import Activations
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.spec import DictionaryConfig
from stagediff.synthetic.classical.pursuit import Codes, batch_omp, check_k

__all__ = ["AtomDictionary", "InMemory", "Learner", "SparseDictionary", "by_pursuit", "mean", "oriented", "random_atoms", "unit"]


class SparseDictionary(Protocol):
    """F directions in d dimensions with sparse codes: an SAE (`stagediff.sae.dictionary.SAE`), or an `AtomDictionary`."""

    @property
    def d(self) -> int: ...

    @property
    def features(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor:
        """Codes [n, F] of vectors [n, d]."""
        ...

    def decode(self, f: Tensor) -> Tensor:
        """Vectors [n, d] from codes [n, F]."""
        ...

    def directions(self) -> Tensor:
        """Unit atoms, or decoder rows, [F, d]."""
        ...


class Learner(Protocol):
    """Something that learns a dictionary: KSVD, OnlineLearning, SAETraining."""

    def fit(self, data: Activations, seed: int = 0) -> SparseDictionary: ...


@dataclass
class AtomDictionary:
    """Unit atoms; x is coded as offset + codes @ atoms, by pursuit with k atoms at most."""

    atoms: Tensor
    """[F, d], of norm 1."""
    offset: Tensor
    """[d], taken off before coding: 0, or the data's mean."""
    k: int
    error: float = 0.0
    """Squared error per vector at which its code is long enough."""

    def __post_init__(self) -> None:
        check_k(self.k, self.d, self.features)

    @property
    def d(self) -> int:
        return self.atoms.shape[1]

    @property
    def features(self) -> int:
        return self.atoms.shape[0]

    def codes(self, x: Tensor) -> Codes:
        """Sparse codes of x [n, d] (any float type; computed in the atoms'). Raises UserError when x has another width."""
        return batch_omp(x.to(self.atoms.dtype) - self.offset, self.atoms, self.k, self.error)

    def encode(self, x: Tensor) -> Tensor:
        """The same as [n, F]. Coefficients have either sign."""
        return self.codes(x).dense(self.features)

    def decode(self, f: Tensor) -> Tensor:
        """Vectors [n, d] from codes f [n, F]."""
        return torch.addmm(self.offset, f.to(self.atoms.dtype), self.atoms)

    def directions(self) -> Tensor:
        return self.atoms

    def as_sae(self) -> SAE:
        """The same atoms as a topk SAE: decoder and tied encoder are the atoms, b_dec is the offset.

        Its codes are the k largest positive correlations: one step of thresholding instead of a pursuit, so it reconstructs less well than this
        dictionary does, and nothing that needs a negative coefficient. `stagediff.sae.layout.to_bytes` writes it.
        """
        config = DictionaryConfig(architecture="topk", features=self.features, k=self.k)
        atoms = self.atoms.float()
        return SAE(atoms.t().contiguous(), torch.zeros(self.features), atoms.clone(), self.offset.float(), resolved(config, self.d))


def by_pursuit(dictionary: SparseDictionary, k: int, error: float = 0.0) -> AtomDictionary:
    """Another dictionary's directions, an SAE's say, with pursuit as the encoder: what its atoms are worth whatever its own encoder is."""
    nothing = torch.zeros(1, dictionary.features)
    return AtomDictionary(dictionary.directions(), dictionary.decode(nothing)[0], k, error)


@dataclass
class InMemory:
    """Vectors [n, d] as `Activations`, in shards of `shard` vectors."""

    x: Tensor
    shard: int = 1 << 14

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @property
    def n_tokens(self) -> int:
        return len(self.x)

    @property
    def n_shards(self) -> int:
        return -(-len(self.x) // self.shard)

    def shard_tokens(self, i: int) -> int:
        return len(self.read_shard(i))

    def read_shard(self, i: int) -> Tensor:
        return self.x[i * self.shard : (i + 1) * self.shard]


def unit(rows: Tensor) -> Tensor:
    """Rows [F, d] made to have norm 1."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def mean(data: Activations) -> Tensor:
    """The mean [d] of all vectors."""
    total = torch.zeros(data.d, dtype=torch.float64)
    for i in range(data.n_shards):
        total += data.read_shard(i).double().sum(0)
    return (total / max(1, data.n_tokens)).float()


def random_atoms(x: Tensor, features: int, seed: int) -> Tensor:
    """Where learning starts: `features` of the vectors x [n, d] drawn without repetition, scaled to norm 1 (Aharon et al. 2006, section IV).

    Raises UserError when there are fewer vectors that are not 0.
    """
    usable = (x.square().sum(1) > 0).nonzero()[:, 0]
    if len(usable) < features:
        raise UserError(
            f"A dictionary of {features} atoms starts from as many vectors of the data, which has {len(usable)} that are not 0. Give more data, or ask for "
            "fewer atoms."
        )
    chosen = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))[:features]
    return unit(x[usable[chosen]])


def oriented(atoms: Tensor, codes: Codes) -> Tensor:
    """The atoms, each with the sign that makes its coefficients positive on the whole: a code and its atom may both be turned round."""
    total = atoms.new_zeros(len(atoms)).index_add_(0, codes.atom.flatten(), codes.value.flatten())
    return torch.where(total < 0, -1.0, 1.0)[:, None] * atoms
