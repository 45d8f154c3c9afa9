"""Statistics of a dictionary over held-out rows, in one streaming pass: how often and how strongly every feature fires, on base and on new rows,
its strongest examples, and how well the dictionary reconstructs the stage's own rows.

Memory is bounded by the features and a fixed block of activations, whatever the number of tokens: a block of whole token rows (or, where one row
times all features is too much, of a row's pieces) is encoded, only what fired is kept of it, and that is added to the accumulators. A killed pass
continues after the last saved shard, with the same bytes.

Tables of the artifact: `features.parquet`, `histogram.parquet` (long form, only what is not zero; edges in `histogram.json`), `examples.parquet`.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from stagediff.errors import UserError
from stagediff.sae.accumulate import FeatureCounts, Reconstruction, TopExamples, histogram_edges
from stagediff.sae.examples import feature_examples
from stagediff.sae.spec import StatisticsSpec

if TYPE_CHECKING:
    from stagediff.sae.dictionary import SAE
    from stagediff.steps import Job

__all__ = ["Pass", "compute", "feature_examples"]

BLOCK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Activations (tokens x features) encoded at once: 128 MiB in fp32 on a CPU, 1 GiB on a GPU."""
FIRINGS_AT_ONCE = 1 << 22
SPARSE_BELOW = 1 / 32
"""Share of active features up to which decoding only these is faster than the full product."""
SAVE_SECONDS = 60.0


def compute(spec: StatisticsSpec, job: "Job") -> dict[str, Any]:
    """The statistics step. Raises UserError where the dictionary's width is not the activations', or where these are not finite."""
    from stagediff.lm.activations import ActivationReader
    from stagediff.sae.dictionary import SAE

    sae = SAE.load(job.artifact(spec.dictionary)).to(job.device)
    reader = ActivationReader(job.store, spec.data, job.device)
    if sae.d != reader.d:
        raise UserError(
            f"The dictionary {spec.dictionary} reads {sae.d} numbers per token, but the activations {spec.data.base} have {reader.d}: "
            "it belongs to another model or hook point."
        )
    run = Pass(sae, reader.d, reader.tokens_per_row, spec, job.device)
    start = 0
    if latest := job.writer.training.latest():
        start, tensors, _ = latest
        run.load_state(tensors)
    saved, began = time.monotonic(), time.monotonic()
    read = sum(reader.shard_tokens(i) for i in range(start))
    with torch.no_grad(), job.progress.task("statistics", reader.n_tokens, "tokens", done=read) as task:
        for i in range(start, reader.n_shards):
            x = reader.read_shard(i)
            run.add(x, *reader.locate(i))
            task.advance(len(x))
            if time.monotonic() - saved > SAVE_SECONDS:
                job.writer.training.save(i + 1, run.state(), {})
                saved = time.monotonic()
    job.notes["tokens_per_second"] = round(task.rate)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    _write(run, sae, spec, job)
    return run.figures()


class Pass:
    """The streaming pass itself, apart from where activations come from and where tables go."""

    def __init__(
        self, sae: "SAE", d: int, tokens_per_row: int, spec: StatisticsSpec, device: str = "cpu", block_elements: int | None = None
    ):
        self.sae, self.spec, self.device = sae, spec, device
        self.tokens_per_row, self.features = tokens_per_row, sae.features
        block_elements = block_elements or BLOCK_ELEMENTS[torch.device(device).type]
        tokens = max(1, min(spec.batch, block_elements // self.features))
        self.rows_at_once = max(1, tokens // tokens_per_row)
        self.piece = min(tokens, tokens_per_row)
        """Positions of a row encoded at once: all of them, unless a single row is too much."""
        self.edges = histogram_edges(spec.bins)
        self.counts = FeatureCounts(self.features, self.edges)
        self.examples = TopExamples(self.features, spec.top)
        self.quality = Reconstruction(d)
        self.tokens = np.zeros(2, np.int64)
        """Base and new tokens seen."""
        self.rows = 0

    def add(self, x: Tensor, row: np.ndarray, position: np.ndarray, is_new: np.ndarray) -> None:
        """One shard: `x` [n, d] raw activations of whole token rows, and where each token stands (arrays [n])."""
        row, position, is_new = np.asarray(row), np.asarray(position), np.asarray(is_new, bool)
        width = self.tokens_per_row
        for begin in range(0, len(x), self.rows_at_once * width):
            end = min(begin + self.rows_at_once * width, len(x))
            block = x[begin:end].to(self.device).float()
            if not torch.isfinite(block).all():
                raise UserError(
                    f"The activations of token rows {row[begin]} to {row[end - 1]} in {self.spec.data.base} hold NaN or infinity. "
                    "Harvest them in fp32, or look for the layer of the model that overflows."
                )
            self._add_rows(block, row[begin:end], position[begin:end], is_new[begin:end])

    def _add_rows(self, x: Tensor, row: np.ndarray, position: np.ndarray, is_new: np.ndarray) -> None:
        width, n_rows = self.tokens_per_row, len(x) // self.tokens_per_row
        best = _RowMaxima(n_rows, self.features)
        for piece in range(0, width, self.piece) if n_rows == 1 else (0,):
            part = slice(piece, piece + self.piece) if n_rows == 1 else slice(None)
            self._add_tokens(x[part], np.arange(len(x))[part], is_new, best)
        feature, value, token = best.found()
        self.examples.add(feature, value, row[token], position[token], is_new[token])
        new_rows = int(is_new[::width].sum())
        self.tokens += np.array([n_rows - new_rows, new_rows]) * width
        self.rows += n_rows

    def _add_tokens(self, x: Tensor, token: np.ndarray, is_new: np.ndarray, best: "_RowMaxima") -> None:
        """Tokens `token` [n] of the block, whose activations are `x` [n, d]."""
        for begin, end, x_hat, local, feature, value in _fired(self.sae, self.sae.encode(x).float()):
            where = token[begin:end]
            new = is_new[where]
            self.counts.add(feature, value, new[local])
            best.add(where[local] // self.tokens_per_row, feature, value, where[local])
            inputs, firings = x[begin:end], len(feature)
            if self.spec.base_rows_only:
                own = torch.from_numpy(~new).to(self.device)
                inputs, x_hat, firings = inputs[own], x_hat[own], int((~new[local]).sum())
            self.quality.add(inputs, x_hat, firings)

    def state(self) -> dict[str, Tensor]:
        seen = torch.tensor([*self.tokens, self.rows], dtype=torch.int64)
        return {**self.counts.state(), **self.examples.state(), **self.quality.state(), "seen": seen}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for part in (self.counts, self.examples, self.quality):
            part.load_state(state)
        *tokens, self.rows = state["seen"].tolist()
        self.tokens = np.array(tokens, np.int64)

    def figures(self) -> dict[str, Any]:
        """Quality over the stage's own rows."""
        own = self._own(self.counts.firings)
        return {
            "explained_variance": self.quality.explained_variance,
            "l0": self.quality.l0,
            "dead_share": float((own == 0).mean()),
            "tokens": int(self._own(self.tokens)),
            "tokens_base": int(self.tokens[0]),
            "tokens_new": int(self.tokens[1]),
            "rows": self.rows,
            "features": self.features,
        }

    def table(self, decoder_norm: np.ndarray) -> pd.DataFrame:
        """One row per feature; FEATURE_COLUMNS says what the columns are."""
        firings, mass, largest, tokens = self.counts.firings, self.counts.mass, self.counts.largest, self.tokens
        own, own_mass = self._own(firings), self._own(mass)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = {
                "feature": np.arange(self.features, dtype=np.int32),
                "firings": own,
                "density": own / self._own(tokens),
                "mean": np.where(own > 0, own_mass / own, 0.0),
                "max": largest[0] if self.spec.base_rows_only else largest.max(0),
            }
            for i, name in enumerate(("base", "new")):
                columns |= {f"mass_{name}": mass[i], f"firings_{name}": firings[i]}
                columns |= {f"density_{name}": firings[i] / tokens[i], f"max_{name}": largest[i]}
        return pd.DataFrame({**columns, "decoder_norm": decoder_norm})

    def histogram(self) -> pd.DataFrame:
        """Columns feature, bin, base, new: firings in each bin, only where there are some."""
        feature, bin_ = np.nonzero(self.counts.histogram.any(0))
        base, new = self.counts.histogram[:, feature, bin_]
        return pd.DataFrame({"feature": feature.astype(np.int32), "bin": bin_.astype(np.int16), "base": base, "new": new})

    def _own(self, both: np.ndarray) -> np.ndarray:
        """What belongs to the stage's own rows, of an array [2, ...] for base and new."""
        return both[0] if self.spec.base_rows_only else both.sum(0)


class _RowMaxima:
    """The largest activation of each feature in each row of a block, and the first token that has it."""

    def __init__(self, rows: int, features: int):
        self.features = features
        self.value = np.zeros(rows * features, np.float32)
        self.token = np.zeros(rows * features, np.int32)

    def add(self, row: np.ndarray, feature: np.ndarray, value: np.ndarray, token: np.ndarray) -> None:
        """Firings in the order of their tokens; a later call brings later tokens."""
        cell = row * np.int64(self.features) + feature
        before = self.value[cell]
        np.maximum.at(self.value, cell, value)
        won = (value > before) & (value == self.value[cell])
        # Written from the last to the first, so that of equal maxima the first token stays.
        self.token[cell[won][::-1]] = token[won][::-1]

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Feature, activation and token in the block, for every (row, feature) that fired."""
        cell = np.flatnonzero(self.value)
        return cell % self.features, self.value[cell], self.token[cell]


def _fired(sae: "SAE", f: Tensor) -> Iterator[tuple[int, int, Tensor, np.ndarray, np.ndarray, np.ndarray]]:
    """Activations `f` [n, F] as what fired, a bounded number of firings at a time, in token order.

    Yields (first token, end, reconstruction [tokens, d] in raw units, and per firing: token counted from the first one, feature, activation).
    """
    features = f.shape[1]
    fired = int(torch.count_nonzero(f))
    is_sparse = fired < f.numel() * SPARSE_BELOW
    tokens = max(1, len(f) * FIRINGS_AT_ONCE // max(fired, FIRINGS_AT_ONCE))
    for begin in range(0, len(f), tokens):
        part = f[begin : begin + tokens]
        flat = part.reshape(-1)
        at = flat.nonzero().squeeze(1)
        token, feature, value = at // features, at % features, flat[at]
        x_hat = _decode_fired(sae, len(part), token, feature, value) if is_sparse else sae.decode(part)
        yield begin, begin + len(part), x_hat, token.cpu().numpy(), feature.cpu().numpy(), value.cpu().numpy()


def _decode_fired(sae: "SAE", n: int, token: Tensor, feature: Tensor, value: Tensor) -> Tensor:
    """What `sae.decode` gives, from the features that fired alone: n x L0 x d products instead of n x F x d."""
    starts = torch.searchsorted(token, torch.arange(n, device=token.device))
    weighted = functional.embedding_bag(feature, sae.W_dec, starts, mode="sum", per_sample_weights=value)
    return (weighted + sae.b_dec) / sae.input_scale


FEATURE_COLUMNS = {
    "feature": ("index", "feature of the dictionary"),
    "firings": ("tokens", "tokens of the stage's own rows on which it is active"),
    "density": ("share", "firings per token of the stage's own rows"),
    "mean": ("activation", "mean activation where active, own rows (0: never active)"),
    "max": ("activation", "largest activation, own rows"),
    "mass_base": ("activation", "sum of activations over base rows"),
    "firings_base": ("tokens", "tokens of base rows on which it is active"),
    "density_base": ("share", "firings per token of base rows"),
    "max_base": ("activation", "largest activation on base rows"),
    "mass_new": ("activation", "sum of activations over new rows"),
    "firings_new": ("tokens", "tokens of new rows on which it is active"),
    "density_new": ("share", "firings per token of new rows (empty: there are none)"),
    "max_new": ("activation", "largest activation on new rows"),
    "decoder_norm": ("norm", "Euclidean norm of the decoder row"),
}
HISTOGRAM_COLUMNS = {
    "feature": ("index", "feature of the dictionary"),
    "bin": ("index", "bin of histogram.json's edges; first and last bin are open"),
    "base": ("tokens", "base tokens whose activation lies in the bin"),
    "new": ("tokens", "new tokens whose activation lies in the bin"),
}
EXAMPLE_COLUMNS = {
    "feature": ("index", "feature of the dictionary"),
    "rank": ("index", "0 is the strongest; at most one example per row"),
    "activation": ("activation", "the row's largest"),
    "row": ("index", "token row of the mix"),
    "position": ("index", "token position in the row"),
    "is_new": ("flag", "whether it is a row of new data"),
}


def _write(run: Pass, sae: "SAE", spec: StatisticsSpec, job: "Job") -> None:
    norms = torch.cat([rows.double().norm(dim=1) for rows in sae.W_dec.split(1 << 14)]).cpu().numpy()
    job.writer.write_table("features.parquet", run.table(norms), columns=FEATURE_COLUMNS)
    job.writer.write_table("histogram.parquet", run.histogram(), columns=HISTOGRAM_COLUMNS)
    job.writer.write_json("histogram.json", {"edges": run.edges.tolist(), "unit": "activation"})
    job.writer.write_table("examples.parquet", pd.DataFrame(run.examples.table()), columns=EXAMPLE_COLUMNS)
