"""A chain of which only decoders and firings exist: what drift, phases and efficiency read, and artifacts with given tables or figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from stagediff.lm.spec import ActivationData, HarvestSpec, HookPoint, ModelSource, TokenizerSource
from stagediff.sae.layout import WEIGHTS
from stagediff.sae.spec import Budget, DictionaryConfig, StatisticsSpec, TrainSpec
from stagediff.spec import Ref, Spec
from stagediff.store import Store
from stagediff.track.spec import DriftSpec, FormationSpec, KindsSpec, Point

__all__ = ["commit", "dictionary", "drift_table", "formed", "kinds_table", "point"]

ROWS = 10
DATA = ActivationData(base=Ref("activations/" + "1" * 20), rows=ROWS)


def commit(store: Store, spec: Spec, tables: dict[str, pd.DataFrame] | None = None, figures: dict[str, Any] | None = None) -> Ref:
    """An artifact of these tables and key figures, as it is found when it exists."""
    if not store.artifact(spec.ref).is_complete:
        with store.write(spec) as w:
            for name, table in (tables or {}).items():
                w.write_table(name, table)
            w.commit(figures=figures or {}, numerics={})
    return spec.ref


def dictionary(store: Store, decoder: np.ndarray, seed: int) -> Ref:
    """`decoder` [F, d], kept in fp32."""
    spec = TrainSpec(data=DATA, budget=Budget(tokens=1), dictionary=DictionaryConfig(features=len(decoder)), seed=seed)
    with store.write(spec) as w:
        w.write_bytes(WEIGHTS, save({"W_dec": torch.from_numpy(np.ascontiguousarray(decoder)).float()}))
        w.commit(figures={}, numerics={})
    return spec.ref


def point(store: Store, step: int, decoder: np.ndarray, firings: np.ndarray) -> Point:
    """Statistics say `firings` [F] of 1,000 tokens, and the decoder's norms."""
    harvest = HarvestSpec(
        model=ModelSource(digest=f"step{step}"),
        tokens=Ref("tokens/" + "1" * 20),
        rows=ROWS,
        hook=HookPoint(layer=1),
        shard_rows=ROWS,
        batch_rows=1,
    )
    made = dictionary(store, decoder, step)
    norms = np.linalg.norm(decoder.astype(np.float32).astype(float), axis=1)
    table = pd.DataFrame({"firings": firings, "density": firings / 1000, "decoder_norm": norms})
    statistics = commit(store, StatisticsSpec(dictionary=made, data=DATA), {"features.parquet": table})
    return Point(step=step, dictionary=made, statistics=statistics, probe=commit(store, harvest))


def formed(store: Store, points: Sequence[Point], steps: np.ndarray, measure: str = "activation_cosine") -> Ref:
    """A formation artifact with these formation steps [F] (NaN: never) for the measure on the top set, and others elsewhere."""
    rows = [(i, "top", measure, s) for i, s in enumerate(steps)]
    rows += [(i, *where, points[0].step) for i in range(len(steps)) for where in (("levels", measure), ("top", "feature_jaccard"))]
    table = pd.DataFrame(rows, columns=["feature", "set", "measure", "formed_step"])
    return commit(store, FormationSpec(points=tuple(points)), {"formed.parquet": table})


def kinds_table(store: Store, points: Sequence[Point], kinds: np.ndarray, seed: int = 0) -> Ref:
    """A kinds artifact of kinds [F, T] (strings, None for none); another one for another seed."""
    F, T = kinds.shape
    table = pd.DataFrame({"feature": np.repeat(np.arange(F), T), "step": np.tile([p.step for p in points], F), "kind": kinds.ravel()})
    spec = KindsSpec(points=tuple(points), tokenizer=TokenizerSource(digest="t"), reference=points[-1].probe, seed=seed)
    return commit(store, spec, {"kinds.parquet": table})


def drift_table(store: Store, points: Sequence[Point], cos_previous: np.ndarray, alive: np.ndarray, seed: int = 0) -> Ref:
    """A drift artifact of these [F, T]; another one for another seed."""
    F, T = alive.shape
    columns = {"feature": np.repeat(np.arange(F), T), "step": np.tile([p.step for p in points], F)}
    table = pd.DataFrame({**columns, "cos_previous": cos_previous.ravel(), "alive": alive.ravel()})
    return commit(store, DriftSpec(points=tuple(points), seed=seed), {"features.parquet": table})
