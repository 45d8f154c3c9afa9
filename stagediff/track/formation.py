"""The step `formation`: where every feature is active at the end, how alike these places were at every checkpoint, and when they became so (SAE-Track,
arXiv 2412.17626, section on feature formation; method.md, section 3).

Progress M_i(t) is the mean similarity over pairs of the feature's datapoints at checkpoint t minus that over random positions, the same for all features and
checkpoints. Model and dictionary are those of t; the datapoints are found once, at the final checkpoint (`regions`).

A checkpoint is measured a block of sets at a time: the block's vectors are read in one pass over the probe's shards, then encoded some sets at a time, and only
what the pairs' similarities say is kept. A position is encoded once for each set that it lies in, at most features x datapoints x 2 vectors per checkpoint:
what a pass of the statistics over as many tokens costs. Memory: VECTOR_BYTES and a few times CODE_BYTES, whatever the number of tokens, beside
4 measures x 2 sets x features x (bootstrap + checkpoints) numbers. A killed step goes on after the last saved shard or checkpoint, to the same bytes.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.store.tables import decode_table
from stagediff.track import formation_tables as tables
from stagediff.track.datapoints import Datapoints
from stagediff.track.decoders import ChainDecoders
from stagediff.track.formation_times import Walk, pair_weights
from stagediff.track.probe import Probe
from stagediff.track.regions import RANDOM_COLUMNS, REGION_COLUMNS, random_positions, regions
from stagediff.track.similarity import similarities
from stagediff.track.spec import FormationSpec, Point

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["compute"]

VECTOR_BYTES = 1 << 30
"""Activations of a block's datapoints, held at once in bfloat16."""
CODE_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Codes (datapoints x features, fp32) held at once."""
ROWS_AT_ONCE = 4096
"""Datapoints encoded at once, where memory allows: more would only leave the processor's caches."""
SAVE_SECONDS = 60.0


def compute(spec: FormationSpec, job: "Job") -> dict[str, Any]:
    """Writes the tables of FormationSpec. Raises UserError for inputs that do not belong together or hold too few positions."""
    began = time.monotonic()
    probe = Probe(spec.points, job)
    features = _features(spec, job, probe)
    kind = None if spec.kinds is None else tables.final_kinds(job.artifact(spec.kinds), spec.points[-1].step, features)
    at_random = random_positions(probe, spec.rule, spec.seed)
    datapoints, saved = _datapoints(spec, job, probe, features)
    job.notes["seconds_regions"] = round(time.monotonic() - began, 2)
    walk = Walk(datapoints.sets, len(spec.points), spec.rule)
    done = 0
    if saved:
        done = saved[0]
        walk.load_state(saved[1])
    walked = time.monotonic()
    _walk(spec, job, probe, datapoints, at_random, walk, done)
    job.notes["seconds_per_checkpoint"] = round((time.monotonic() - walked) / max(1, len(spec.points) - done), 2)

    row, position = probe.place(at_random)
    job.writer.write_table("random.parquet", pd.DataFrame({"row": row, "position": position}), columns=RANDOM_COLUMNS)
    firings = job.artifact(spec.points[-1].statistics).read_table("features.parquet", columns=["firings"]).firings.to_numpy()
    results = tables.Results(spec, walk, datapoints.size, firings >= spec.alive_firings)
    made = {
        "formation": (results.formation(), tables.FORMATION_COLUMNS),
        "baseline": (results.baseline(), tables.BASELINE_COLUMNS),
        "formed": (results.formed(), tables.FORMED_COLUMNS),
        "agreement": (results.agreement(), tables.AGREEMENT_COLUMNS),
    }
    if kind is not None:
        made["by_kind"] = (results.by_kind(kind), tables.BY_KIND_COLUMNS)
    for name, (table, columns) in made.items():
        job.writer.write_table(f"{name}.parquet", table, columns=columns)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return results.figures()


def _features(spec: FormationSpec, job: "Job", probe: Probe) -> int:
    chain = ChainDecoders(job, [p.dictionary for p in spec.points])
    if chain.d != probe.d:
        raise UserError(
            f"The dictionaries read {chain.d} numbers per token, but the probe {spec.points[-1].probe} has {probe.d}: they belong to another model "
            "or hook point."
        )
    return chain.features


def _datapoints(spec: FormationSpec, job: "Job", probe: Probe, features: int) -> tuple[Datapoints, tuple[int, dict[str, Tensor]] | None]:
    """The datapoints, from an earlier run where it wrote them, and (checkpoints done, state) of a walk that was killed."""
    latest = job.writer.training.latest()
    part = latest[2]["part"] if latest else None
    if not job.writer.has("regions.parquet"):
        table = regions(spec, job, probe, latest[:2] if latest and part == "regions" else None)
        job.writer.write_table("regions.parquet", table, columns=REGION_COLUMNS)
    table = decode_table(job.writer.read_bytes("regions.parquet"))
    saved = (latest[2]["done"], latest[1]) if latest and part == "walk" else None
    return Datapoints(table, probe, features), saved


def _walk(spec: FormationSpec, job: "Job", probe: Probe, datapoints: Datapoints, at_random: np.ndarray, walk: Walk, done: int) -> None:
    T, rule, device = len(spec.points), spec.rule, job.device
    with_pairs = datapoints.size[datapoints.size > 1]
    weights = {n: torch.from_numpy(pair_weights(n, rule.bootstrap, spec.seed)).to(device) for n in np.unique(with_pairs).tolist()}
    shards, saved = probe.reader(spec.points[-1]).n_shards, time.monotonic()
    with job.progress.task("formation", T * len(with_pairs), "sets", done=done * len(with_pairs)) as task:
        for t in reversed(range(T - done)):
            point = spec.points[t]
            sae = SAE.load(job.artifact(point.dictionary)).to(device)
            for s in _similarities([at_random[None]], point, sae, probe, device):
                walk.baseline[t] = s.double().mean(2)[:, 0].cpu().numpy()
            baseline = torch.from_numpy(walk.baseline[t]).to(device)[:, None, None]
            at_once = min(ROWS_AT_ONCE, CODE_BYTES[torch.device(device).type] // (4 * sae.features))
            for block in datapoints.blocks(VECTOR_BYTES // (2 * probe.d), at_once):
                found = _similarities([datapoints.at(group) for group in block], point, sae, probe, device)
                for group, s in zip(block, found, strict=True):
                    m = s.double() @ weights[int(datapoints.size[group[0]])] - baseline
                    walk.update(t, group, m.float().cpu().numpy())
                    task.advance(len(group))
            if t and time.monotonic() - saved > SAVE_SECONDS:
                job.writer.training.save(shards + T - t, walk.state(), {"part": "walk", "done": T - t})
                saved = time.monotonic()


def _similarities(groups: Sequence[np.ndarray], point: Point, sae: SAE, probe: Probe, device: str) -> Iterator[Tensor]:
    """Of each group of sets ([B, n] flat places) what `similarities` says at this checkpoint. One pass over the probe for all groups."""
    wanted, entry = np.unique(np.concatenate([at.ravel() for at in groups]), return_inverse=True)
    vectors, begin = probe.vectors(point, wanted), 0
    for at in groups:
        x = vectors[torch.from_numpy(entry[begin : begin + at.size])].to(device).float()
        begin += at.size
        yield similarities(x.view(*at.shape, -1), sae.encode(x).view(*at.shape, -1))
