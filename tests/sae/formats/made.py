"""Dictionaries of ours for the tests of formats, and how far two reconstructions are apart."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import DictionaryConfig, ImportSpec
from stagediff.store import Artifact, Store

D, F = 24, 40
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
SCALE = 0.037
TOLERANCE = 1e-6
"""Largest distance of two reconstructions of a token, relative to its norm, both computed in fp64 from the weights as stored (fp32)."""


def dictionary(architecture: str, scale: float = SCALE, seed: int = 1, **config: Any) -> SAE:
    """A random one in which every bias and threshold matters for inputs()."""
    g = torch.Generator().manual_seed(seed)
    made = resolved(DictionaryConfig(architecture=architecture, features=F, k=5, **config), D)
    threshold = {"jumprelu": torch.rand(F, generator=g), "batchtopk": torch.full((F,), 0.8)}.get(architecture)
    W_dec = torch.randn(F, D, generator=g)
    if made.decoder_norm == "unit":
        W_dec /= W_dec.norm(dim=1, keepdim=True)
    W_enc = torch.randn(D, F, generator=g) / D**0.5
    return SAE(W_enc, torch.randn(F, generator=g), W_dec, torch.randn(D, generator=g), made, scale, threshold)


def inputs(n: int = 200, seed: int = 2) -> torch.Tensor:
    """[n, D] float64 with a mean and E||x|| far from sqrt(D)."""
    return (30 * torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 5).double()


def put(store: Store, sae: SAE, metadata: dict[str, Any] | None = None) -> Artifact:
    """The dictionary as an artifact."""
    cfg, weights = to_bytes(sae, metadata or {"hook_name": "blocks.3.hook_resid_pre", "context_size": 9})
    spec = ImportSpec(digest=hashlib.sha256(cfg + weights).hexdigest())
    with store.write(spec) as writer:
        writer.write_bytes(WEIGHTS, weights)
        writer.write_bytes(CFG, cfg)
        writer.commit(figures={})
    return store.artifact(spec.ref)


def reconstructed(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """x_hat [n, d] in fp64; checked to be of a dictionary that is sparse and not silent on x."""
    weights = {name: getattr(sae, name).double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    exact = replace(sae, **weights, threshold=None if sae.threshold is None else sae.threshold.double())
    f = exact.encode(x)
    assert 0 < (f > 0).float().mean() < 0.9
    return exact.decode(f)


def apart(a: Any, b: Any) -> float:
    """Largest distance of two reconstructions [n, d] of a token, relative to its norm."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())
