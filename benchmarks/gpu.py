"""Every path that runs on a GPU, checked against its CPU twin and timed, in one call.

    python benchmarks/gpu.py [--device cuda] [--quick]

Checks: the truncated forward pass and a harvest, the gradients of one training step of each architecture (with a focus too), a training that is killed
half way and continued (the same bytes as undisturbed), and the statistics pass. Then tokens per second and peak memory of harvest and training at a
size that fills a GPU (--quick: a small one). Prints one line of JSON per check and per timing, and exits with 1 when a check fails. With
`--device cpu --quick` it checks itself on a machine without a GPU.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harvest as harvest_benchmark
import numpy as np
import torch
from torch import Tensor
from train import products, seconds

from stagediff import steps
from stagediff.lm import hooks, sources
from stagediff.lm.models import load_model
from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint
from stagediff.sae.initial import fresh
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.sae.trainer import Trainer
from stagediff.spec import Ref
from stagediff.store import Store
from stagediff.store.training import TrainingCheckpoints

ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}
"""Largest difference, relative to the largest value, that reduction order and (bf16) rounding may make."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes for the timings too")
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False  # what is compared with the CPU is fp32
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for result in checks(Path(folder), given.device):
            failed += not result["passed"]
            print(json.dumps(result), flush=True)
        for timing in timings(Path(folder), given.device, given.quick):
            print(json.dumps(timing), flush=True)
    sys.exit(1 if failed else 0)


def checks(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    store = Store(str(folder / "checks"))
    vocab = harvest_benchmark.save_model(folder / "small", True)
    ids = np.random.default_rng(0).integers(0, vocab, (96, harvest_benchmark.CONTEXT)).astype(np.int32)
    tokens = harvest_benchmark.save_rows(store, ids)
    source = sources.resolve_model(name=str(folder / "small"))
    hook = HookPoint(layer=2)
    batch = torch.from_numpy(ids[:32]).long()
    for precision in ("fp32", "bf16"):
        here, there = (read(load_model(source, precision=precision, device=where, upto=hook), hook, batch) for where in ("cpu", device))
        yield compared(f"truncated forward, {precision}", here, there, TOLERANCE[precision])
    spec = HarvestSpec(model=source, tokens=tokens, rows=96, hook=hook, batch_rows=16, shard_rows=32)
    stored = [harvested(spec, store, where) for where in ("cpu", device)]
    yield compared("harvest, bf16", *stored, TOLERANCE["bf16"])
    for architecture in ARCHITECTURES:
        yield one_step(architecture, stored[0], device)
    for architecture in ("relu", "topk"):
        yield one_step(architecture, stored[0], device, focus=1.0)
    data = ActivationData(base=spec.ref, rows=96)
    for architecture in ARCHITECTURES:
        yield resumed(architecture, data, store, folder, device)
    yield statistics(data, store, device)


def read(loaded: Any, hook: HookPoint, batch: Tensor) -> Tensor:
    with torch.inference_mode():
        return hooks.read(loaded.model, hook, batch.to(loaded.device)).float().cpu()


def harvested(spec: HarvestSpec, store: Store, device: str) -> Tensor:
    store.remove(spec.ref)
    steps.run(spec, store, device=device)
    array = store.artifact(spec.ref).array()
    return torch.from_numpy(array.read_rows(0, array.shape[0]).copy()).view(torch.bfloat16).float()


def dictionary(architecture: str, features: int = 512) -> DictionaryConfig:
    auxk = 32 if architecture in ("topk", "batchtopk") else None
    return DictionaryConfig(architecture=architecture, features=features, k=8, auxk=auxk, dead_after=2048)


def one_step(architecture: str, x: Tensor, device: str, focus: float = 0.0) -> dict[str, Any]:
    """Gradients of one fp32 step from the same start on the same batch. Without a clip: the dense algebra scales the gradients that it returns by it, a
    sparse step what it takes of them, and relu and jumprelu are dense on a GPU and, where few features fire, sparse on a CPU.
    """
    found = []
    for where in ("cpu", device):
        sae = fresh(dictionary(architecture), 128**0.5 / float(x.norm(dim=1).mean()), x.mean(0), seed=0).to(where)
        trainer = Trainer(sae, Budget(tokens=4096, batch=2048, clip=0, focus=focus), 2, False, torch.float32)
        gradient = trainer.train_on(x[:2048].to(where))
        found.append(torch.cat([g.flatten().cpu() for _, g in sorted(gradient.gradients.items())]))
    return compared(f"one step, {architecture}, fp32{', focus' if focus else ''}", *found, TOLERANCE["fp32"])


def resumed(architecture: str, data: ActivationData, store: Store, folder: Path, device: str) -> dict[str, Any]:
    """A training that dies half way and is run again gives the bytes of an undisturbed one on the same device."""
    spec = TrainSpec(data=data, budget=Budget(tokens=512 * 40, batch=512), dictionary=dictionary(architecture), checkpoint_tokens=512 * 15)
    steps.run(spec, store, device=device)
    whole = store.artifact(spec.ref).manifest.data()
    store.remove(spec.ref)
    save = TrainingCheckpoints.save

    def dies(self: TrainingCheckpoints, *args: Any) -> None:
        save(self, *args)
        raise KeyboardInterrupt

    TrainingCheckpoints.save = dies  # type: ignore[method-assign]
    try:
        steps.run(spec, store, device=device)
    except KeyboardInterrupt:
        pass
    finally:
        TrainingCheckpoints.save = save  # type: ignore[method-assign]
    died = not store.artifact(spec.ref).is_complete
    steps.run(spec, store, device=device)
    return {"check": f"resume, {architecture}", "passed": died and store.artifact(spec.ref).manifest.data() == whole}


def statistics(data: ActivationData, store: Store, device: str) -> dict[str, Any]:
    """Firings of every feature of one dictionary, counted on both devices: equal but for activations within rounding of 0."""
    trained = TrainSpec(data=data, budget=Budget(tokens=512 * 40, batch=512), dictionary=dictionary("topk"))
    found = []
    steps.run(trained, store, device="cpu")
    for where in ("cpu", device):
        spec = StatisticsSpec(dictionary=Ref(trained.ref), data=data)
        store.remove(spec.ref)
        steps.run(spec, store, device=where)
        table = store.artifact(spec.ref).read_table("features.parquet")
        found.append(torch.from_numpy(table[["firings", "mean", "max"]].to_numpy(np.float64)))
    return compared("statistics, topk", *found, 1e-3)


def compared(name: str, here: Tensor, there: Tensor, tolerance: float) -> dict[str, Any]:
    error = float((here - there).abs().max() / here.abs().max().clamp_min(1e-30))
    return {"check": name, "passed": bool(error <= tolerance), "relative_error": error, "tolerance": tolerance}


def timings(folder: Path, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    on_cuda = device.startswith("cuda")
    yield {"machine": torch.cuda.get_device_name(device) if on_cuda else "cpu", "torch": torch.__version__}
    options = argparse.Namespace(
        rows=64 if quick else 8192, repeats=2 if quick else 3, batch=16 if quick else 256, small=quick, device=device
    )
    yield {"timing": "harvest", **harvest_benchmark.measure(folder / "timing", options)}
    d, features, k, batch, count = (128, 1024, 16, 1024, 10) if quick else (1024, 32768, 32, 8192, 50)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(batch, d, generator=generator).bfloat16().to(device) for _ in range(4)]
    floor = min(seconds(products(batch, d, features, torch.bfloat16, device), count, device))
    for architecture in ARCHITECTURES:
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        sae = fresh(DictionaryConfig(architecture=architecture, features=features, k=k), 1.0, torch.zeros(d), seed=0).to(device)
        trainer = Trainer(sae, Budget(tokens=count * batch, batch=batch), count, True, torch.bfloat16)
        taken = sorted(seconds(lambda i, t=trainer: t.train_on(data[i % 4]), count, device))  # type: ignore[misc]
        yield {
            "timing": f"train {architecture}",
            "d": d,
            "features": features,
            "batch": batch,
            "tokens_per_second": round(batch / taken[len(taken) // 2]),
            "share_of_dense_products": round(floor / taken[len(taken) // 2], 3),
            "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if on_cuda else None,
        }
        del sae, trainer


if __name__ == "__main__":
    main()
