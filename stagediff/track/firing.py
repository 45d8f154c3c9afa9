"""Where one feature fires strongest, does another one fire too: shares over pairs of features, at one checkpoint of a chain.

Only the asked features are encoded: in all architectures but topk a feature's gate does not depend on the others, so a dictionary of these features alone
gives the same answer at a fraction of the cost. Work: pairs x places x d, and one pass over the probe's shards per block of VECTOR_BYTES of places.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stagediff.sae.dictionary import SAE
from stagediff.track.probe import Probe
from stagediff.track.spec import Point

__all__ = ["firing_shares"]

VECTOR_BYTES = 1 << 28
"""Activations held at once, in bfloat16."""
ROWS_AT_ONCE = 2048
"""Places encoded at once."""


def firing_shares(x: np.ndarray, y: np.ndarray, places: np.ndarray, point: Point, sae: SAE, probe: Probe) -> np.ndarray:
    """[pairs] share of the places of feature y at which feature x fires; 0 where y has none.

    `x`, `y` [pairs]: features of the dictionary `sae`, which is the point's. `places` [features, k]: flat places of every feature, -1: none.
    """
    share = np.zeros(len(x))
    order = np.argsort(y, kind="stable")
    owners, starts = np.unique(y[order], return_index=True)
    ends = np.append(starts[1:], len(order))
    k = places.shape[1]
    per_block, per_group = max(1, VECTOR_BYTES // (2 * probe.d * k)), max(1, ROWS_AT_ONCE // k)
    for begin in range(0, len(owners), per_block):
        block = slice(begin, begin + per_block)
        wanted = np.unique(places[owners[block]])
        wanted = wanted[wanted >= 0]
        if not len(wanted):
            continue
        vectors = probe.vectors(point, wanted)
        for first in range(begin, min(begin + per_block, len(owners)), per_group):
            last = min(first + per_group, begin + per_block, len(owners))
            pairs = order[starts[first] : ends[last - 1]]
            columns, column = np.unique(x[pairs], return_inverse=True)
            at = places[owners[first:last]]  # [owners, k]
            rows = torch.from_numpy(np.searchsorted(wanted, np.maximum(at, wanted[0])))
            fires = _fires(sae, vectors[rows.ravel()], columns).reshape(*at.shape, -1) & (at >= 0)[..., None]
            count = fires.sum(1)[np.searchsorted(owners[first:last], y[pairs]), column]
            share[pairs] = count / np.maximum((places[y[pairs]] >= 0).sum(1), 1)
    return share


def _fires(sae: SAE, x: Tensor, features: np.ndarray) -> np.ndarray:
    """[n, len(features)] bool: which of these features are active on the vectors x [n, d] (raw units)."""
    at = torch.from_numpy(features).to(sae.W_dec.device)
    x = x.to(sae.W_dec.device).float()
    if sae.architecture == "topk":
        return (sae.encode(x)[:, at] > 0).cpu().numpy()
    threshold = None if sae.threshold is None else sae.threshold[at]
    alone = replace(sae, W_enc=sae.W_enc[:, at], b_enc=sae.b_enc[at], W_dec=sae.W_dec[at], threshold=threshold)
    return (alone.encode(x) > 0).cpu().numpy()
