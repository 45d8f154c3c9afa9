"""Who competes in `peers.py`: stagediff and the packages beside it, each with its own trainer, from the same weights.

`PREPARE[library](case, variant, given)` imports the library and returns a function that trains over a `Clock` from the common start, and returns the
dictionary as a function of activations.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LR, L1 = 1e-3, 3.0

Evaluate = Callable[[Tensor], Tensor]


class Clock:
    """The batches in order, with the time at which each was asked for."""

    def __init__(self, pool: list[Tensor], steps: int, device: str, now: Callable[[], float]):
        self._pool, self.steps, self._device, self._now = pool, steps, device, now
        self._stamps: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.steps):
            self._stamp()
            yield self._pool[step % len(self._pool)]
        self._stamp()
        while True:  # some ask for one more
            yield self._pool[0]

    def _stamp(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        self._stamps.append(self._now())

    def seconds(self) -> list[float]:
        """Of each step, without the first tenth."""
        if len(self._stamps) == self.steps:
            self._stamp()  # who never asked for one more
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        return [b - a for a, b in pairs][max(2, self.steps // 10) :]


def lr_of(case: dict[str, Any]) -> float:
    return case.get("lr", LR)


def under(variant: str, device: str) -> Any:
    is_bf16 = variant in ("bf16", "autocast")
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16) if is_bf16 else contextlib.nullcontext()


def stagediff(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from stagediff.sae.initial import fresh
    from stagediff.sae.spec import Budget, DictionaryConfig
    from stagediff.sae.trainer import Trainer

    compute = torch.float32 if variant == "fp32" else torch.bfloat16
    kind: dict[str, Any] = (
        {"architecture": "topk", "k": case["k"]}
        if case["k"]
        else {"architecture": "relu", "l1": L1, "initial_norm": 1.0, "subtract_b_dec": True}  # as both peers do
    )
    if variant == "free":
        kind["decoder_norm"] = "free"
    small = fresh(DictionaryConfig(**{**kind, "features": 64, **({"k": 4} if case["k"] else {})}), 1.0, torch.zeros(16), seed=0)
    Trainer(small.to(given.device), Budget(tokens=1), 1, True, compute).train_on(
        torch.randn(64, 16, device=given.device)
    )  # loads the kernels

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        sae = fresh(DictionaryConfig(features=case["features"], **kind), 1.0, begin["b_dec"].cpu(), seed=0).to(given.device)
        sae.W_dec.copy_(begin["W_dec"])
        sae.W_enc.copy_(begin["W_dec"].t())
        sae.b_dec.copy_(begin["b_dec"])
        sae.b_enc.copy_(begin["b_enc"] if sae.config.subtract_b_dec else begin["b_enc"] - begin["b_dec"] @ sae.W_enc)
        budget = Budget(tokens=clock.steps * case["batch"], batch=case["batch"], lr=lr_of(case), decay=0.0)
        trainer = Trainer(sae, budget, clock.steps, True, compute)
        del sae
        for step, x in enumerate(clock):
            if step == clock.steps:
                break
            trainer.train_on(x)
        trained = trainer.dictionary()
        return lambda x: trained.decode(trained.encode(x))

    return run


def sae_lens(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        sparse, shape = variant == "sparse", {"d_in": case["d"], "d_sae": case["features"], "device": given.device}
        if case["k"]:
            options = {"k": case["k"], "use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": not sparse}
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, **options))
        else:
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=L1))
        sae.W_dec.data.copy_(begin["W_dec"])
        sae.W_enc.data.copy_(begin["W_dec"].t())
        sae.b_dec.data.copy_(begin["b_dec"])
        sae.b_enc.data.copy_(begin["b_enc"] if sae.cfg.apply_b_dec_to_input else begin["b_enc"] - begin["b_dec"] @ sae.W_enc.data)
        tokens = clock.steps * case["batch"]
        warm = max(1, clock.steps // 20)
        config = SAETrainerConfig(
            total_training_samples=tokens,
            train_batch_size_samples=case["batch"],
            lr=lr_of(case),
            lr_end=lr_of(case),
            lr_warm_up_steps=warm,
            autocast=variant == "autocast",
            device=given.device,
        )
        SAETrainer(config, sae, (x.float() for x in clock)).fit()

        def evaluate(x: Tensor) -> Tensor:
            f = sae.encode(x)
            return sae.decode(f)

        return evaluate

    return run


def dictionary_learning(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        shape = {"steps": clock.steps, "activation_dim": case["d"], "dict_size": case["features"], "layer": 0, "lm_name": "none"}
        more = {"lr": lr_of(case), "warmup_steps": max(1, clock.steps // 20), "device": given.device}
        trainer: Any = (
            TopKTrainer(**shape, **more, k=case["k"]) if case["k"] else StandardTrainer(**shape, **more, sparsity_warmup_steps=None)
        )
        ae = trainer.ae
        ae.encoder.weight.data.copy_(begin["W_dec"])
        ae.decoder.weight.data.copy_(begin["W_dec"].t())
        ae.encoder.bias.data.copy_(begin["b_enc"])
        if not case["k"]:
            ae.bias.data.copy_(begin["b_dec"])  # TopK's trainer sets its own
        for step, x in enumerate(clock):
            if step == clock.steps:
                break
            with under(variant, given.device):
                trainer.update(step, x.float())
        return lambda x: ae.decode(ae.encode(x))

    return run


def sparsify(case: dict[str, Any], variant: str, given: argparse.Namespace) -> Any:
    if not given.device.startswith("cuda"):
        torch.cuda.is_bf16_supported = lambda *a, **k: False  # it is asked at import
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    def run(clock: Clock, begin: dict[str, Tensor]) -> Evaluate:
        if not case["k"]:
            raise ValueError("sparsify has no ReLU with L1")
        sae = SparseCoder(case["d"], SparseCoderConfig(num_latents=case["features"], k=case["k"]), device=given.device, dtype=torch.float32)
        sae.encoder.weight.data.copy_(begin["W_dec"])
        sae.W_dec.data.copy_(begin["W_dec"])
        sae.b_dec.data.copy_(begin["b_dec"])
        optimiser = torch.optim.Adam(sae.parameters(), lr=lr_of(case))
        warm = max(1, clock.steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))
        silent = torch.zeros(case["features"], dtype=torch.long, device=given.device)
        for step, x in enumerate(clock):  # as its own trainer's loop
            if step == clock.steps:
                break
            sae.set_decoder_norm_to_unit_norm()
            with under(variant, given.device):
                out = sae(x.float(), dead_mask=silent > 10_000_000)
            (out.fvu + out.auxk_loss / 32).backward()
            sae.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            silent += len(x)
            silent[out.latent_indices.flatten()] = 0

        def evaluate(x: Tensor) -> Tensor:
            values, indices, *_ = sae.encode(x)
            return sae.decode(values, indices)

        return evaluate

    return run


PREPARE = {"stagediff": stagediff, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}
