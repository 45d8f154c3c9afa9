"""The formation step's tables, from what the walk over the checkpoints found: progress, formation times, means by kind, and how far the measures agree."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.errors import UserError
from stagediff.track.bootstrap import interval, resamples
from stagediff.track.formation_times import Walk
from stagediff.track.spec import KINDS, MEASURES, SETS, FormationSpec

if TYPE_CHECKING:
    from stagediff.store import Artifact

__all__ = [
    "AGREEMENT_COLUMNS",
    "BASELINE_COLUMNS",
    "BY_KIND_COLUMNS",
    "FORMATION_COLUMNS",
    "FORMED_COLUMNS",
    "Results",
    "correlation",
    "final_kinds",
]

NEVER_ACTIVE = "never active"
FEWER = "fewer datapoints than asked: {}"
TOO_SMALL = "final M too small"
AT_FIRST = "formed at the first checkpoint"
OPEN = "interval open: some resamples do not form"
NO_PAIR, UNFORMED, FORMED, FIRST = range(4)
LIVING = KINDS[:3]
FEWEST_FOR_CORRELATION = 3


def final_kinds(artifact: "Artifact", step: int, features: int) -> np.ndarray:
    """[F] codes into KINDS at the final checkpoint, -1 where nothing was said. Raises UserError where the kinds are another chain's."""
    table = artifact.read_table("kinds.parquet", columns=["feature", "step", "kind"])
    table = table[table["step"] == step].sort_values("feature")
    if not np.array_equal(table["feature"].to_numpy(), np.arange(features)):
        raise UserError(
            f"The kinds {artifact.ref} speak of {len(table)} features at step {step}, the chain has {features} there. They belong to another chain: compute "
            "kinds on these points."
        )
    return pd.Categorical(table["kind"], categories=KINDS).codes.astype(np.int64)


class Results:
    """The tables. Sets are numbered as in `datapoints`."""

    def __init__(self, spec: FormationSpec, walk: Walk, size: np.ndarray, alive: np.ndarray):
        """`size` [sets]: datapoints of every set; `alive` [F]: at the final checkpoint."""
        self.spec, self.alive, self.features = spec, alive, len(alive)
        self.steps = np.array([p.step for p in spec.points], np.int64)
        shape = (len(MEASURES), len(SETS), self.features)
        self.m = walk.m.reshape(*shape, len(self.steps))
        self.size = size.reshape(len(SETS), self.features)
        self._baseline, found = walk.baseline, walk.found()
        self.at, self.low, self.high, self.unformed = (a.reshape(shape) for a in (found.at, found.low, found.high, found.unformed))
        self.has_formed = self.at < len(self.steps)

    def formation(self) -> pd.DataFrame:
        F, T, n = self.features, len(self.steps), self.size.ravel()
        columns = {
            "feature": np.tile(np.repeat(np.arange(F, dtype=np.int32), T), len(SETS)),
            "step": np.tile(self.steps, len(SETS) * F),
            "set": pd.Categorical.from_codes(np.repeat(np.arange(len(SETS)), F * T), categories=SETS),
            **{f"m_{name}": self.m[i].ravel() for i, name in enumerate(MEASURES)},
            "reason": pd.Categorical.from_codes(
                np.repeat(np.select([n == 0, n == 1], [0, 1], -1), T), categories=[NEVER_ACTIVE, FEWER.format(1)]
            ),
        }
        return pd.DataFrame(columns)

    def baseline(self) -> pd.DataFrame:
        columns = {
            "step": np.repeat(self.steps, len(MEASURES)),
            "measure": MEASURES * len(self.steps),
            "similarity": self._baseline.ravel(),
        }
        return pd.DataFrame(columns)

    def formed(self) -> pd.DataFrame:
        parts = []
        for (s, which), (i, measure) in itertools.product(enumerate(SETS), enumerate(MEASURES)):
            formed = self.has_formed[i, s]
            columns = {
                "feature": np.arange(self.features, dtype=np.int32),
                "set": which,
                "measure": measure,
                "formed_step": self._step(self.at[i, s], formed),
                "low": self._step(self.low[i, s], formed),
                "high": self._step(self.high[i, s], formed),
                "formed_share": np.where(self.size[s] > 1, 1 - self.unformed[i, s], np.nan).astype(np.float32),
                "final_m": self.m[i, s, :, -1],
                "datapoints": self.size[s].astype(np.int32),
                "reason": self._reasons(i, s),
            }
            parts.append(pd.DataFrame(columns))
        table = pd.concat(parts, ignore_index=True)
        return table.astype({name: "category" for name in ("set", "measure", "reason")})

    def _step(self, at: np.ndarray, known: np.ndarray) -> pd.Series:
        """Training steps of checkpoint indices, null where not known or past the last checkpoint."""
        inside = at < len(self.steps)
        return pd.Series(self.steps[np.where(inside, at, 0)]).astype("Int64").where(known & inside)

    def _reasons(self, i: int, s: int) -> np.ndarray:
        T, asked = len(self.steps), self.spec.rule.datapoints
        size, at, formed = self.size[s], self.at[i, s], self.has_formed[i, s]
        state = np.select([size < 2, ~formed, at == 0], [NO_PAIR, UNFORMED, FIRST], FORMED)
        is_open = formed & (self.high[i, s] == T)
        cases, back = np.unique(np.stack([size, state, is_open]), axis=1, return_inverse=True)
        texts = pd.Series([_reason(n, what, bool(edge), asked) for n, what, edge in cases.T.tolist()], dtype=object)
        return texts.to_numpy()[back.ravel()]

    def by_kind(self, kind: np.ndarray) -> pd.DataFrame:
        """`kind` [F] codes into KINDS. Features that are dead at the end, or without a kind or a pair of datapoints, take no part."""
        T, parts = len(self.steps), []
        for (s, which), (code, name) in itertools.product(enumerate(SETS), enumerate(LIVING)):
            of = np.flatnonzero((kind == code) & (self.size[s] > 1))
            if not len(of):
                continue
            m = self.m[:, s, of].transpose(1, 0, 2).reshape(len(of), -1).astype(np.float64)  # [features, measures x T]
            counts = resamples(len(of), self.spec.rule.bootstrap, self.spec.seed)
            low, high = interval(np.concatenate([c @ m for c in counts]) / len(of))
            columns = {
                "step": np.tile(self.steps, len(MEASURES)),
                "set": which,
                "measure": np.repeat(MEASURES, T),
                "kind": name,
                "m": m.mean(0),
                "low": low,
                "high": high,
                "features": len(of),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(BY_KIND_COLUMNS))

    def agreement(self) -> pd.DataFrame:
        rows = []
        for s, which in enumerate(SETS):
            of = self.alive & (self.size[s] > 1)
            for i, j in itertools.combinations(range(len(MEASURES)), 2):
                formed = of & self.has_formed[i, s] & self.has_formed[j, s]
                m = correlation(self.m[i, s, of].ravel(), self.m[j, s, of].ravel()) if of.any() else np.nan
                times = [pd.Series(self.at[k, s, formed]).rank().to_numpy() for k in (i, j)]
                time = correlation(*times)
                why = [
                    text for text, value in (("M does not vary", m), ("too few formed, or all at one checkpoint", time)) if np.isnan(value)
                ]
                rows.append((which, MEASURES[i], MEASURES[j], m, time, int(of.sum()), int(formed.sum()), "; ".join(why) or None))
        return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS)).astype({"reason": "str"})

    def figures(self) -> dict[str, Any]:
        """Formation by the first measure, activation cosine."""
        asked, top = self.spec.rule.datapoints, self.size[0]
        figures: dict[str, Any] = {
            "features": self.features,
            "checkpoints": len(self.steps),
            "never_active": int((top == 0).sum()),
            "fewer_datapoints": int(((top > 0) & (top < asked)).sum()),
            "baseline_first": float(self._baseline[0, 0]),
            "baseline_final": float(self._baseline[-1, 0]),
        }
        for s, which in enumerate(SETS):
            formed, at = self.has_formed[0, s], self.at[0, s]
            figures[f"formed_{which}"] = int(formed.sum())
            figures[f"formed_at_first_{which}"] = int((formed & (at == 0)).sum())
            # The lower of two middle ones: a checkpoint.
            middle = np.sort(at[formed])[(int(formed.sum()) - 1) // 2] if formed.any() else None
            figures[f"formed_step_median_{which}"] = None if middle is None else int(self.steps[middle])
            final = self.m[0, s, self.size[s] > 1, -1]
            figures[f"final_m_median_{which}"] = float(np.median(final)) if len(final) else None
        return figures


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN for fewer than FEWEST_FOR_CORRELATION pairs, or where one does not vary."""
    if len(a) < FEWEST_FOR_CORRELATION:
        return float("nan")
    a, b = (v.astype(np.float64) - v.mean(dtype=np.float64) for v in (a, b))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def _reason(size: int, state: int, is_open: bool, asked: int) -> str | None:
    if size == 0:
        return NEVER_ACTIVE
    notes = [FEWER.format(size)] if size < asked else []
    notes += {NO_PAIR: [], UNFORMED: [TOO_SMALL], FORMED: [], FIRST: [AT_FIRST]}[state]
    notes += [OPEN] if is_open else []
    return "; ".join(notes) or None


_STEP = {"step": ("steps", "training step of the model")}
_SET = {"set": ("name", "datapoints: top or levels (see regions)")}
FORMATION_COLUMNS = {
    "feature": ("index", "feature of the chain"),
    **_STEP,
    **_SET,
    "m_activation_cosine": (
        "cosine",
        "mean over pairs of the feature's datapoints less that over random positions: residual-stream vectors",
    ),
    "m_feature_cosine": ("cosine", "the same of this checkpoint's codes"),
    "m_feature_jaccard": ("share", "the same of their sets of active features"),
    "m_feature_weighted_jaccard": ("share", "the same of the codes' sum of minima over sum of maxima"),
    "reason": ("text", "why M is empty"),
}
BASELINE_COLUMNS = {
    **_STEP,
    "measure": ("name", "space and similarity"),
    "similarity": ("similarity", "mean over pairs of the random positions"),
}
FORMED_COLUMNS = {
    "feature": ("index", "feature of the chain"),
    **_SET,
    "measure": ("name", "space and similarity"),
    "formed_step": ("steps", "first checkpoint from which M stays at or above the share of its final value"),
    "low": ("steps", "5 % quantile of the resamples of datapoints; one that does not form counts as later than all checkpoints"),
    "high": ("steps", "95 % quantile"),
    "formed_share": ("share", "of the resamples, in which the feature forms"),
    "final_m": ("similarity", "M at the final checkpoint"),
    "datapoints": ("positions", "in the set"),
    "reason": ("text", "why something is empty, or what to know of it"),
}
BY_KIND_COLUMNS = {
    **_STEP,
    **_SET,
    "measure": ("name", "space and similarity"),
    "kind": ("name", "of the feature at the final checkpoint"),
    "m": ("similarity", "mean M over the features of the kind"),
    "low": ("similarity", "5 % quantile, bootstrap over features"),
    "high": ("similarity", "95 % quantile"),
    "features": ("features", "of the kind, with a pair of datapoints"),
}
AGREEMENT_COLUMNS = {
    **_SET,
    "measure_a": ("name", "space and similarity"),
    "measure_b": ("name", "the other one"),
    "m_correlation": ("correlation", "Pearson's of M over features alive at the end and checkpoints"),
    "time_correlation": ("correlation", "Spearman's of formation steps over the features formed by both measures"),
    "features": ("features", "alive at the end, with a pair of datapoints"),
    "formed": ("features", "of these, formed by both measures"),
    "reason": ("text", "why a correlation is empty"),
}
