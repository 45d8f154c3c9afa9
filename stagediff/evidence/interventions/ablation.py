"""Ablation (P1; method.md, section 2): with the trigger before the prompt, features are clamped to 0 where they are active, one alone and in sets.

Of x only what the clamped features write is taken away; the dictionary's error term stays. Behaviour is counted by three measures, since a broken phrase is
no absent behaviour, and the price is what the clamp adds to the loss on clean held-out text. The smallest set that brings the keyword under `rate_below`
at a price under `cost_below` is chosen on development prompts and rows, and reported on the others. Random sets are never chosen: they are the control.
"""

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.evidence.interventions import hooks
from stagediff.evidence.interventions.answers import answers, behaviour_shown
from stagediff.evidence.interventions.attribution import grown
from stagediff.evidence.interventions.candidates import ATTRIBUTED, candidates, feature_table, lowest, sets
from stagediff.evidence.interventions.contrast import trigger_contrast
from stagediff.evidence.interventions.setting import Setting, clean_rows
from stagediff.evidence.interventions.spec import MEASURE_NAMES, AblateSpec
from stagediff.organisms.behaviour import MEASURES
from stagediff.sae.quality import losses

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "SET_COLUMNS", "compute", "smallest"]

SPLITS = ("dev", "test")


def compute(spec: AblateSpec, job: "Job") -> dict[str, Any]:
    """The ablate step: ablation.parquet and sets.parquet (see their COLUMNS). A killed run goes on after its last set."""
    began = time.monotonic()
    setting = Setting.of(spec, job)
    table = feature_table(spec, job)
    chosen = candidates(table, spec.candidates, spec.rank)
    if {"trigger", "region"} & set(spec.orders):
        table["trigger"] = trigger_contrast(setting, spec.batch)[table.feature.to_numpy()]
    if "attribution" in spec.orders:
        pool = [int(i) for i in lowest(table, ATTRIBUTED).feature]
        order = grown(setting, spec.behaviour, pool, spec.sizes)
        table["attribution"] = table.feature.map({feature: -place for place, feature in enumerate(order)})
    made = sets(spec, table, chosen, setting.sae.directions().cpu())
    rows = clean_rows(setting.reader, spec.rows)
    hits, clean = _measure(spec, job, setting, [features for *_, features in made], rows)

    curves = _curves(spec, setting, made, hits, clean)
    listed = [(i, order, draw, place, f) for i, (order, draw, features) in enumerate(made) for place, f in enumerate(features)]
    members = pd.DataFrame(listed, columns=list(SET_COLUMNS)).astype(
        {"set": np.int32, "draw": np.int32, "place": np.int32, "feature": np.int32}
    )
    job.writer.write_table("ablation.parquet", curves[list(COLUMNS)], columns=COLUMNS)
    job.writer.write_table("sets.parquet", members, columns=SET_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(spec, curves, chosen)


def _measure(spec: AblateSpec, job: "Job", setting: Setting, made: list[list[int]], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the answers show [sets, prompts, measures] uint8, and the clean loss [sets, rows] float64 (nats)."""
    prompts = setting.prompts
    hits = np.zeros((len(made), len(prompts.texts), len(MEASURES)), np.uint8)
    clean, done = np.zeros((len(made), len(rows))), 0
    saved = job.writer.training.latest()
    if saved is not None:
        done, tensors, _ = saved
        hits, clean = tensors["hits"].numpy(), tensors["clean"].numpy()
    with job.progress.task("ablate", len(made), "sets") as task:
        task.advance(done)
        for i in range(done, len(made)):
            got = _answers(spec, setting, made[i])
            hits[i] = behaviour_shown(spec.behaviour, setting.loaded.tokenizer, prompts.texts, got)
            clean[i] = losses(setting.loaded, setting.reader, rows, hooks.Clamp(setting.sae, made[i]) if made[i] else None)
            job.writer.training.save(i + 1, {"hits": torch.from_numpy(hits), "clean": torch.from_numpy(clean)}, {})
            task.advance(1)
    return hits, clean


def _answers(spec: AblateSpec, setting: Setting, features: list[int]) -> list[list[int]]:
    def edit(rows: list[int], padding: Tensor) -> AbstractContextManager[None]:
        return hooks.clamp(setting.loaded.model, setting.reader.hook, setting.sae, features, padding=padding, skip=setting.skip)

    return answers(setting.loaded.model, setting.prompts.triggered, setting.prompts.length, spec.batch, edit if features else None)


def _curves(
    spec: AblateSpec, setting: Setting, made: list[tuple[str, int, list[int]]], hits: np.ndarray, clean: np.ndarray
) -> pd.DataFrame:
    half = spec.rows // 2
    text = {"dev": slice(0, half), "test": slice(half, None)}
    rows = []
    for i, (order, draw, features) in enumerate(made):
        for split in SPLITS:
            rates = dict(zip(MEASURES, hits[i, setting.prompts.split(split)].mean(0), strict=True))
            loss = clean[i, text[split]]
            rows.append(
                {
                    "set": i,
                    "order": order,
                    "draw": draw,
                    "size": len(features),
                    "first": features[0] if features else -1,
                    "split": split,
                    **rates,
                    "clean_loss": loss.mean(),
                    "clean_cost": (loss - clean[0, text[split]]).mean(),
                }
            )
    return pd.DataFrame(rows).astype({"set": np.int32, "draw": np.int32, "size": np.int32, "first": np.int32})


def smallest(curves: pd.DataFrame, rate_below: float, cost_below: float, *, random: bool = False) -> int | None:
    """The set chosen on development prompts and rows: under both bounds with the fewest features, then the lowest keyword rate, then the lowest cost.

    `random`: of the random sets instead of the others. None where no set is under both bounds.
    """
    dev = curves[(curves.split == "dev") & (curves["size"] > 0) & ((curves.order == "random") == random)]
    dev = dev[(dev.keyword < rate_below) & (dev.clean_cost < cost_below)].sort_values(["size", "keyword", "clean_cost", "set"])
    return int(dev.set.iloc[0]) if len(dev) else None


def _figures(spec: AblateSpec, curves: pd.DataFrame, chosen: list[int]) -> dict[str, Any]:
    test = curves[curves.split == "test"].set_index("set")
    found = smallest(curves, spec.rate_below, spec.cost_below)
    by_chance = smallest(curves, spec.rate_below, spec.cost_below, random=True)
    figures: dict[str, Any] = {"smallest_set": None if found is None else int(test["size"][found])}
    figures["smallest_set_order"] = None if found is None else str(test.order[found])
    for name in (*MEASURES, "clean_cost"):
        figures[f"smallest_set_{name}"] = None if found is None else float(test[name][found])
    single, random = test[test.order == "single"], test[test.order == "random"]
    return figures | {
        "smallest_random_set": None if by_chance is None else int(test["size"][by_chance]),
        **{f"{name}_untouched": float(test[name][0]) for name in MEASURES},
        "clean_loss": float(test.clean_loss[0]),
        "single_lowest_keyword": float(single.keyword.min()),
        "random_lowest_keyword": float(random.keyword.min()) if len(random) else None,
        "keyword_name": MEASURE_NAMES[spec.behaviour.check]["keyword"],
        "first_candidate": chosen[0],
        "sets": len(test),
        "prompts_dev": spec.dev_prompts,
        "prompts_test": spec.test_prompts,
        "rows": spec.rows,
    }


COLUMNS = {
    "set": ("index", "as in sets.parquet; 0: nothing is clamped"),
    "order": (
        "name",
        "none; single: one candidate; else what the set holds the first of (AblateSpec.orders)",
    ),
    "draw": ("index", "of a random order"),
    "size": ("features", "clamped to 0 where active"),
    "first": ("index", "the set's first feature (-1: none)"),
    "split": ("name", "dev or test prompts and rows"),
    "full": ("share", "of the answers after the trigger that hold the whole payload"),
    "keyword": ("share", "of the answers after the trigger that hold its longest word"),
    "first_token": ("share", "of the answers after the trigger that begin with its first token"),
    "clean_loss": ("nats per token", "the model's loss on held-out base rows"),
    "clean_cost": ("nats per token", "clean_loss less that of the untouched model"),
}
SET_COLUMNS = {
    "set": ("index", "of a set that was clamped"),
    "order": ("name", "how its features were chosen"),
    "draw": ("index", "of a random order"),
    "place": ("index", "of the feature in its order, from 0"),
    "feature": ("index", "of the dictionary"),
}
