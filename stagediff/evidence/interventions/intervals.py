"""How much more often a feature brings the behaviour than random features do, with an interval.

Cluster bootstrap: prompts and random features are drawn again with replacement, each as a whole. All features see the same prompts, so that one draw of
prompts serves both sides of the difference. The interval holds the middle 95 % of the draws.
"""

import numpy as np

__all__ = ["LEVEL", "effects", "effects_of_random"]

LEVEL = 0.95


def effects(hits: np.ndarray, control: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rate minus the mean rate of the random features, and the interval's ends, each [features].

    Parameters: hits [features, prompts] and control [random features, prompts], 0 or 1.
    """
    prompts, features = _weights(control.shape[1], draws, seed), _weights(len(control), draws, seed + 1)
    return _effects(hits.astype(float), control.astype(float), prompts, features)


def effects_of_random(control: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of each random feature against the others: what the method says where there is nothing to find."""
    prompts, features = _weights(control.shape[1], draws, seed), _weights(len(control) - 1, draws, seed + 1)
    found = [
        _effects(control[i : i + 1].astype(float), np.delete(control, i, 0).astype(float), prompts, features) for i in range(len(control))
    ]
    effect, low, high = (np.concatenate(part) for part in zip(*found, strict=True))
    return effect, low, high


def _weights(n: int, draws: int, seed: int) -> np.ndarray:
    """[draws, n] how often each of n is drawn, as shares."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n


def _effects(hits: np.ndarray, control: np.ndarray, prompts: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = ((features @ control) * prompts).sum(1)  # [draws]
    drawn = prompts @ hits.T - mean[:, None]  # [draws, features]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return hits.mean(1) - control.mean(), low, high
