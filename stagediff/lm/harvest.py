"""Harvest: runs a model over token rows up to a hook point and stores the activations as bf16 shards.

The array `data` [n, d] holds the rows one after the other, each without the skipped positions, so activation j belongs to row
j // tokens_per_row. Shards hold whole token rows: a killed harvest goes on at the first missing shard, and several workers share one by
shard ranges. On a CPU a shard is written before the next one is computed, so that a kill costs one shard at most; on CUDA the next one is
computed meanwhile (docs/decisions/004). Memory: one batch and one shard, on CUDA two.

fp16 is never used: residual streams overflow it (Gemma 3 reaches 696,320). NaN and infinity are an error that names the row and the layer.
"""

import hashlib
import json
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm import hooks, sources
from stagediff.lm.activations import kept_positions
from stagediff.lm.models import LoadedModel, load_model
from stagediff.lm.spec import HarvestSpec, HookPoint, TokensSpec

if TYPE_CHECKING:
    from stagediff.steps import Job
    from stagediff.store.arrays import ArrayWriter
    from stagediff.store.writer import Writer

__all__ = ["FIRST_SHARD", "chunk_rows", "compute", "forward_shard", "vectors"]

CHUNK_BYTES = 8 << 20
FIRST_SHARD = "first-shard.json"
"""Of a harvest that is not stored: stands for the bytes that its readers make."""
AHEAD_ON_CUDA = 1
"""Shards that may still be in writing there while the next one is computed. A CPU has none: a kill loses one shard more than this at most."""


def compute(spec: HarvestSpec, job: "Job") -> dict[str, Any] | None:
    """Writes array `data` (bf16 as uint16) [rows * kept positions, d]; None while other workers' shards are missing.

    Where it is not to be stored, FIRST_SHARD instead: what was made of the first shard, looked at and forgotten.

    Figures: tokens, d, mean_norm, max_norm and mean_norm_per_sqrt_d of the stored vectors (where none are to be stored, of measured_tokens).
    Raises UserError: not enough rows, token ids the model does not know, NaN or infinity in the activations.
    """
    tokens = job.artifact(spec.tokens)
    token_spec = tokens.spec()
    if not isinstance(token_spec, TokensSpec):
        raise UserError(
            f"{spec.tokens} is an artifact of step {token_spec.step!r}. Plain token rows are harvested; a mix is read through its base and "
            "new rows' activations."
        )
    _check(spec, token_spec)
    sources.check_hook(spec.model, spec.hook, job.store)
    rows = tokens.array("rows")
    if rows.shape[0] < spec.rows:
        raise UserError(
            f"The harvest asks for {spec.rows:,} token rows, but {spec.tokens} holds {rows.shape[0]:,}. Draw more rows, or harvest fewer."
        )
    config = sources.model_config(spec.model, job.store)
    assert config is not None
    d = sources.width(config)
    kept = kept_positions(token_spec.context, spec.skip_positions)
    per_row = len(kept)
    n = spec.rows * per_row
    if not spec.stored:
        return {"tokens": n, "d": d, **_looked_at(spec, job, rows.read_rows(0, min(spec.shard_rows, spec.rows)), kept, d)}
    shard_tokens = spec.shard_rows * per_row
    array = job.writer.array(
        "data",
        shape=(n, d),
        dtype="uint16",
        chunk_rows=chunk_rows(shard_tokens, d),
        shard_rows=shard_tokens,
        attributes={"encoding": "bfloat16", "hook": spec.hook.model_dump(), "tokens_per_row": per_row},
    )
    loaded: LoadedModel | None = None
    on_cuda = job.device.startswith("cuda")
    computed, start, cpu_start, waited = 0, 0.0, 0.0, 0.0
    i, of = job.part
    mine = range(array.n_shards * i // of, array.n_shards * (i + 1) // of)
    there = sum(array.rows_of(shard) for shard in array.done() if shard in mine)
    with (
        job.progress.task("harvest", sum(array.rows_of(shard) for shard in mine), "tokens", done=there) as task,
        _Writer(job.writer, array, AHEAD_ON_CUDA if on_cuda else 0) as writer,
    ):
        for shard in array.pending(part=job.part):
            if loaded is None:
                loaded = load_model(spec.model, job.store, precision=spec.precision, device=job.device, upto=spec.hook)
                start, cpu_start = time.perf_counter(), time.process_time()
            first = shard * spec.shard_rows
            ids = rows.read_rows(first, min(first + spec.shard_rows, spec.rows))
            block = writer.block(len(ids) * per_row, d, pinned=on_cuda)
            norms = vectors(loaded, spec, ids, first, kept, block, advance=task.advance)
            waited += writer.put(shard, block, norms)
            computed += len(block)
    if computed:
        seconds = time.perf_counter() - start
        job.notes["harvest"] = {
            "tokens": computed,
            "seconds": round(seconds, 3),
            "cpu_seconds": round(time.process_time() - cpu_start, 3),
            "tokens_per_second": round(computed / seconds),
            "seconds_waited_for_writer": round(waited, 3),
        }
    return {"tokens": n, "d": d, **_norms(job.writer, array, d)} if array.is_complete else None


def _looked_at(spec: HarvestSpec, job: "Job", ids: np.ndarray, kept: np.ndarray, d: int) -> dict[str, Any]:
    """Figures of the first shard, of a harvest that is not stored: what is wrong with the model or the rows is known before a training begins.

    FIRST_SHARD names what it was made from too, so that whoever read other bytes than it would give now is known (`Store.bytes_of`).
    """
    job.writer.leaves_bulk_out = True
    with job.progress.task("harvest", len(ids) * len(kept), "tokens") as task:
        loaded = load_model(spec.model, job.store, precision=spec.precision, device=job.device, upto=spec.hook)
        block = torch.empty(len(ids) * len(kept), d, dtype=torch.bfloat16)
        norms = vectors(loaded, spec, ids, 0, kept, block, advance=task.advance)
    for left in ("data", "norms"):  # of a harvest that was to be stored, and was stopped
        job.writer.drop(left)
    digest = hashlib.sha256(block.view(torch.uint16).numpy().tobytes()).hexdigest()
    job.writer.write_json(FIRST_SHARD, {"tokens": len(block), "sha256": digest, "inputs": job.store.bytes_of(spec.refs())})
    mean = float(norms.double().mean())
    return {"measured_tokens": len(block), "mean_norm": mean, "max_norm": float(norms.max()), "mean_norm_per_sqrt_d": mean / d**0.5}


def chunk_rows(shard_rows: int, d: int) -> int:
    """Rows per chunk: the largest divisor of the shard's rows that stays within 8 MiB at 2 d bytes per row (at least one row)."""
    parts = min(shard_rows, max(1, -(-shard_rows * d * 2 // CHUNK_BYTES)))
    while shard_rows % parts:
        parts += 1
    return shard_rows // parts


def vectors(
    loaded: LoadedModel, spec: HarvestSpec, ids: np.ndarray, first: int, kept: np.ndarray, out: Tensor, advance: Any = None
) -> Tensor:
    """As `forward_shard` for the token rows from `first` on. Raises UserError: token ids the model does not know, NaN or infinity."""
    _check_ids(ids, loaded, spec)
    norms = forward_shard(loaded, spec.hook, ids, kept, spec.batch_rows, out, advance)
    if not bool(torch.isfinite(norms).all()):
        _explain(loaded, spec, ids, out, first, len(kept))
    return norms


def forward_shard(
    loaded: LoadedModel, hook: HookPoint, ids: np.ndarray, kept: np.ndarray, batch_rows: int, out: Tensor, advance: Any = None
) -> Tensor:
    """Fills out [rows * kept, d] (bf16, CPU) with the activations of ids [rows, context]; returns the vectors' norms, float32 [rows * kept].

    On CUDA, copies overlap with the next batch; all are done on return.
    """
    device = loaded.device
    norms = []
    is_run = bool((np.diff(kept) == 1).all())
    picked = slice(int(kept[0]), int(kept[-1]) + 1) if is_run else torch.from_numpy(kept.astype(np.int64))
    at = 0
    with torch.inference_mode():
        for low in range(0, len(ids), batch_rows):
            batch = torch.from_numpy(ids[low : low + batch_rows].astype(np.int64)).to(device, non_blocking=True)
            x = hooks.read(loaded.model, hook, batch)[:, picked].to(torch.bfloat16)  # [batch, kept, d]
            place = out[at : at + x.shape[0] * x.shape[1]]
            place.view(x.shape).copy_(x, non_blocking=True)
            norms.append(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).reshape(-1))
            at += len(place)
            if advance is not None:
                advance(len(place))
        return torch.cat(norms).cpu()  # on CUDA this waits for everything before it


def _check(spec: HarvestSpec, tokens: TokensSpec) -> None:
    if spec.shard_rows % spec.batch_rows:
        raise UserError(
            f"shard_rows ({spec.shard_rows}) is no multiple of batch_rows ({spec.batch_rows}). Choose one that is, so that every batch "
            "lies in one shard."
        )
    wrong = [p for p in spec.skip_positions if not 0 <= p < tokens.context]
    if wrong or len(set(spec.skip_positions)) == tokens.context:
        raise UserError(
            f"skip_positions {spec.skip_positions} do not fit rows of {tokens.context} tokens: positions 0 to {tokens.context - 1} exist, "
            "and one at least must stay."
        )


def _check_ids(ids: np.ndarray, loaded: LoadedModel, spec: HarvestSpec) -> None:
    if ids.size and (int(ids.max()) >= loaded.vocab or int(ids.min()) < 0):
        raise UserError(
            f"The token rows {spec.tokens} hold token id {int(ids.max())}, but the model {loaded.where} knows ids 0 to {loaded.vocab - 1}. "
            "They were made with another tokenizer; draw the rows with the model's own."
        )


def _explain(loaded: LoadedModel, spec: HarvestSpec, ids: np.ndarray, block: Tensor, first: int, per_row: int) -> None:
    """Raises UserError naming the row and the first layer that yields NaN or infinity; returns when only a norm overflowed."""
    bad = ~torch.isfinite(block).all(dim=1)
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0]) // per_row
    input_ids = torch.from_numpy(ids[row : row + 1].astype(np.int64)).to(loaded.device)
    where = f"layer {spec.hook.layer} ({spec.hook.site})"
    for layer in range(spec.hook.layer + 1):
        if not bool(torch.isfinite(hooks.read(loaded.model, HookPoint(layer=layer), input_ids)).all()):
            where = f"the output of layer {layer - 1}" if layer else "the embedding"
            break
    raise UserError(
        f"The model {loaded.where} yields NaN or infinity at {where} on token row {first + row} of {spec.tokens} in {spec.precision}. "
        "Activations must be finite: check the model's weights (a damaged or diverged checkpoint is the usual reason), or try precision "
        "fp32."
    )


def _norms(writer: "Writer", array: "ArrayWriter", d: int) -> dict[str, float]:
    """Mean and largest norm over all shards, whoever computed them, from the small file beside each."""
    total, largest, count = 0.0, 0.0, 0
    for shard in range(array.n_shards):
        found = json.loads(writer.read_bytes(_norms_file(shard)))
        total, largest, count = total + found["sum"], max(largest, found["max"]), count + found["tokens"]
    mean = total / count
    return {"mean_norm": mean, "max_norm": largest, "mean_norm_per_sqrt_d": mean / d**0.5}


def _norms_file(shard: int) -> str:
    return f"norms/{shard:06d}.json"


class _Writer:
    """Writes shards in order in a thread of its own, of which at most `ahead` may be unfinished when `put` returns.

    A fault there is raised by this or a later `put`, or at the end.
    """

    def __init__(self, writer: "Writer", array: "ArrayWriter", ahead: int):
        self._writer, self._array, self._ahead = writer, array, ahead
        self._free: list[Tensor] = []
        self._writing: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stagediff-shard-writer")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._pool.shutdown()  # what was computed is written, whatever ended the harvest
        if kind is None:
            self._wait(0)

    def block(self, n: int, d: int, pinned: bool) -> Tensor:
        """Memory for a shard [n, d] bf16, used again once it is written."""
        while self._free:
            kept = self._free.pop()
            if kept.shape[0] >= n:
                return kept[:n]
        return torch.empty((n, d), dtype=torch.bfloat16, pin_memory=pinned)

    def put(self, shard: int, block: Tensor, norms: Tensor) -> float:
        """Hands a shard and its vectors' norms over; returns the seconds waited for shards being written."""
        start = time.perf_counter()
        self._writing.append(self._pool.submit(self._write, shard, block, norms))
        self._wait(self._ahead)
        return time.perf_counter() - start

    def _wait(self, unfinished: int) -> None:
        while len(self._writing) > unfinished:
            self._writing.popleft().result()

    def _write(self, shard: int, block: Tensor, norms: Tensor) -> None:
        found = {"tokens": len(norms), "sum": float(norms.double().sum()), "max": float(norms.max())}
        self._writer.write_json(_norms_file(shard), found)
        self._array.write_shard(shard, block.view(torch.uint16).numpy())
        self._free.append(block)
