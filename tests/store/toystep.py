"""A small step to kill: an array, a training, a table, a JSON file. Run as a program by the tests; logs what it computes, one line each.

python toystep.py STORE SPEC_JSON LOG [PART OF]
"""

import json
import os
import sys
import time

from stagediff.spec import Spec
from stagediff.store import Store


class ToySpec(Spec):
    step = "toy"
    kind = "toys"
    seed: int = 0
    rows: int = 100
    """In shards of 24 rows: the last one is short, and so is its last chunk."""
    width: int = 16
    train_steps: int = 0
    pause: float = 0.0
    """Seconds per shard and per training step."""


SHARD_ROWS, CHUNK_ROWS, SAVE_EVERY = 24, 8, 3


def log(path: str, line: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def shard_rows(spec: ToySpec, shard: int, rows: int):
    import numpy as np

    return np.random.default_rng([spec.seed, shard]).integers(0, 2**16, size=(rows, spec.width), dtype=np.uint16)


def train(spec: ToySpec, writer, path: str) -> bytes:
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(spec.seed)
    weights, first = torch.zeros(8, 8), 0
    if (state := writer.training.latest()) is not None:
        first, tensors, meta = state
        weights = tensors["weights"]
        generator.set_state(tensors["generator"])
        assert meta == {"position": first * 10}
    for step in range(first, spec.train_steps):
        log(path, f"train {step}")
        time.sleep(spec.pause)
        weights = 0.9 * weights + torch.randn(8, 8, generator=generator)
        if (step + 1) % SAVE_EVERY == 0:
            writer.training.save(step + 1, {"weights": weights, "generator": generator.get_state()}, {"position": (step + 1) * 10})
    return save({"weights": weights})


def fill(spec: ToySpec, store: Store, path: str, part: tuple[int, int] = (0, 1)) -> None:
    with store.write(spec) as writer:
        array = writer.array("data", shape=(spec.rows, spec.width), dtype="uint16", chunk_rows=CHUNK_ROWS, shard_rows=SHARD_ROWS)
        for shard in array.pending(part=part):
            log(path, f"shard {shard}")
            time.sleep(spec.pause)
            array.write_shard(shard, shard_rows(spec, shard, array.rows_of(shard)))
        if not array.is_complete:
            return
        if spec.train_steps:
            writer.write_bytes("weights.safetensors", train(spec, writer, path))
        import pyarrow as pa

        sums = [int(array.read_shard(i).astype("int64").sum()) for i in range(array.n_shards)]
        writer.write_table(
            "sums.parquet", pa.table({"shard": list(range(len(sums))), "sum": sums}), columns={"sum": ("1", "sum of the shard")}
        )
        writer.write_json("about/total.json", {"total": sum(sums)})
        writer.commit(figures={"total": sum(sums)}, numerics={"device": "toy"})


if __name__ == "__main__":
    root, body, log_path, *rest = sys.argv[1:]
    print("ready", flush=True)
    fill(ToySpec(**json.loads(body)), Store(root), log_path, (int(rest[0]), int(rest[1])) if rest else (0, 1))
