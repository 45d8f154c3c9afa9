"""From disk to training: a dictionary's training speed from stored activations, beside the same batches lying in memory.

    stagediff demo && python benchmarks/data_path.py [--store runs/demo] [--config configs/demo.yaml]

Trains on the base model's activations of a finished run (harvest-base), topk with F 1,024 and k 16 and with F 16,384 and k 32, batch 2,048, bf16.
Contestants take turns: batches made beforehand; shards read ahead and shuffled as a training does it, from files that the system has in memory and from
files that it was told to forget; and activations that are not stored, for which the model runs (`harvest: {stored: false}`). Prints a table: tokens per
second, medians over the rounds, and shares of the first.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from stagediff.config import load_config, make_plan
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HarvestSpec
from stagediff.lm.streamed import StreamedArray
from stagediff.numerics import reuse_freed_memory
from stagediff.sae.batches import Order, batches, shard_sizes
from stagediff.sae.initial import fresh, measure
from stagediff.sae.spec import Budget, DictionaryConfig
from stagediff.sae.trainer import Trainer
from stagediff.store import Store

BATCH = 2048
SHAPES = {"F 1,024, k 16": {"features": 1024, "k": 16}, "F 16,384, k 32": {"features": 16384, "k": 32}}
CONTESTANTS = ("memory", "files in memory", "files from disk", "not stored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="runs/demo")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    reuse_freed_memory()
    store = Store(given.store)
    spec = make_plan(load_config(given.config, store=given.store), store)["harvest-base"].spec
    assert isinstance(spec, HarvestSpec)
    data = ActivationData(base=spec.ref, rows=spec.rows)
    steps = given.tokens // BATCH
    print("| | " + " | ".join(CONTESTANTS) + " |\n|---|" + "---|" * len(CONTESTANTS))
    for name, shape in SHAPES.items():
        rates: dict[str, list[float]] = {c: [] for c in CONTESTANTS}
        for _ in range(given.rounds):
            for contestant in CONTESTANTS:
                rates[contestant].append(rate(contestant, store, spec, data, shape, steps))
        medians = {c: statistics.median(found) for c, found in rates.items()}
        print(f"| {name} | " + " | ".join(f"{v:,.0f} ({v / medians['memory']:.2f})" for v in medians.values()) + " |", flush=True)


def rate(contestant: str, store: Store, spec: HarvestSpec, data: ActivationData, shape: dict[str, int], steps: int) -> float:
    """Tokens per second of a training that begins anew."""
    reader = ActivationReader(store, data)
    if contestant == "not stored":
        reader._array = StreamedArray(store, spec, reader.positions, "cpu")
    scale, mean = measure(ActivationReader(store, data), 1 << 14)
    sae = fresh(DictionaryConfig(architecture="topk", **shape), scale, mean, seed=0)
    trainer = Trainer(sae, Budget(tokens=steps * BATCH, batch=BATCH), steps, True, torch.bfloat16)
    order = Order(0, shard_sizes(reader))
    stream: Iterable[Tensor] = batches(reader, order, BATCH, 0, steps)
    if contestant == "memory":
        stream = list(stream)
    if contestant == "files from disk":
        forget(Path(store.root) / spec.ref)
    start = time.perf_counter()
    for x in stream:
        trainer.train_on(x)
    return steps * BATCH / (time.perf_counter() - start)


def forget(folder: Path) -> None:
    """Asks the system to drop what it keeps of the files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


if __name__ == "__main__":
    main()
