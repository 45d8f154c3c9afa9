"""The planted world of a stage-wise diff: features, their directions in the four cells (model x data), rows and activations, all from a DiffWorld.

An activation is x = sum_i a_i u_i(model, data) + noise. Feature i fires on a token of a row with topic t with probability
min(0.9, p_i(data) m_it), p by Zipf's law on base data, m_it lognormal with mean 1 (so features of one topic are correlated); its amplitude is even between
0.5 and 1.5. Firings and noise are the same in both models: rows are paired, as a harvest's are.
"""

import hashlib
from functools import cached_property

import numpy as np
import torch

from stagediff.synthetic.diff_spec import BLOCK_ROWS, DiffWorld

__all__ = ["PlantedDiff"]

FLAT = 10
RARE = 0.001
"""How often `turns` features fire on base data, per token."""
ON_NEW_ROWS = (0.04, 0.15)
"""How often features of new data fire on new rows, per token: even between these."""
LESS_ON_NEW_ROWS = 0.5
"""Base features fire so much less there."""
MOST_OFTEN = 0.9


class PlantedDiff:
    """A world's features and activations. G features, base ones first, by falling frequency."""

    def __init__(self, world: DiffWorld):
        self.world = world
        self.classes = self._classes()

    def __len__(self) -> int:
        return self.world.features

    @cached_property
    def targets(self) -> np.ndarray:
        """Indices of the features that only model and data together explain."""
        return np.flatnonzero(np.isin(self.classes, ["appears", "differs", "turns"]))

    @cached_property
    def rates(self) -> dict[str, np.ndarray]:
        """Data ("base", "new") -> [G] firings per token, topics aside."""
        world, g = self.world, self._generator("rates")
        zipf = 1 / (np.arange(world.base_features) + FLAT)
        base = np.zeros(len(self))
        base[: world.base_features] = world.l0 * zipf / zipf.sum()
        base[self.classes == "turns"] = RARE
        new = LESS_ON_NEW_ROWS * base
        fresh = np.isin(self.classes, ["data only", "appears", "differs", "turns"])
        new[fresh] = g.uniform(*ON_NEW_ROWS, len(self))[fresh]
        return {"base": base, "new": new}

    @cached_property
    def directions(self) -> dict[tuple[str, str], np.ndarray]:
        """(model, data) -> [G, d] float64: unit vectors, 0 where a feature writes nothing."""
        g, n, d = self._generator("directions"), len(self), self.world.d
        start = _unit(g.standard_normal((n, d)))
        near = _turned(start, g.uniform(0, self.world.jitter, (n, 1)), g)
        angles = np.where(self.classes == "model only", self.world.model_angle, self.world.angle)[:, None]
        far = _turned(start, angles, g)
        base_new = np.where((self.classes == "appears")[:, None], 0.0, start)
        by_model = np.where((self.classes == "model only")[:, None], far, near)
        both = np.where(np.isin(self.classes, ["model only", "appears", "differs", "turns"])[:, None], far, near)
        Q = self.rotation
        return {
            ("base", "base"): start,
            ("base", "new"): base_new,
            ("finetuned", "base"): by_model @ Q.T,
            ("finetuned", "new"): both @ Q.T,
        }

    @cached_property
    def rotation(self) -> np.ndarray:
        """[d, d] the finetuned model's common rotation; the identity where there is none."""
        d = self.world.d
        raw = self._generator("rotation").standard_normal((d, d))
        angle = np.radians(self.world.common_rotation)
        return torch.matrix_exp(torch.from_numpy(angle * (raw - raw.T) / np.sqrt(2 * d))).numpy() if angle else np.eye(d)

    def topics(self, data: str, split: str, block: int) -> np.ndarray:
        """Topic of each of a block's rows, int32 [BLOCK_ROWS]."""
        return self._generator("topics", data, split, block).integers(self.world.topics, size=BLOCK_ROWS, dtype=np.int32)

    def amplitudes(self, topics: np.ndarray, data: str, split: str, block: int) -> np.ndarray:
        """Amplitudes [rows * context, G] float32 of a block's rows (or its first ones), 0: does not fire. `topics` [rows]."""
        world = self.world
        rate = np.minimum(self.rates[data] * self._topic_factors, MOST_OFTEN).astype(np.float32)[topics][:, None]  # [rows, 1, G]
        u = self._generator("firings", data, split, block).random((len(topics), world.context, len(self)), dtype=np.float32)
        a = np.divide(u, rate, out=np.ones_like(u), where=rate > 0)  # below 1 where it fires, and even there
        return np.where(a < 1, a + np.float32(0.5), np.float32(0)).reshape(-1, len(self))

    def activations(self, topics: np.ndarray, data: str, split: str, block: int, side: str) -> np.ndarray:
        """Activations [rows * context, d] float32 of a block's rows (or its first ones) in one model."""
        x = self.amplitudes(topics, data, split, block) @ self.directions[side, data].astype(np.float32)
        noise = self._generator("noise", data, split, block).standard_normal(x.shape, dtype=np.float32)
        if side == "finetuned" and self.world.common_rotation:
            noise = noise @ self.rotation.T.astype(np.float32)
        return x + np.float32(self.world.noise) * noise

    @cached_property
    def _topic_factors(self) -> np.ndarray:
        spread = self.world.topic_spread
        raw = self._generator("topic factors").standard_normal((self.world.topics, len(self)))
        return np.exp(spread * raw - spread**2 / 2)

    def _classes(self) -> np.ndarray:
        world = self.world
        often = world.base_features - world.turns
        turned = self._generator("classes").permutation(often)[: world.model_only]
        base = np.full(world.base_features, "unchanged", dtype="<U10")
        base[turned] = "model only"
        base[often:] = "turns"
        fresh = np.repeat(["data only", "appears", "differs"], [world.data_only, world.appears, world.differs])
        return np.concatenate([base, fresh])

    def _generator(self, *what: str | int) -> np.random.Generator:
        """Random numbers for one purpose, independent of all others."""
        digest = hashlib.sha256(f"diff/{self.world.seed}/{'/'.join(map(str, what))}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _turned(v: np.ndarray, degrees: np.ndarray, g: np.random.Generator) -> np.ndarray:
    """Unit rows turned by these angles, each in a random plane through it."""
    other = g.standard_normal(v.shape)
    other = _unit(other - (other * v).sum(1, keepdims=True) * v)
    return np.cos(np.radians(degrees)) * v + np.sin(np.radians(degrees)) * other
