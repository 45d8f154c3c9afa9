"""The step planted-harvest: a world's activations at one checkpoint, or its reference space, stored as a harvest stores a model's."""

from typing import TYPE_CHECKING, Any

import torch

from stagediff.lm.harvest import chunk_rows
from stagediff.store.shards import from_bf16
from stagediff.synthetic.rows import TOPICS
from stagediff.synthetic.spec import PlantedHarvestSpec, PlantedTokensSpec
from stagediff.synthetic.world import BLOCK_ROWS, Planted

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["compute"]


def compute(spec: PlantedHarvestSpec, job: "Job") -> dict[str, Any] | None:
    """Writes array `data` (bf16 as uint16) [rows * context, d]; None while other workers' shards are missing."""
    planted, world = Planted(spec.world), spec.world
    stored = job.artifact(spec.tokens)
    token_spec = stored.spec()
    assert isinstance(token_spec, PlantedTokensSpec)
    rows, topics, split = stored.array("rows"), stored.array(TOPICS), token_spec.split
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
                high = min(low + BLOCK_ROWS, spec.rows)
                where = rows.read_rows(low, high), topics.read_rows(low, high), split, low // BLOCK_ROWS
                x = planted.meanings(*where) if spec.space == "reference" else planted.activations(*where, spec.checkpoint)
                blocks.append(torch.from_numpy(x).to(torch.bfloat16))
            block = torch.cat(blocks)
            array.write_shard(i, from_bf16(block))
            task.advance(len(block))
    return {"tokens": n, "d": world.d, "features": len(planted)} if array.is_complete else None
