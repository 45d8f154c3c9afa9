"""Codes as table columns of names."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

__all__ = ["named"]


def named(code: np.ndarray, names: Iterable[str]) -> pd.Series:
    """Text column [n] from indices into `names`; null where the code is -1."""
    return pd.Series(np.array([*names, None], object)[code], dtype="str")
