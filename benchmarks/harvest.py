"""Harvest speed against the same truncated forward pass alone, and against a full fp32 forward pass.

    python benchmarks/harvest.py [--rows 512] [--repeats 5] [--small] [--device cpu] [--threads 2]

A GPT-NeoX of Pythia-160m's shape with random weights (speed does not depend on them), hook before layer 4 of 12, bf16. Each repeat
runs all contestants one after the other, so that a noisy machine disturbs all alike; the figures are medians over the repeats.
The harvest's time is from the loaded model to the last shard on disk. The share is given in wall time and in CPU time; the second hardly
depends on what else the machine does (it counts the writer thread in full). The disk's ceiling is what plain files of a shard's size can take,
one after the other, each synced as the store's are: a small model on a large GPU makes activations faster than a disk takes them.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stagediff import steps
from stagediff.lm import hooks, sources
from stagediff.lm.models import LoadedModel, load_model
from stagediff.lm.spec import CorpusSource, HarvestSpec, HookPoint, TokenizerSource, TokensSpec
from stagediff.spec import Ref
from stagediff.store import Store

CONTEXT = 128
SHARD_BYTES = 32 << 20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=512, help="token rows of 128 per repeat")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batch", type=int, default=64, help="rows per forward pass")
    options.add_argument(
        "--small", action="store_true", help="the demo's organism (4 layers, d 128, hook at layer 2) instead of Pythia-160m"
    )
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=None)
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), given), indent=1))


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Medians in tokens per second, and the harvest's share of the truncated forward pass alone."""
    hook = HookPoint(layer=2 if given.small else 4)
    vocab = save_model(folder / "model", given.small)
    source = sources.resolve_model(name=str(folder / "model"))
    store = Store(str(folder / "store"))
    ids = np.random.default_rng(0).integers(0, vocab, (given.rows, CONTEXT)).astype(np.int32)
    tokens = save_rows(store, ids)
    truncated = load_model(source, precision="bf16", device=given.device, upto=hook)
    full = load_model(source, precision="fp32", device=given.device)
    per_shard = SHARD_BYTES // (2 * truncated.width * (CONTEXT - 1)) // given.batch * given.batch
    spec = HarvestSpec(
        model=source,
        tokens=tokens,
        rows=given.rows,
        hook=hook,
        batch_rows=given.batch,
        shard_rows=max(given.batch, min(per_shard, given.rows // 4 // given.batch * given.batch)),
    )

    seconds: dict[str, list[tuple[float, float]]] = {
        "truncated forward alone, bf16": [],
        "harvest, bf16": [],
        "full forward, fp32": [],
        "plain synced files": [],
    }
    shard_tokens = spec.shard_rows * CONTEXT
    for repeat in range(given.repeats + 1):  # the first warms up
        found = [
            time_forward(truncated, ids, given.batch, hook),
            time_harvest(spec, store, given.device),
            time_forward(full, ids[: max(given.batch, given.rows // 8)], given.batch, None),
            time_disk(folder, 2 * truncated.width * shard_tokens, shard_tokens),
        ]
        if repeat:
            for name, value in zip(seconds, found, strict=True):
                seconds[name].append(value)
    rates = {name: 1 / statistics.median(wall for wall, _ in values) for name, values in seconds.items()}
    cpu_alone, cpu_harvest, *_ = (statistics.median(cpu for _, cpu in values) for values in seconds.values())
    alone, harvest, whole, disk = rates.values()
    return {
        "model": "4 layers, d 128" if given.small else "Pythia-160m shape",
        "rows": given.rows,
        "shard_rows": spec.shard_rows,
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "harvest_share_of_truncated_forward": round(harvest / alone, 3),
        "harvest_share_of_the_slower_of_forward_and_disk": round(harvest / min(alone, disk), 3),
        "harvest_share_in_cpu_time": round(cpu_alone / cpu_harvest, 3),
        "pairwise_shares": [round(a[0] / h[0], 3) for a, h in zip(*list(seconds.values())[:2], strict=True)],
        "harvest_over_full_fp32_forward": round(harvest / whole, 1),
    }


def time_forward(loaded: LoadedModel, ids: np.ndarray, batch: int, hook: HookPoint | None) -> tuple[float, float]:
    """Wall and CPU seconds per token of the forward pass alone: nothing is kept."""
    batches = [torch.from_numpy(ids[i : i + batch]).long().to(loaded.device) for i in range(0, len(ids), batch)]
    start, cpu_start = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for one in batches:
            if hook is None:
                loaded.model(input_ids=one, use_cache=False)
            else:
                hooks.read(loaded.model, hook, one)
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / ids.size, (time.process_time() - cpu_start) / ids.size


def time_harvest(spec: HarvestSpec, store: Store, device: str) -> tuple[float, float]:
    """Wall and CPU seconds per token that went through the model, of a harvest from scratch."""
    store.remove(spec.ref)
    steps.run(spec, store, device=device)
    notes = store.artifact(spec.ref).manifest.notes["harvest"]
    return notes["seconds"] / (spec.rows * CONTEXT), notes["cpu_seconds"] / (spec.rows * CONTEXT)


def time_disk(folder: Path, size: int, tokens: int) -> tuple[float, float]:
    """Wall and CPU seconds per token of writing eight shards' bytes to plain files, each synced."""
    block = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    start, cpu_start = time.perf_counter(), time.process_time()
    for i in range(8):
        with open(folder / f"plain-{i}", "wb", buffering=0) as file:
            file.write(block)  # type: ignore[arg-type]
            os.fsync(file.fileno())
    taken = (time.perf_counter() - start) / (8 * tokens), (time.process_time() - cpu_start) / (8 * tokens)
    for i in range(8):
        (folder / f"plain-{i}").unlink()
    return taken


def save_model(folder: Path, small: bool) -> int:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    shape: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 2048,
    }
    if not small:
        shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)).save_pretrained(
        folder
    )
    return int(shape["vocab_size"])


def save_rows(store: Store, ids: np.ndarray) -> Ref:
    spec = TokensSpec(
        corpus=CorpusSource(digest="benchmark"), tokenizer=TokenizerSource(digest="benchmark"), context=CONTEXT, rows=len(ids)
    )
    with store.write(spec) as w:
        array = w.array("rows", shape=ids.shape, dtype="int32", chunk_rows=len(ids), shard_rows=len(ids))
        for shard in array.pending():
            array.write_shard(shard, ids)
        w.commit(figures={})
    return spec.ref


if __name__ == "__main__":
    main()
