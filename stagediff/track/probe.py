"""The probe rows of a chain, position by position: the same tokens at every checkpoint, so that a position has one name throughout.

That name is its flat place: row * (kept positions per row) + place among the kept positions. Vectors of chosen positions are read shard by shard; only
the chosen ones stay in memory.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.activations import ActivationReader
from stagediff.lm.spec import ActivationData, HarvestSpec
from stagediff.sae.spec import StatisticsSpec

if TYPE_CHECKING:
    from stagediff.steps import Job
    from stagediff.track.spec import Point

__all__ = ["Probe"]


class Probe:
    """`rows` token rows with `per_row` kept `positions` each; `n` positions in all, `d` numbers each."""

    def __init__(self, points: Sequence["Point"], job: "Job"):
        """Raises UserError where a point's statistics, dictionary and probe do not belong together, or the points' probes differ in their rows."""
        self._job = job
        self.rows = _same_rows(points, job)
        last = self.reader(points[-1])
        self.positions, self.per_row, self.d = last.positions, last.tokens_per_row, last.d
        self.n = self.rows * self.per_row

    def reader(self, point: "Point") -> ActivationReader:
        return ActivationReader(self._job.store, ActivationData(base=point.probe, rows=self.rows))

    def flat(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Flat places, int64, of token rows and positions in them."""
        return np.asarray(row, np.int64) * self.per_row + np.searchsorted(self.positions, position)

    def place(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row int32, position int16) of flat places."""
        return (at // self.per_row).astype(np.int32), self.positions[at % self.per_row]

    def vectors(self, point: "Point", at: np.ndarray) -> Tensor:
        """Activations [len(at), d] bfloat16 at flat places `at` (ascending, distinct), on the CPU. Reads the shards that hold some of them, once each.

        Raises UserError where one is not finite, or the checkpoint's width is another.
        """
        reader = self.reader(point)
        if reader.d != self.d:
            raise UserError(
                f"The activations {point.probe} of step {point.step} have {reader.d} numbers per token, those of the last step have {self.d}. "
                "All checkpoints must be read at one hook point of one architecture."
            )
        found = torch.empty(len(at), self.d, dtype=torch.bfloat16)
        end = 0
        for i in range(reader.n_shards):
            begin = end
            end += reader.shard_tokens(i)
            first, last = np.searchsorted(at, [begin, end]).tolist()
            if first < last:
                found[first:last] = reader.read_shard(i)[torch.from_numpy(at[first:last] - begin)]
        if not torch.isfinite(found).all():
            raise UserError(
                f"The activations {point.probe} of step {point.step} hold NaN or infinity. Harvest them in fp32, or look for the layer of the model "
                "that overflows."
            )
        return found


def _same_rows(points: Sequence["Point"], job: "Job") -> int:
    """How many token rows the statistics were taken over, which must be the same rows for all points."""
    last = _harvest(points[-1], job)
    rows = set()
    for point in points:
        statistics, probe = job.artifact(point.statistics).spec(), _harvest(point, job)
        if not isinstance(statistics, StatisticsSpec):
            raise UserError(f"{point.statistics}, given as the statistics of step {point.step}, was made by step {statistics.step!r}.")
        data = statistics.data
        if statistics.dictionary != point.dictionary or data.base != point.probe or data.mix is not None:
            raise UserError(
                f"The statistics {point.statistics} of step {point.step} are of {statistics.dictionary} on {data.base}{' with a mix' if data.mix else ''}; "
                f"those of {point.dictionary} on the plain probe rows {point.probe} were expected."
            )
        if (probe.tokens, probe.skip_positions) != (last.tokens, last.skip_positions):
            raise UserError(
                f"The probe {point.probe} of step {point.step} is of token rows {probe.tokens} without positions {list(probe.skip_positions)}, that of step "
                f"{points[-1].step} of {last.tokens} without {list(last.skip_positions)}. The same datapoints are followed through all checkpoints: harvest "
                "the same rows."
            )
        rows.add(data.rows)
    if len(rows) > 1:
        raise UserError(
            f"The points' statistics were taken over different numbers of probe rows ({sorted(rows)}). Use the same rows for all."
        )
    return rows.pop()


def _harvest(point: "Point", job: "Job") -> HarvestSpec:
    spec = job.artifact(point.probe).spec()
    if not isinstance(spec, HarvestSpec):
        raise UserError(
            f"{point.probe}, given as the probe of step {point.step}, was made by step {spec.step!r}; activations were expected."
        )
    return spec
