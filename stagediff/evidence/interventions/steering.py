"""Steering (P1; method.md, section 2): decoder directions of the candidates are added at the hook point, and of random features like them.

Every feature is added at every strength (a share of the mean residual norm times its unit decoder direction), with the trigger before the prompt and
without, all prompts batched. Its strength is the one with the highest rate without the trigger on development prompts (of equal ones the smallest);
what is reported is its rate on test prompts at that strength. The random features are treated alike in all of this, choice of strength included.
The effect is the rate less the random features' mean, with an interval (`intervals`); the same for each random feature against the others tells
how often that interval lies above 0 where there is nothing to find.

Fluency is the base model's loss on the answer, in nats per token: text that broke is unlikely to it, and so is the behaviour itself. It is measured
without the trigger: with it the finetuned model's answer is the behaviour anyway.
"""

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.evidence.interventions import hooks
from stagediff.evidence.interventions.answers import answers, behaviour_shown, continuation_losses
from stagediff.evidence.interventions.candidates import candidates, feature_table, matched
from stagediff.evidence.interventions.intervals import effects, effects_of_random
from stagediff.evidence.interventions.setting import Setting, clean_rows, residual_norm
from stagediff.evidence.interventions.spec import MEASURE_NAMES, SteerSpec
from stagediff.lm.models import load_model
from stagediff.organisms.behaviour import MEASURES

if TYPE_CHECKING:
    from stagediff.lm.models import LoadedModel
    from stagediff.steps import Job

__all__ = ["COLUMNS", "FEATURE_COLUMNS", "TRANSCRIPT_COLUMNS", "compute"]

TRIGGERS = (False, True)
SPLITS = ("dev", "test")


def compute(spec: SteerSpec, job: "Job") -> dict[str, Any]:
    """The steer step: steering.parquet, features.parquet, transcripts.parquet (see their COLUMNS). A killed run goes on after its last feature."""
    began = time.monotonic()
    setting = Setting.of(spec, job)
    base = load_model(spec.base, job.store, precision=spec.precision, device=job.device)
    table = feature_table(spec, job)
    chosen = candidates(table, spec.candidates, spec.rank)
    control = matched(table, chosen, spec.random, spec.seed)
    norm = residual_norm(setting.loaded, setting.reader, clean_rows(setting.reader, spec.norm_rows))
    features = [*chosen, *(int(i) for i in control.feature)]
    steerer = _Steerer(spec, setting, base, norm)
    hits, fluency, none_hits, none_fluency = _measure(spec, job, steerer, features)

    best = _best_strengths(hits, spec, setting)
    described = _describe(spec, table, chosen, control, best)
    _add_effects(described, hits, best, spec, setting)
    told = _transcripts(spec, setting, steerer, described)
    rates = _rates(spec, setting, described, hits, fluency, none_hits, none_fluency)
    job.writer.write_table("steering.parquet", rates[list(COLUMNS)], columns=COLUMNS)
    job.writer.write_table("features.parquet", described[list(FEATURE_COLUMNS)], columns=FEATURE_COLUMNS)
    job.writer.write_table("transcripts.parquet", told[list(TRANSCRIPT_COLUMNS)], columns=TRANSCRIPT_COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    return _figures(described, rates, norm, spec)


class _Steerer:
    """Answers with directions added, row by row of a batch."""

    def __init__(self, spec: SteerSpec, setting: Setting, base: "LoadedModel", norm: float):
        self.spec, self.setting, self.base, self.norm = spec, setting, base, norm
        self.directions = setting.sae.directions()

    def answers(self, prompts: list[list[int]], features: list[int], strengths: list[float], tokens: int) -> list[list[int]]:
        """One answer per prompt, each with its own feature at its own strength (0: as it is)."""
        vectors = self.directions[torch.tensor(features)] * (self.norm * torch.tensor(strengths, device=self.directions.device))[:, None]

        def edit(rows: list[int], padding: Tensor) -> AbstractContextManager[None]:
            return hooks.add(
                self.setting.loaded.model, self.setting.reader.hook, vectors[torch.tensor(rows)], padding=padding, skip=self.setting.skip
            )

        return answers(self.setting.loaded.model, prompts, tokens, self.spec.batch, edit if any(strengths) else None)

    def measure(self, feature: int, strengths: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        """What the answers show [strengths, triggers, prompts, measures] uint8; base loss without the trigger [strengths, prompts] float32."""
        prompts = self.setting.prompts
        asked = [*prompts.without, *prompts.triggered] * len(strengths)
        each = [s for s in strengths for _ in range(len(asked) // len(strengths))]
        got = self.answers(asked, [feature] * len(asked), each, prompts.length)
        shape = (len(strengths), len(TRIGGERS), len(prompts.texts))
        texts = prompts.texts * (len(TRIGGERS) * len(strengths))
        found = behaviour_shown(self.spec.behaviour, self.setting.loaded.tokenizer, texts, got)
        plain = np.arange(len(asked)).reshape(shape)[:, 0].ravel()
        losses = continuation_losses(self.base.model, [asked[i] for i in plain], [got[i] for i in plain], self.spec.batch)
        return found.reshape(*shape, len(MEASURES)), losses.astype(np.float32).reshape(len(strengths), -1)


def _measure(spec: SteerSpec, job: "Job", steerer: _Steerer, features: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """hits [features, strengths, triggers, prompts, measures], fluency [features, strengths, prompts], and both without intervention (no first two axes)."""
    shape = (1 + len(features), len(spec.strengths), len(TRIGGERS), spec.dev_prompts + spec.test_prompts)
    hits, fluency, done = np.zeros((*shape, len(MEASURES)), np.uint8), np.zeros((*shape[:2], shape[3]), np.float32), 0
    saved = job.writer.training.latest()
    if saved is not None:
        done, tensors, _ = saved
        hits, fluency = tensors["hits"].numpy(), tensors["fluency"].numpy()
    with job.progress.task("steer", 1 + len(features), "features") as task:
        task.advance(done)
        for i in range(done, 1 + len(features)):  # the first is no feature at all
            if i == 0:
                hits[0, :1], fluency[0, :1] = steerer.measure(0, (0.0,))
            else:
                hits[i], fluency[i] = steerer.measure(features[i - 1], spec.strengths)
            job.writer.training.save(i + 1, {"hits": torch.from_numpy(hits), "fluency": torch.from_numpy(fluency)}, {})
            task.advance(1)
    return hits[1:], fluency[1:], hits[0, 0], fluency[0, 0]


def _best_strengths(hits: np.ndarray, spec: SteerSpec, setting: Setting) -> np.ndarray:
    """[features] index of the strength with the highest rate without the trigger on development prompts; the smallest of equal ones."""
    dev = hits[:, :, 0, setting.prompts.split("dev"), MEASURES.index(spec.measure)].mean(-1)
    return dev.argmax(1)


def _describe(spec: SteerSpec, table: pd.DataFrame, chosen: list[int], control: pd.DataFrame, best: np.ndarray) -> pd.DataFrame:
    """A row per steered feature."""
    about = table.set_index("feature")
    features = [*chosen, *(int(i) for i in control.feature)]
    return pd.DataFrame(
        {
            "feature": np.array(features, np.int32),
            "group": ["candidate"] * len(chosen) + ["random"] * len(control),
            "matched_to": np.array([-1] * len(chosen) + [int(i) for i in control.matched_to], np.int32),
            "selected": about.selected.loc[features].to_numpy(bool),
            "rank_by": about[spec.rank].loc[features].to_numpy(float),
            "density": about.density.loc[features].to_numpy(float),
            "norm": about.norm.loc[features].to_numpy(float),
            "strength": np.array(spec.strengths)[best],
        }
    )


def _add_effects(described: pd.DataFrame, hits: np.ndarray, best: np.ndarray, spec: SteerSpec, setting: Setting) -> None:
    """Rates on test prompts without the trigger at each feature's strength, effects and intervals."""
    is_random = described.group.to_numpy() == "random"
    shown = hits[np.arange(len(best)), best, 0][:, setting.prompts.split("test")]  # [features, prompts, measures]
    for m, name in enumerate(MEASURES):
        own, control = shown[..., m], shown[is_random][..., m]
        found = np.empty((3, len(own)))
        found[:, ~is_random] = effects(own[~is_random], control, spec.bootstrap, spec.seed)
        found[:, is_random] = effects_of_random(control, spec.bootstrap, spec.seed)
        described[f"rate_{name}"] = own.mean(1)
        described[f"effect_{name}"], described[f"low_{name}"], described[f"high_{name}"] = found
        described[f"random_as_high_{name}"] = [int((control.mean(1) >= rate).sum()) for rate in own.mean(1)]
    for column in ("effect", "low", "high"):
        described[f"steer_{column}"] = described[f"{column}_{spec.measure}"]


def _rates(
    spec: SteerSpec,
    setting: Setting,
    described: pd.DataFrame,
    hits: np.ndarray,
    fluency: np.ndarray,
    none_hits: np.ndarray,
    none_fluency: np.ndarray,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []

    def add(about: dict[str, Any], shown: np.ndarray, losses: np.ndarray) -> None:
        for t, trigger in enumerate(TRIGGERS):
            for split in SPLITS:
                part = setting.prompts.split(split)
                rates = dict(zip(MEASURES, shown[t, part].mean(0), strict=True))
                rows.append(
                    {
                        **about,
                        "split": split,
                        "trigger": trigger,
                        **rates,
                        "fluency": float("nan") if trigger else float(losses[part].astype(float).mean()),
                    }
                )

    add({"feature": -1, "group": "none", "strength": 0.0, "chosen": False}, none_hits, none_fluency)
    for i, feature in enumerate(described.itertuples(index=False)):
        for s, strength in enumerate(spec.strengths):
            about = {"feature": feature.feature, "group": feature.group, "strength": strength, "chosen": strength == feature.strength}
            add(about, hits[i, s], fluency[i, s])
    return pd.DataFrame(rows).astype({"feature": np.int32})


def _transcripts(spec: SteerSpec, setting: Setting, steerer: _Steerer, described: pd.DataFrame) -> pd.DataFrame:
    """Longer answers to the first test prompts: as they are, with a candidate, and with the random feature matched to it, each at its strength."""
    prompts, decode = setting.prompts, setting.loaded.tokenizer.batch_decode
    first = range(prompts.dev, min(prompts.dev + spec.transcript_prompts, len(prompts.texts)))
    room = setting.reader.context - spec.transcript_tokens
    who: list[tuple[int, str, float, bool]] = [(-1, "none", 0.0, False), (-1, "none", 0.0, True)]
    random = described[described.group == "random"]
    for candidate in described[described.group == "candidate"].head(spec.transcripts).itertuples(index=False):
        pair = [candidate, *random[random.matched_to == candidate.feature].head(1).itertuples(index=False)]
        who += [(int(f.feature), f.group, float(f.strength), False) for f in pair]
    rows = [(feature, group, strength, trigger, p) for p in first for feature, group, strength, trigger in who]
    kept = [(prompts.triggered if trigger else prompts.without)[p] for *_, trigger, p in rows]
    fits = [len(ids) <= room for ids in kept]
    rows, kept = [r for r, fit in zip(rows, fits, strict=True) if fit], [k for k, fit in zip(kept, fits, strict=True) if fit]
    got = steerer.answers(kept, [max(r[0], 0) for r in rows], [r[2] for r in rows], spec.transcript_tokens) if rows else []
    about = [(*r[:4], prompts.texts[r[4]], text) for r, text in zip(rows, decode(got), strict=True)]
    return pd.DataFrame(about, columns=list(TRANSCRIPT_COLUMNS)).astype({"feature": np.int32, "strength": float, "trigger": bool})


def _figures(described: pd.DataFrame, rates: pd.DataFrame, norm: float, spec: SteerSpec) -> dict[str, Any]:
    found, control = described[described.group == "candidate"], described[described.group == "random"]
    plain = rates[(rates.group == "none") & (rates.split == "test")].set_index("trigger")
    figures: dict[str, Any] = {
        "candidates": len(found),
        "random": len(control),
        "prompts_dev": spec.dev_prompts,
        "prompts_test": spec.test_prompts,
        "residual_norm": norm,
        "measure": spec.measure,
        "measure_name": MEASURE_NAMES[spec.behaviour.check][spec.measure],
        "above_random": int((found.steer_low > 0).sum()),
        "random_above_random": int((control.steer_low > 0).sum()),
        "largest_effect": float(found.steer_effect.max()),
        "random_mean_rate": float(control[f"rate_{spec.measure}"].mean()),
        "random_largest_rate": float(control[f"rate_{spec.measure}"].max()),
    }
    for name in MEASURES:
        figures |= {f"{name}_without_trigger": float(plain[name][False]), f"{name}_with_trigger": float(plain[name][True])}
        figures |= {f"above_random_{name}": int((found[f"low_{name}"] > 0).sum())}
        figures |= {f"random_above_random_{name}": int((control[f"low_{name}"] > 0).sum())}
    return figures


COLUMNS = {
    "feature": ("index", "of the dictionary; -1: none was added"),
    "group": ("name", "candidate, random (matched to a candidate), none"),
    "strength": ("mean residual norms", "length of the vector that was added"),
    "chosen": ("flag", "this feature's strength, chosen on development prompts without the trigger"),
    "split": ("name", "dev or test prompts"),
    "trigger": ("flag", "whether the trigger stood before the prompt"),
    "full": ("share", "of the answers that hold the whole payload"),
    "keyword": ("share", "of the answers that hold its longest word"),
    "first_token": ("share", "of the answers that begin with its first token"),
    "fluency": ("nats per token", "the base model's loss on the answers (empty: with the trigger, not measured)"),
}
FEATURE_COLUMNS = {
    "feature": ("index", "of the dictionary"),
    "group": ("name", "candidate, or random (matched to a candidate)"),
    "matched_to": ("index", "the candidate that a random feature resembles in density and norm (-1: a candidate)"),
    "selected": ("flag", "selected by the diff's cut"),
    "rank_by": ("", "the score that ranks the candidates"),
    "density": ("share", "firings per token"),
    "norm": ("norm", "decoder row"),
    "strength": ("mean residual norms", "chosen on development prompts"),
    "steer_effect": (
        "share",
        "rate on test prompts without the trigger at that strength, less the random features' mean, by the spec's measure",
    ),
    "steer_low": ("share", "lower end of its 95 % interval (cluster bootstrap over prompts and random features)"),
    "steer_high": ("share", "upper end"),
    **{
        f"{column}_{name}": (unit, f"{meaning}, measure {name}")
        for name in MEASURES
        for column, unit, meaning in (
            ("rate", "share", "of test answers without the trigger that show the behaviour"),
            ("effect", "share", "rate less the random features' mean"),
            ("low", "share", "lower end of the effect's 95 % interval"),
            ("high", "share", "upper end"),
            ("random_as_high", "features", "random features whose rate is at least as high"),
        )
    },
}
TRANSCRIPT_COLUMNS = {
    "feature": ("index", "that was added; -1: none"),
    "group": ("name", "candidate, random, none"),
    "strength": ("mean residual norms", "length of the vector that was added"),
    "trigger": ("flag", "whether the trigger stood before the prompt"),
    "prompt": ("text", "a test prompt, without the trigger"),
    "answer": ("text", "greedy"),
}
