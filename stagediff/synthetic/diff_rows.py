"""The steps planted-diff-tokens and planted-diff-harvest: a DiffWorld's rows and activations, stored as real ones are."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from stagediff.lm.harvest import chunk_rows
from stagediff.lm.tokens import ROW_COLUMNS
from stagediff.store.shards import from_bf16
from stagediff.synthetic.diff_spec import BLOCK_ROWS, PlantedDiffHarvestSpec, PlantedDiffTokensSpec
from stagediff.synthetic.diff_world import PlantedDiff

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["harvest", "tokens"]


def tokens(spec: PlantedDiffTokensSpec, job: "Job") -> dict[str, Any]:
    """Writes array "rows" [rows, context] int32 (the row's topic at every place) and rows.parquet."""
    planted, n = PlantedDiff(spec.world), spec.rows
    array = job.writer.array("rows", shape=(n, spec.context), dtype="int32", chunk_rows=BLOCK_ROWS, shard_rows=BLOCK_ROWS)
    with job.progress.task("planted rows", n, "rows") as task:
        for block in array.pending():
            topics = planted.topics(_data(spec), spec.split, block)[: array.rows_of(block)]
            array.write_shard(block, np.repeat(topics[:, None], spec.context, axis=1))
            task.advance(len(topics))
    source = pd.Categorical.from_codes(np.zeros(n, np.int8), categories=pd.Index(["planted"]))
    frame = pd.DataFrame({"row": np.arange(n), "document": np.arange(n), "source": source, "is_new": np.full(n, spec.is_new)})
    job.writer.write_table("rows.parquet", frame, columns=ROW_COLUMNS)
    return {"rows": n, "tokens": n * spec.context, "topics": spec.world.topics}


def harvest(spec: PlantedDiffHarvestSpec, job: "Job") -> dict[str, Any] | None:
    """Writes array "data" (bf16 as uint16) [rows * context, d]; None while other workers' shards are missing."""
    planted, world = PlantedDiff(spec.world), spec.world
    token_spec = job.artifact(spec.tokens).spec()
    assert isinstance(token_spec, PlantedDiffTokensSpec)
    data, split = _data(token_spec), token_spec.split
    n, shard = spec.rows * world.context, spec.shard_rows * world.context
    array = job.writer.array(
        "data",
        shape=(n, world.d),
        dtype="uint16",
        chunk_rows=chunk_rows(shard, world.d),
        shard_rows=shard,
        attributes={"encoding": "bfloat16", "hook": spec.hook.model_dump(), "tokens_per_row": world.context},
    )
    with job.progress.task("planted activations", n, "tokens") as task:
        for i in array.pending(part=job.part):
            first = i * spec.shard_rows
            blocks = []
            for low in range(first, min(first + spec.shard_rows, spec.rows), BLOCK_ROWS):
                block = low // BLOCK_ROWS
                topics = planted.topics(data, split, block)[: spec.rows - low]
                x = planted.activations(topics, data, split, block, spec.side)
                blocks.append(torch.from_numpy(x).to(torch.bfloat16))
            whole = torch.cat(blocks)
            array.write_shard(i, from_bf16(whole))
            task.advance(len(whole))
    return {"tokens": n, "d": world.d, "features": len(planted)} if array.is_complete else None


def _data(spec: PlantedDiffTokensSpec) -> str:
    return "new" if spec.is_new else "base"
