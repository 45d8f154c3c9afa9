"""Checkpoints with real activations, real dictionaries and really computed statistics, on a ProbeChain's token rows; and the codes, computed plainly."""

from typing import Any

import numpy as np
import torch

from stagediff import steps
from stagediff.lm.spec import ActivationData, HookPoint
from stagediff.progress import Progress
from stagediff.sae.dictionary import SAE, resolved
from stagediff.sae.layout import CFG, WEIGHTS, to_bytes
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.track.spec import Point

__all__ = ["add_point", "dictionary", "plain_codes"]


def dictionary(encoder: torch.Tensor, bias: float | torch.Tensor, architecture: str = "relu", k: int = 4, threshold: float = 0.0) -> SAE:
    """An SAE that subtracts nothing: encoder [d, F], bias [F] or a number; the decoder is the encoder's transpose."""
    d, features = encoder.shape
    config = DictionaryConfig(architecture=architecture, features=features, k=k, subtract_b_dec=False)
    thresholds = torch.full((features,), threshold) if architecture in ("batchtopk", "jumprelu") else None
    decoder = (encoder / encoder.norm(dim=0)).T.contiguous()
    return SAE(encoder, torch.zeros(features) + bias, decoder, torch.zeros(d), resolved(config, d), 1.0, thresholds)


def plain_codes(sae: SAE, x: np.ndarray) -> np.ndarray:
    """[n, F] float64 codes of x [n, d] by a relu dictionary, from its weights."""
    return np.maximum(x @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy(), 0.0)


def add_point(chain: Any, step: int, x: torch.Tensor, sae: SAE, top: int = 25, rows: int | None = None) -> Point:
    """Stores activations x [rows * (context - 1), d] and the dictionary, and runs the statistics step on them."""
    probe = chain.harvest(x, HookPoint(layer=3), rows=rows, model=f"step{step}")
    data = ActivationData(base=probe, rows=rows or chain.rows)
    trained = TrainSpec(data=data, budget=Budget(tokens=1), dictionary=sae.config, seed=step)
    files = dict(zip((CFG, WEIGHTS), to_bytes(sae), strict=True))
    with chain.store.write(trained) as w:
        for name, body in files.items():
            w.write_bytes(name, body)
        w.commit(figures={})
    statistics = StatisticsSpec(dictionary=trained.ref, data=data, base_rows_only=True, top=top)
    steps.run(statistics, chain.store, device="cpu", progress=Progress(interactive=False))
    return Point(step=step, dictionary=trained.ref, statistics=statistics.ref, probe=probe)
