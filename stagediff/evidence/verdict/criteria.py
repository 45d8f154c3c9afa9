"""The six claims that can be made of a feature, and when each counts as shown: never by a number alone, always against a null or random features.

| claim   | measured            | shown when                                                                                              |
|---------|---------------------|---------------------------------------------------------------------------------------------------------|
| moved   | retrain null        | q <= level: farther on both axes than D and M move when trained on with nothing new                     |
| newer   | null and align      | the pair's q <= level: newer directions than that training makes                                        |
| carries | diff                | half of its top examples or more are new rows, and at most `chance` of random features have as many     |
| flagged | labels              | the labeller flags it, and at most `chance` of random features have as large a share of related examples |
| steers  | steer               | the 95 % interval of its rate less the random features' lies above 0                                    |
| removes | ablate              | clamped alone it leaves fewer answers with the keyword than any random set: Fisher's p <= `chance` / 2  |

p against n random features is (1 + those that do as well) / (1 + n). A claim that even a perfect feature could not have been granted with so few null values,
random features or prompts is `open`, not refused. Removal has no random features clamped one by one: its control are the smallest random sets, which hold more
features and so do more damage; the one that leaves the fewest answers is taken.
"""

import numpy as np

from stagediff.diff.calibration import reach
from stagediff.diff.ranking import fisher_greater

__all__ = [
    "CLAIMS",
    "NO",
    "NOT_MEASURED",
    "OPEN",
    "OUTCOMES",
    "YES",
    "against_null",
    "against_random",
    "fewer_answers",
    "p_against_random",
    "smallest_fewer",
]

CLAIMS = ("moved", "newer", "carries", "flagged", "steers", "removes")
OUTCOMES = ("yes", "no", "open", "not measured")
YES, NO, OPEN, NOT_MEASURED = OUTCOMES


def against_null(q: np.ndarray, null_values: int | None, tests: int, level: float) -> np.ndarray:
    """[n] outcomes of q-values; open where so few null values cannot reach the level."""
    q = np.asarray(q, float)
    refused = NO if null_values is not None and reach(null_values, max(1, tests), level).is_enough else OPEN
    return _outcomes(np.isfinite(q), q <= level, np.full(len(q), refused, object))


def p_against_random(value: np.ndarray, random: np.ndarray) -> np.ndarray:
    """[n] chance that a random feature has as large a value; NaN where the value is."""
    value, random = np.asarray(value, float), np.sort(np.asarray(random, float)[np.isfinite(random)])
    as_high = len(random) - np.searchsorted(random, value, side="left")
    return np.where(np.isfinite(value), (1 + as_high) / (1 + len(random)), np.nan)


def against_random(stands: np.ndarray, p: np.ndarray, random: int, chance: float) -> np.ndarray:
    """[n] outcomes: `stands` is the claim itself, p its chance among `random` features; open where so few can tell nothing."""
    stands = np.asarray(stands, bool)
    refused = np.where(stands & (1 / (1 + random) > chance), OPEN, NO).astype(object)
    return _outcomes(np.isfinite(p), stands & (np.asarray(p, float) <= chance), refused)


def fewer_answers(rate: float, control: float, prompts: int) -> float:
    """Fisher's exact p, one-sided: that as few answers or fewer show the behaviour at `rate` than at `control`, each over so many prompts."""
    without, without_control = prompts - round(rate * prompts), prompts - round(control * prompts)
    return fisher_greater(without, prompts, without_control, prompts)


def smallest_fewer(control: float, prompts: int) -> float:
    """The smallest p that `fewer_answers` could give."""
    return fewer_answers(0.0, control, prompts)


def _outcomes(measured: np.ndarray, shown: np.ndarray, refused: np.ndarray) -> np.ndarray:
    return np.where(~measured, NOT_MEASURED, np.where(shown, YES, refused)).astype(object)
