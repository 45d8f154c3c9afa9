"""Datapoints of every feature: positions of the probe rows in its region R_i, the positions on which it is active at the final checkpoint (arXiv 2412.17626,
section on feature formation; for relu R_i = {x : W_enc_i . x' + b_enc_i > 0}, for the others their own gate).

top     the strongest examples that the final statistics kept, at most one per probe row: the paper's 25 strongest tokens, but of 25 different contexts, so that
        a bootstrap over datapoints does not take neighbours in one text for independent.
levels  a sample across the feature's activation range (threshold or 0, maximum], cut into equal-width bands: equally many per band, drawn without replacement;
        what a band does not hold is taken from the others, evenly, the stronger band first. It answers that strongest examples alone flatter a feature.

The sample is drawn in one pass. Each firing has a pseudo-random priority, a hash of seed, feature and position; a band keeps its firings of lowest priority.
That is a uniform draw whatever the order and the blocks in which firings come.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.sae.dictionary import SAE
from stagediff.track.probe import Probe
from stagediff.track.spec import SETS, FormationRule, FormationSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["REGION_COLUMNS", "LevelSample", "random_positions", "regions"]

BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Activations (tokens x features) encoded at once."""
SAVE_SECONDS = 60.0


def regions(spec: FormationSpec, job: "Job", probe: Probe, saved: tuple[int, dict[str, Tensor]] | None) -> pd.DataFrame:
    """The datapoints of all features in one pass over the final probe (REGION_COLUMNS), ordered by feature, set and rank.

    saved: (shards done, state) of a killed pass. Raises UserError where the statistics kept too few examples, or activations are not finite.
    """
    point, rule = spec.points[-1], spec.rule
    top = _top(spec, job)
    sae = SAE.load(job.artifact(point.dictionary)).to(job.device)
    largest = job.artifact(point.statistics).read_table("features.parquet", columns=["max"])["max"].to_numpy(np.float64)
    smallest = np.zeros(sae.features) if sae.threshold is None else sae.threshold.clamp_min(0).cpu().numpy().astype(np.float64)
    sample = LevelSample(smallest, largest, rule, spec.seed, probe.n)
    start = 0
    if saved:
        start = saved[0]
        sample.load_state(saved[1])
    reader, written = probe.reader(point), time.monotonic()
    begin = sum(reader.shard_tokens(i) for i in range(start))
    with job.progress.task("regions", probe.n, "tokens", done=begin) as task:
        for i in range(start, reader.n_shards):
            x = reader.read_shard(i)
            if not torch.isfinite(x).all():
                raise UserError(f"The activations {point.probe} of step {point.step} hold NaN or infinity. Harvest them in fp32.")
            for token, feature, value in _firings(sae, x, job.device):
                sample.add(feature, value, begin + token)
            begin += len(x)
            task.advance(len(x))
            if time.monotonic() - written > SAVE_SECONDS:
                job.writer.training.save(i + 1, sample.state(), {"part": "regions"})
                written = time.monotonic()
    levels = sample.table()
    row, position = probe.place(levels.pop("at").to_numpy())
    table = pd.concat([top, levels.assign(set="levels", row=row, position=position)], ignore_index=True)
    table["set"] = pd.Categorical(table["set"], categories=SETS)
    table = table.sort_values(["feature", "set", "rank"], ignore_index=True)
    return table[list(REGION_COLUMNS)].astype({"feature": np.int32, "rank": np.int32, "level": np.int32, "activation": np.float32})


def random_positions(probe: Probe, rule: FormationRule, seed: int) -> np.ndarray:
    """[rule.random] distinct flat places, ascending. Raises UserError where the probe has fewer."""
    if rule.random > probe.n:
        raise UserError(
            f"{rule.random} random positions are asked of probe rows that hold {probe.n}. Use more probe rows, or lower formation.random."
        )
    return np.sort(np.random.default_rng(seed).choice(probe.n, rule.random, replace=False))


class LevelSample:
    """Of every feature up to `rule.datapoints` firings, spread over `rule.levels` bands between `smallest` and `largest` [F].

    A band keeps as many as a whole feature may need, since the others may be empty. Features with an empty range (largest <= smallest) have none.
    """

    FIELDS = ("cell", "priority", "at", "value")
    TYPES = (np.int64, np.uint64, np.int64, np.float32)

    def __init__(
        self, smallest: np.ndarray, largest: np.ndarray, rule: FormationRule, seed: int, positions: int, merge_at: int | None = None
    ):
        self.levels, self.keep, self.positions = rule.levels, rule.datapoints, positions
        self.merge_at = merge_at or max(1 << 18, len(smallest) * rule.levels * rule.datapoints // 2)
        self.smallest, self.width = smallest, np.maximum(largest - smallest, 0.0) / rule.levels
        self._seed = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self._kept = [np.empty(0, t) for t in self.TYPES]
        self._waiting: list[list[np.ndarray]] = []
        self._n_waiting = 0
        self._bar = np.full(len(smallest) * rule.levels, np.iinfo(np.uint64).max)
        """[F x levels] the highest priority that a full band keeps: what lies above cannot enter."""

    def add(self, feature: np.ndarray, value: np.ndarray, at: np.ndarray) -> None:
        """Firings: feature int64, activation float32, flat place int64, all [n]. No (feature, place) twice."""
        width = self.width[feature]
        band = (value - self.smallest[feature]) / np.where(width > 0, width, 1.0)
        cell = feature * self.levels + np.clip(band.astype(np.int64), 0, self.levels - 1)
        priority = _hashed(self._seed, feature * self.positions + at)
        good = (priority < self._bar[cell]) & (width > 0)
        columns = (cell, priority, at, value)
        self._waiting.append([c[good].astype(t, copy=False) for c, t in zip(columns, self.TYPES, strict=True)])
        self._n_waiting += int(good.sum())
        if self._n_waiting >= self.merge_at:
            self._merge()

    def _merge(self) -> None:
        cell, priority, at, value = (np.concatenate([kept, *(w[i] for w in self._waiting)]) for i, kept in enumerate(self._kept))
        order = np.lexsort((at, priority, cell))
        rank = _rank_within(cell[order])
        order, rank = order[rank < self.keep], rank[rank < self.keep]
        self._kept, self._rank = [c[order] for c in (cell, priority, at, value)], rank
        last = rank == self.keep - 1
        self._bar[self._kept[0][last]] = self._kept[1][last]
        self._waiting, self._n_waiting = [], 0

    def table(self) -> pd.DataFrame:
        """Columns feature, rank (0: strongest), level, at (flat place), activation; ordered by feature and rank."""
        self._merge()
        cell, _, at, value = self._kept
        feature, level = cell // self.levels, cell % self.levels
        # Round after round every band gives one, as long as it has some: the first `keep` of a feature in that order.
        order = np.lexsort((self.levels - level, self._rank, feature))
        order = order[_rank_within(feature[order]) < self.keep]
        order = order[np.lexsort((at[order], np.negative(value[order]), feature[order]))]
        feature = feature[order]
        return pd.DataFrame(
            {"feature": feature, "rank": _rank_within(feature), "level": level[order], "at": at[order], "activation": value[order]}
        )

    def state(self) -> dict[str, Tensor]:
        self._merge()
        return {
            name: torch.from_numpy(c.view(np.int64) if c.dtype == np.uint64 else c) for name, c in zip(self.FIELDS, self._kept, strict=True)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._kept = [state[name].numpy().view(t) for name, t in zip(self.FIELDS, self.TYPES, strict=True)]
        self._waiting, self._n_waiting = [], 0
        self._merge()


def _hashed(seed: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A pseudo-random uint64 per key: splitmix64 (Steele, Lea and Flood 2014) at counter `key`."""
    z = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _rank_within(group: np.ndarray) -> np.ndarray:
    """[n] 0, 1, 2, … within each run of equal values."""
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else np.empty(0, np.int64)
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def _top(spec: FormationSpec, job: "Job") -> pd.DataFrame:
    artifact, wanted = job.artifact(spec.points[-1].statistics), spec.rule.datapoints
    kept = artifact.spec().top  # type: ignore[attr-defined]  # Probe has seen that it is a StatisticsSpec
    if kept < wanted:
        raise UserError(
            f"{wanted} datapoints per feature are asked for, but the final statistics {artifact.ref} kept {kept} examples. Compute them with top: {wanted} "
            "or more, or lower formation.datapoints."
        )
    table = artifact.read_table("examples.parquet", columns=["feature", "rank", "activation", "row", "position"])
    return table[table["rank"] < wanted].assign(set="top", level=0)


def _firings(sae: SAE, x: Tensor, device: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(token counted from the first of x, feature, activation) of everything active on x [n, d], a bounded number of tokens at a time."""
    at_once = max(1, BLOCK_ELEMENTS[torch.device(device).type] // sae.features)
    for begin in range(0, len(x), at_once):
        f = sae.encode(x[begin : begin + at_once].to(device)).flatten()
        at = f.nonzero().squeeze(1)
        where = at.cpu().numpy()
        yield begin + where // sae.features, where % sae.features, f[at].float().cpu().numpy()


REGION_COLUMNS: dict[str, tuple[str, str]] = {
    "feature": ("index", "feature of the chain"),
    "set": ("name", "top: strongest examples, at most one per row; levels: a sample across the activation range"),
    "rank": ("index", "0 is the strongest of its set"),
    "level": ("index", "band of the activation range, 0 the weakest (set top: 0)"),
    "row": ("index", "token row of the probe"),
    "position": ("index", "token position in the row"),
    "activation": ("activation", "at the final checkpoint, scaled units"),
}
RANDOM_COLUMNS: dict[str, Any] = {
    "row": ("index", "token row of the probe"),
    "position": ("index", "token position in the row"),
}
