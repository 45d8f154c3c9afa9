"""Compiles the CPU's kernels ahead of their first use: tiny trainings pass through all of them, in both types."""

import torch

from stagediff.sae.initial import fresh
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import DEAD_EVERY, Trainer

__all__ = ["compile_kernels"]

D, FEATURES, BATCH = 16, 64, 32
NEVER = -100.0
"""A bias with which a feature never fires, so that relu is sparse and AuxK has dead features."""


def compile_kernels() -> None:
    """Every kernel of topk, batchtopk, relu and jumprelu (numba keeps them on disk). Where numba does not work this says so and compiles nothing."""
    for compute in (torch.bfloat16, torch.float32):
        for architecture in ("topk", "batchtopk", "relu", "jumprelu"):
            _train(DictionaryConfig.model_validate({"architecture": architecture, "features": FEATURES, "k": 2, "dead_after": 1}), compute)


def _train(config: DictionaryConfig, compute: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = fresh(config, 1.0, torch.zeros(D), seed=0)
    sae.b_enc[2:] = NEVER
    steps = DEAD_EVERY + 1  # the second look finds the dead ones
    trainer = Trainer(sae, Budget(tokens=steps * BATCH, batch=BATCH), steps, True, compute, anchor=0.1)
    for _ in range(steps):
        trainer.train_on(torch.randn(BATCH, D, generator=generator))
