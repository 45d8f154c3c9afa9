"""A tracking run as its report reads it: the tables of the analysis steps as arrays [features, checkpoints].

Tables of a large run hold millions of rows (65,536 features at 30 checkpoints: two million), so they are read batch by batch into small arrays. A step that
the run lacks gives None, and so does one whose tables are about no feature.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stagediff.sections import ReportContext
from stagediff.track.spec import KINDS, MEASURES, PATTERNS, DriftSpec, Point

if TYPE_CHECKING:
    import pandas as pd

    from stagediff.store import Artifact

__all__ = ["NODES", "NONE", "TrackRun", "Words", "open_run"]

NODES = ("kinds", "formation", "drift", "patterns", "phases", "umap", "efficiency")
"""The analysis steps by their names in a run's plan."""
NONE = 15
"""Code of "no kind" and "no pattern" (half a byte)."""
BATCH = 1 << 18


class Words:
    """Distinct texts in the order in which they were met; a page holds each once."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


@dataclass
class TrackRun:
    """F features at T checkpoints. Arrays are in the order of features and of `steps`."""

    context: ReportContext
    artifacts: dict[str, "Artifact"]
    points: tuple[Point, ...]
    words: Words = field(default_factory=Words)

    @cached_property
    def steps(self) -> list[int]:
        """Training steps of the checkpoints, ascending."""
        if self.points:
            return [p.step for p in self.points]
        return sorted({int(s) for s in self.artifacts["efficiency"].read_table("quality.parquet", columns=["step"])["step"]})

    @cached_property
    def features(self) -> int:
        """How many features the tables are about; 0 for a run without any table of features."""
        for node, name in (("kinds", "kinds"), ("drift", "trajectory"), ("formation", "formed"), ("patterns", "patterns")):
            if node in self.artifacts:
                return 1 + max((int(pc.max(b["feature"]).as_py()) for b in self._batches(node, name, ["feature"]) if len(b)), default=-1)
        return 0

    @property
    def measure(self) -> str:
        """The measure that says when a feature formed: the drift step's."""
        spec = self.artifacts["drift"].spec() if "drift" in self.artifacts else None
        return spec.measure if isinstance(spec, DriftSpec) else MEASURES[0]

    def table(self, node: str, name: str, columns: Sequence[str] | None = None) -> "pd.DataFrame | None":
        """A small table; None where the run lacks that step or the step that table."""
        artifact = self.artifacts.get(node)
        if artifact is None or f"{name}.parquet" not in artifact.names():
            return None
        return artifact.read_table(f"{name}.parquet", columns)

    # Per feature and checkpoint

    @cached_property
    def kind(self) -> np.ndarray | None:
        """[F, T] uint8 codes into KINDS, NONE where nothing was said."""
        return self._codes("kinds", "kinds", "kind", KINDS)

    @cached_property
    def pattern(self) -> np.ndarray | None:
        """[F, T] uint8 codes into PATTERNS of what happened on the way to each checkpoint; NONE at the first."""
        return self._codes("patterns", "patterns", "pattern", PATTERNS, at="to_step")

    @cached_property
    def token(self) -> np.ndarray | None:
        """[F, T] int32 places in `words` of the strongest token; -1 where there is none."""
        if "kinds" not in self.artifacts:
            return None
        found = np.full((self.features, len(self.steps)), -1, np.int32)
        for batch in self._batches("kinds", "kinds", ["feature", "step", "token"]):
            places = _text_codes(batch["token"], self.words)
            found[_index(batch, "feature"), self._at(batch, "step")] = places
        return found

    def grid(self, node: str, name: str, column: str, which: str | None = None) -> np.ndarray | None:
        """[F, T] float32 of a numeric column, NaN where it is null; None where the run lacks the step. `which`: the value of column `set`."""
        if node not in self.artifacts:
            return None
        found = np.full((self.features, len(self.steps)), np.nan, np.float32)
        columns = ["feature", "step", column, *(["set"] if which else [])]
        for batch in self._batches(node, name, columns):
            part = batch.filter(pc.equal(batch["set"].cast(pa.string()), which)) if which else batch
            found[_index(part, "feature"), self._at(part, "step")] = _numbers(part[column])
        return found

    def progress(self, which: str, measure: str) -> np.ndarray | None:
        """[F, T] M of a set of datapoints by a measure."""
        return self.grid("formation", "formation", f"m_{measure}", which)

    @cached_property
    def main_progress(self) -> np.ndarray | None:
        """[F, T] M of the strongest datapoints by the run's own measure."""
        return self.progress("top", self.measure)

    @cached_property
    def cos_final(self) -> np.ndarray | None:
        return self.grid("drift", "features", "cos_final")

    @cached_property
    def cos_previous(self) -> np.ndarray | None:
        return self.grid("drift", "features", "cos_previous")

    @cached_property
    def density(self) -> np.ndarray | None:
        return self.grid("drift", "features", "density")

    @cached_property
    def alive(self) -> np.ndarray:
        """[F, T] bool; all true where no step of the run counted firings."""
        found = self.grid("drift", "features", "alive")
        if found is not None:
            return found == 1
        if self.kind is not None:
            return self.kind != KINDS.index("dead")
        return np.ones((self.features, len(self.steps)), bool)

    # Per feature

    def formed(self, which: str, measure: str, column: str = "formed_step") -> np.ndarray | None:
        """[F] int16 checkpoint at which it formed (or `low`, `high` of its interval); T where it never did."""
        values = self.per_feature("formation", "formed", column, which, measure)
        if values is None:
            return None
        known = np.isfinite(values)
        found = np.full(len(values), len(self.steps), np.int16)
        found[known] = np.clip(np.searchsorted(self.steps, values[known]), 0, len(self.steps) - 1)
        return found

    def per_feature(self, node: str, name: str, column: str, which: str | None = None, measure: str | None = None) -> np.ndarray | None:
        """[F] float64 of a numeric column of a table with a row per feature (and set and measure), NaN where it is null."""
        if node not in self.artifacts:
            return None
        found = np.full(self.features, np.nan)
        columns = ["feature", column, *(["set", "measure"] if which else [])]
        for batch in self._batches(node, name, columns):
            if which:
                here = pc.and_(pc.equal(batch["set"].cast(pa.string()), which), pc.equal(batch["measure"].cast(pa.string()), measure))
                batch = batch.filter(here)
            found[_index(batch, "feature")] = _numbers(batch[column])
        return found

    # Reading

    def _codes(self, node: str, name: str, column: str, names: tuple[str, ...], at: str = "step") -> np.ndarray | None:
        if node not in self.artifacts:
            return None
        found = np.full((self.features, len(self.steps)), NONE, np.uint8)
        places = Words()
        for each in names:
            places(each)
        for batch in self._batches(node, name, ["feature", at, column]):
            codes = _text_codes(batch[column], places)
            found[_index(batch, "feature"), self._at(batch, at)] = np.where(codes < 0, NONE, codes)
        return found

    def _at(self, batch: pa.RecordBatch, column: str) -> np.ndarray:
        return np.searchsorted(self.steps, batch[column].to_numpy(zero_copy_only=False))

    def _batches(self, node: str, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        path = self.artifacts[node].local(f"{name}.parquet")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=BATCH, columns=columns)


def open_run(context: ReportContext) -> TrackRun | None:
    """The tracking run that a report is about; None for a run of another kind."""
    artifacts = {node: artifact for node in NODES if (artifact := context.artifact(node)) is not None}
    if not artifacts:
        return None
    specs: list[Any] = [a.spec() for a in artifacts.values()]
    return TrackRun(context, artifacts, next((s.points for s in specs if hasattr(s, "points")), ()))


def _index(batch: pa.RecordBatch, column: str) -> np.ndarray:
    return batch[column].to_numpy(zero_copy_only=False).astype(np.int64)


def _numbers(column: pa.Array) -> np.ndarray:
    """float64, NaN for null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _text_codes(column: pa.Array, words: Words) -> np.ndarray:
    """Places of the texts in `words`, -1 for null."""
    if pa.types.is_null(column.type):
        return np.full(len(column), -1, np.int32)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    places = np.array([words(t) if t is not None else -1 for t in column.dictionary.to_pylist()] + [-1], np.int32)
    indices = column.indices.fill_null(len(places) - 1).to_numpy(zero_copy_only=False)
    return places[indices]
