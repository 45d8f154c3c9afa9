"""Reads activations shard by shard, with the mix's overlay laid over the base rows: what dictionaries train on and are measured on.

The overlay (a `tokens` artifact of step mix) holds no rows, only a table `overlay.parquet` with `row` (a base row that is replaced) and `new_row`
(the new data's row in its place), both ascending. A shard of the mix is the base model's shard with those rows overwritten from the new rows'
activations, of which only the needed ones are read. Memory is bounded by two shards.
"""

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError
from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint, MixSpec, ModelSource, TokensSpec

if TYPE_CHECKING:
    from stagediff.lm.streamed import StreamedArray
    from stagediff.store import Artifact, Store
    from stagediff.store.shards import ArrayReader

__all__ = ["ActivationReader", "kept_positions"]


def kept_positions(context: int, skip: tuple[int, ...]) -> np.ndarray:
    """Positions of a row whose activations are stored: all but the skipped ones, int16, ascending."""
    return np.array([p for p in range(context) if p not in set(skip)], dtype=np.int16)


class ActivationReader:
    """Activations of `data.rows` token rows at one hook point, in shards of whole rows.

    Shard boundaries are the base artifact's. With `only` a shard holds just its new (replaced) or just its base rows, maybe none.
    `read_shard(i)`, `locate(i)` belong together row by row. Where activations are not stored the model makes them, on `device`.
    """

    def __init__(self, store: "Store", data: ActivationData, device: str = "cpu"):
        self.data = data
        self._store, self._device = store, device
        self._base = store.artifact(data.base).require()
        spec = self._base.spec()
        assert isinstance(spec, HarvestSpec)
        self.spec = spec
        if data.rows > spec.rows:
            raise UserError(f"{data.rows:,} rows are asked of {data.base}, which holds {spec.rows:,}. Harvest more rows, or ask for fewer.")
        self._tokens = store.artifact(spec.tokens)
        token_spec = self._tokens.spec()
        assert isinstance(token_spec, TokensSpec)
        self.context = token_spec.context
        self.positions = kept_positions(self.context, spec.skip_positions)
        self.tokens_per_row = len(self.positions)
        self._array = self._array_of(self._base, spec)
        self.d = int(self._array.shape[1])
        self._replaced = np.empty(0, np.int64)
        self._new_rows = np.empty(0, np.int64)
        if data.mix is not None:
            self._lay_over(data)

    @property
    def model(self) -> ModelSource:
        return self.spec.model

    @property
    def hook(self) -> HookPoint:
        return self.spec.hook

    @property
    def n_rows(self) -> int:
        """Token rows that are read: all, or those that `only` leaves."""
        new = len(self._replaced)
        return {"all": self.data.rows, "new": new, "base": self.data.rows - new}[self.data.only]

    @property
    def n_tokens(self) -> int:
        return self.n_rows * self.tokens_per_row

    @property
    def n_shards(self) -> int:
        return -(-self.data.rows // self.spec.shard_rows)

    def is_paired_with(self, other: "ActivationReader") -> bool:
        """Whether the other's shards hold activations of the same token rows and positions as mine, and as wide: row i belongs to row i."""
        mine, its = (
            (r.spec.tokens, r.data.rows, r.data.mix, r.data.only, r.spec.shard_rows, r.d, r.positions.tolist()) for r in (self, other)
        )
        return mine == its

    def shard_tokens(self, i: int) -> int:
        """How many activations shard i holds, without reading it."""
        return len(self._rows(i)) * self.tokens_per_row

    def read_shard(self, i: int) -> Tensor:
        """Activations [n_i, d] of shard i, bfloat16, on the CPU; memory of its own that the caller may change."""
        start, stop = self._range(i)
        first, last = np.searchsorted(self._replaced, [start, stop])
        wanted = self.data.only
        t = self.tokens_per_row
        new = self._read_new(first, last) if last > first and wanted != "base" else None
        if wanted == "new":
            block = new if new is not None else np.empty((0, self.d), np.uint16)
            return torch.from_numpy(np.require(block, requirements=["C", "W"])).view(torch.bfloat16)
        block = self._array.read_shard(i) if stop - start == self._stored_rows(i) else self._array.read_rows(start * t, stop * t)
        block = np.require(block, requirements=["C", "W"])
        by_row = block.reshape(stop - start, t, self.d)
        replaced = self._replaced[first:last] - start
        if wanted == "base":
            by_row = np.delete(by_row, replaced, axis=0) if len(replaced) else by_row
        elif new is not None:
            by_row[replaced] = new.reshape(-1, t, self.d)
        return torch.from_numpy(by_row.reshape(-1, self.d)).view(torch.bfloat16)

    def locate(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where shard i's activations come from: (row int64 [n_i], position in the row int16 [n_i], is_new bool [n_i])."""
        rows = self._rows(i)
        new = np.isin(rows, self._replaced)
        t = self.tokens_per_row
        return np.repeat(rows, t), np.tile(self.positions, len(rows)), np.repeat(new, t)

    def is_new(self, rows: np.ndarray) -> np.ndarray:
        """For each row whether the overlay put a new row there, bool [len(rows)]."""
        return np.isin(rows, self._replaced)

    def token_ids(self, rows: np.ndarray) -> np.ndarray:
        """Token ids [len(rows), context], int32, of the given rows (any order, repeats allowed), the overlay applied."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.data.rows):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked of 0..{self.data.rows - 1}")
        out = np.empty((len(rows), self.context), np.int32)
        new = self.is_new(rows)
        out[~new] = _gather(self._tokens.array("rows"), rows[~new])
        if new.any():
            at = self._new_rows[np.searchsorted(self._replaced, rows[new])]
            out[new] = _gather(self._new_tokens.array("rows"), at)
        return out

    def _lay_over(self, data: ActivationData) -> None:
        assert data.mix is not None
        mix = self._store.artifact(data.mix).require()
        mix_spec = mix.spec()
        if not isinstance(mix_spec, MixSpec):
            raise UserError(
                f"{data.mix} is no mix but an artifact of step {mix_spec.step!r}. Plain token rows need no overlay: leave `mix` out."
            )
        if data.new is None:
            raise UserError(
                f"The mix {data.mix} replaces rows by new ones, but no activations of the new rows were named. Harvest {mix_spec.new} and "
                "give it as `new`."
            )
        new = self._store.artifact(data.new).require()
        new_spec = new.spec()
        assert isinstance(new_spec, HarvestSpec)
        self._check_together(data, mix_spec, new_spec)
        self._new_tokens = self._store.artifact(new_spec.tokens)
        overlay = mix.read_table("overlay.parquet", columns=["row", "new_row"])
        row, new_row = overlay["row"].to_numpy(np.int64), overlay["new_row"].to_numpy(np.int64)
        n = int(np.searchsorted(row, data.rows))
        self._replaced, self._new_rows = row[:n], new_row[:n]
        if n and int(self._new_rows.max()) >= new_spec.rows:
            raise UserError(
                f"The mix {data.mix} needs {int(self._new_rows.max()) + 1:,} new rows for its first {data.rows:,} rows, but {data.new} "
                f"holds activations of {new_spec.rows:,}. Harvest more new rows."
            )
        self._new_array = self._array_of(new, new_spec)

    def _array_of(self, artifact: "Artifact", spec: HarvestSpec) -> "ArrayReader | StreamedArray":
        if type(spec) is HarvestSpec and artifact.manifest.evicted:
            from stagediff.lm.streamed import StreamedArray

            return StreamedArray(self._store, spec, self.positions, self._device)
        return artifact.array("data")

    def _check_together(self, data: ActivationData, mix: MixSpec, new: HarvestSpec) -> None:
        """Base, new and mix must speak of the same rows, model and hook point."""
        base = self.spec
        wrong = []
        if mix.base != base.tokens:
            wrong.append(f"the mix replaces rows of {mix.base}, the base activations are of {base.tokens}")
        if mix.new != new.tokens:
            wrong.append(f"the mix takes rows of {mix.new}, the new activations are of {new.tokens}")
        if mix.rows < data.rows:
            wrong.append(f"the mix covers {mix.rows:,} rows, {data.rows:,} are asked for")
        if base.model.identity() != new.model.identity():
            wrong.append("base and new activations come from different models")
        if base.hook != new.hook:
            wrong.append(f"base was read at {base.hook.site} of layer {base.hook.layer}, new at {new.hook.site} of layer {new.hook.layer}")
        if base.skip_positions != new.skip_positions:
            wrong.append(f"base leaves out positions {base.skip_positions}, new {new.skip_positions}")
        if base.precision != new.precision:
            wrong.append(f"base was computed in {base.precision}, new in {new.precision}")
        contexts = [getattr(self._store.artifact(ref).spec(), "context", None) for ref in (base.tokens, new.tokens)]
        if contexts[0] != contexts[1]:
            wrong.append(f"base rows have {contexts[0]} tokens, new rows {contexts[1]}")
        if wrong:
            raise UserError(
                f"The activations {data.base} (base) and {data.new} (new) and the mix {data.mix} do not belong together: "
                f"{'; '.join(wrong)}. Plan the run again so that all three come from one config."
            )

    def _range(self, i: int) -> tuple[int, int]:
        """Token rows of shard i before `only`: start, stop."""
        if not 0 <= i < self.n_shards:
            raise IndexError(f"shard {i} of {self.n_shards}")
        start = i * self.spec.shard_rows
        return start, min(start + self.spec.shard_rows, self.data.rows)

    def _stored_rows(self, i: int) -> int:
        return min((i + 1) * self.spec.shard_rows, self.spec.rows) - i * self.spec.shard_rows

    def _rows(self, i: int) -> np.ndarray:
        rows = np.arange(*self._range(i), dtype=np.int64)
        if self.data.only == "all":
            return rows
        return rows[self.is_new(rows) == (self.data.only == "new")]

    def _read_new(self, first: int, last: int) -> np.ndarray:
        """New activations [rows * tokens_per_row, d] for the overlay's entries first..last; one run of rows when they are consecutive."""
        rows, t = self._new_rows[first:last], self.tokens_per_row
        out = np.empty((len(rows), t, self.d), np.uint16)
        for start, stop in _runs(rows):
            block = self._new_array.read_rows(int(rows[start]) * t, (int(rows[stop - 1]) + 1) * t)
            out[start:stop] = block.reshape(-1, t, self.d)
        return out.reshape(-1, self.d)


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Index ranges (start, stop) over which `rows` rises by one."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    bounds = [0, *ends.tolist(), len(rows)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _gather(array: "ArrayReader", rows: np.ndarray) -> np.ndarray:
    """Rows of a stored array in any order: each run of neighbours is read once."""
    unique, back = np.unique(rows, return_inverse=True)
    if not len(unique):
        return np.empty((0, array.shape[1]), np.int32)
    out = np.empty((len(unique), array.shape[1]), np.int32)
    # a gap shorter than a chunk costs nothing: the chunk is read anyway
    starts = [0, *(np.flatnonzero(np.diff(unique) > 64) + 1).tolist(), len(unique)]
    for a, b in itertools.pairwise(starts):
        low = int(unique[a])
        out[a:b] = array.read_rows(low, int(unique[b - 1]) + 1)[unique[a:b] - low]
    return out[back]
