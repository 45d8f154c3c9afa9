"""Made-up lives of features for a finished tracking run (see fake_tables): when each is born, when it forms, what it is before and after."""

from dataclasses import dataclass

import numpy as np

__all__ = [
    *("CONCEPT", "CONTEXT", "D", "DATAPOINTS", "DEAD", "NASTY", "NOISE", "ROWS", "TOKEN", "TOP", "WORDS"),
    *("Lives", "formed_index", "make_lives", "steps_like_pythia"),
]

D, ROWS, CONTEXT, TOP, DATAPOINTS = 8, 192, 32, 20, 25
NASTY = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "&amp;",
    "\u202egnp.exe",
    "日本語",
    "\n",
    "'\"`${7*7}",
]
WORDS = [
    *("def", " self", ".path", "(", ")", " return", " None", "os", ".", "join", "    ", " the", " of", " import", " value", "_name", ":"),
    *(" =", " if", " not", "[0]", ' "', "Error", " class", " in", " for", " raise", " and", " is", " file", " True", "print", " open", ","),
]
TOKEN, CONCEPT, NOISE, DEAD = range(4)


@dataclass
class Lives:
    """What every feature did. F features, T checkpoints."""

    steps: list[int]
    kind: np.ndarray
    """[F, T] codes into KINDS."""
    token: np.ndarray
    """[F, T] codes into the vocabulary."""
    decoder: np.ndarray
    """[F, T, D] unit vectors."""
    m: np.ndarray
    """[F, T] progress in activation space, top set."""
    density: np.ndarray
    """[F, T]"""


def steps_like_pythia(count: int) -> list[int]:
    """0, 1, 2, 4, …, 512, then evenly spread up to 143,000."""
    early = [0, *(2**k for k in range(10))][:count]
    rest = count - len(early)
    return early + [int(s) for s in np.linspace(1000, 143_000, rest).round(-3)] if rest else early


def make_lives(features: int, steps: list[int], vocab: int, rng: np.random.Generator, slower: float) -> Lives:
    F, T = features, len(steps)
    t = np.arange(T) / (T - 1)
    final = rng.choice(4, size=F, p=[0.42, 0.3, 0.23, 0.05])
    when = np.select([final == TOKEN, final == CONCEPT], [rng.beta(3, 7, F), rng.beta(8, 6, F)], 2.0) + slower
    born = np.where(rng.random(F) < 0.25, when * rng.random(F), -1.0)
    before = np.where((final == CONCEPT) & (rng.random(F) < 0.3), TOKEN, NOISE)
    kind = np.where(t[None] >= when[:, None], final[:, None], before[:, None])
    flicker = rng.random((F, T)) < 0.02
    kind = np.where(flicker & (kind != DEAD), NOISE, kind)
    kind = np.where((t[None] < born[:, None]) | (final == DEAD)[:, None], DEAD, kind)
    token = np.repeat(rng.integers(0, vocab, F)[:, None], T, 1)
    change = rng.random(F) < 0.3
    token = np.where(change[:, None] & (t[None] < (when * 0.7)[:, None]), rng.integers(0, vocab, F)[:, None], token)
    sharpness = rng.uniform(8, 25, F)
    grown = 1 / (1 + np.exp(-sharpness[:, None] * (t[None] - when[:, None])))
    height = np.select([final == TOKEN, final == CONCEPT], [rng.beta(6, 4, F), rng.beta(4, 5, F)], 0.03)
    m = height[:, None] * grown + rng.normal(0, 0.012, (F, T))
    decoder = np.empty((F, T, D), np.float32)
    end = rng.normal(size=(F, D))
    end /= np.linalg.norm(end, axis=1, keepdims=True)
    walk = rng.normal(size=(F, D))
    for k in range(T):
        # dead features stay where they are; the others go to their final direction, faster while they form
        left = np.where(final == DEAD, 0.0, 1.1 * (1 - grown[:, k]) + 0.25 * (1 - t[k]))
        walk = walk + rng.normal(0, 0.12, (F, D))
        row = end + left[:, None] * walk / np.linalg.norm(walk, axis=1, keepdims=True)
        decoder[:, k] = row / np.linalg.norm(row, axis=1, keepdims=True)
    density = np.where(kind == DEAD, 0.0, 10 ** (rng.normal(-2.7, 0.6, F)[:, None] + rng.normal(0, 0.08, (F, T))))
    return Lives(steps, kind.astype(np.uint8), token, decoder, m, np.minimum(density, 1.0))


def formed_index(m: np.ndarray, share: float = 0.5, smallest: float = 0.05) -> np.ndarray:
    """[F] first checkpoint from which M stays at or above `share` of its final value; T where the final value is too small."""
    stays = np.logical_and.accumulate((m >= share * m[:, -1:])[:, ::-1], axis=1)[:, ::-1]
    return np.where(m[:, -1] < smallest, m.shape[1], stays.argmax(1))
