"""Which noise features are too weak to be there: what a vanished feature leaves behind, and an index before its feature is born.

A dictionary that follows a training run has more latents than there are features, so some are left without one. They do not fall silent: they go on firing,
barely above zero (or above the gate's threshold), wherever something else leaves a remainder. Counted by firings they are alive, and the rule for kinds calls
them noise. Taken at its word, a feature that is gone would be "losing" its meaning, and one born at such an index would be "grouping" out of noise.

What tells them from a feature that fires at random places is how strongly they fire: far weaker than the same index does when it stands for something.
Strength is the mean activation of a feature's strongest examples times its decoder row's norm, in scaled units, in which E||x|| is the same at all
checkpoints. Noise under PatternRule.faint of the index's own largest strength along the chain is faint. The measure is a feature's own past and future, not
other features, because features of a real model differ in strength by orders of magnitude. Token and concept features are never faint: they mean something.
"""

from typing import TYPE_CHECKING

import numpy as np

from stagediff.track.spec import KINDS, PatternsSpec

if TYPE_CHECKING:
    from stagediff.steps import Job
    from stagediff.store import Artifact

__all__ = ["faint", "strength", "strengths"]

NOISE, DEAD = KINDS.index("noise"), KINDS.index("dead")


def faint(kind: np.ndarray, relative: np.ndarray, share: float) -> np.ndarray:
    """[T, F] bool. `kind` [T, F]: indices into KINDS, -1 for none; `relative` [T, F]: `strengths`."""
    return (kind == NOISE) & (relative < share)


def strengths(spec: PatternsSpec, job: "Job", kind: np.ndarray, examples: int) -> np.ndarray:
    """[T, F] float32: every feature's strength as a share of its largest at the checkpoints at which it is alive; NaN where it is dead.

    Reads one checkpoint's statistics at a time.
    """
    found = np.full(kind.shape, np.nan, np.float32)
    for t, point in enumerate(spec.points):
        found[t] = np.where(kind[t] == DEAD, np.nan, strength(job.artifact(point.statistics), examples, kind.shape[1]))
    largest = np.fmax.reduce(found, axis=0)
    return np.divide(found, largest, out=np.full_like(found, np.nan), where=largest > 0)


def strength(statistics: "Artifact", examples: int, features: int) -> np.ndarray:
    """[F] mean activation of each feature's strongest `examples` (those that it has; 0 without any) times its decoder row's norm."""
    table = statistics.read_table("examples.parquet", columns=["feature", "rank", "activation"])
    table = table[table["rank"] < examples]
    feature, activation = table.feature.to_numpy(), table.activation.to_numpy(float)
    count = np.bincount(feature, minlength=features)
    mean = np.bincount(feature, activation, features) / np.maximum(count, 1)
    return mean * statistics.read_table("features.parquet", columns=["decoder_norm"]).decoder_norm.to_numpy(float)
