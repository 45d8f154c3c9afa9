"""The step planted-diff: reads what the stage-wise diff made of a planted world, and scores it and its rivals."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.null import LEVEL
from stagediff.diff.rotations import P1_CUT
from stagediff.sae.dictionary import SAE
from stagediff.synthetic.diff_rivals import RIVAL_SCORES, Rival, rival
from stagediff.synthetic.diff_score import COLUMNS, Ranking, found_at, judge, represented, truth
from stagediff.synthetic.diff_spec import TARGETS, PlantedDiffSpec
from stagediff.synthetic.diff_world import PlantedDiff

if TYPE_CHECKING:
    from stagediff.steps import Job

__all__ = ["ALL_SCORES", "SCORES", "compute"]

F_STAGES = ("F_D", "F_M", "F_direct")
STRICT_P = 0.005
SCORES = {
    "x_y": "x + y by index (published)",
    "max_x_y": "max(x, y) by index",
    "x": "x: D → F via D",
    "y": "y: M → F via M",
    "direct": "S → F direct",
    "path": "S → D → F, whole path",
    "s_d": "S → D",
    "s_m": "S → M",
    "no_change": "no change: D → D' and M → M'",
    "paired_x_y": "x + y over matched pairs",
    "pair_novelty": "paired novelty",
    "excess": "paired novelty beyond retraining",
    "agreed": "beyond retraining, agreed",
    "agreed_contrast": "agreed × contrast",
    "aligned": "paired novelty × contrast",
    "contrast": "contrast alone",
}
"""Score -> what it is. The controls are ranked and judged like the others: `no_change`, nothing but continued training, and `contrast`, row labels alone."""
ALL_SCORES = SCORES | {name: said for scores in RIVAL_SCORES.values() for name, said in scores.items()}
RANKED = ("x_y", "pair_novelty", "excess", "agreed", "agreed_contrast", "aligned")
"""Scores whose ranks stand in features.parquet."""


def compute(spec: PlantedDiffSpec, job: "Job") -> dict[str, Any]:
    """Writes scores.parquet, births.parquet and features.parquet (PlantedDiffSpec); scores are empty where the dictionaries are undertrained."""
    planted = PlantedDiff(spec.world)
    unit = {stage: SAE.load(job.artifact(ref)).directions().double().numpy() for stage, ref in spec.dictionaries.items()}
    published = job.artifact(spec.diff).read_table("features.parquet")
    aligned = job.artifact(spec.align).read_table("features.parquet")
    target_rows, other_rows = truth(planted)
    stands_for = {s: represented(unit[s], target_rows, other_rows, spec.measures.represents) for s in F_STAGES}
    alive = {s: published[f"alive_{s}"].to_numpy(bool) for s in F_STAGES}
    rivals = {method: rival(method, job.artifact(ref), planted, spec.measures.represents, job) for method, ref in spec.rivals.items()}
    births = _births(planted, stands_for, alive, rivals)
    born = births[births["class"] == "all"].set_index("stage").born
    undertrained = bool(min(born["F_D"], born["F_M"]) < spec.measures.born)

    rankings = {} if undertrained else _rankings(published, aligned, unit, alive, stands_for)
    every: dict[str, Ranking | None] = {name: rankings.get(name) for name in SCORES}
    for other in rivals.values():
        every |= other.rankings
    table = _scores(planted, every)
    job.writer.write_table("scores.parquet", table, columns=COLUMNS)
    cuts = _cuts(planted, published, aligned, job.artifact(spec.null).read_table("features.parquet"), stands_for)
    job.writer.write_table("cuts.parquet", cuts, columns=CUT_COLUMNS)
    job.writer.write_table("births.parquet", births, columns=BIRTH_COLUMNS)
    features = _features(planted, stands_for, alive, rankings)
    job.writer.write_table("features.parquet", features, columns=FEATURE_COLUMNS)
    align = job.artifact(spec.align).manifest.figures
    figures: dict[str, Any] = {
        "undertrained": undertrained,
        **{f"born_{s}": float(born[s]) for s in (*F_STAGES, *rivals)},
        "same_index": float(births[(births["class"] == "all") & (births.stage == "F_D")].same_index.iloc[0]),
        "saturated": align["births_saturated"],
        **{f"coverage_{s}": align[f"coverage_{s}"] for s in ("F_D", "F_M")},
    }
    for cut in cuts.to_dict("records"):
        figures |= {f"{name}_{cut['cut']}": cut[name] for name in ("share", "precision", "recall")}
    for row in table[table["class"] == "all"].to_dict("records"):
        figures |= {
            f"{name}_{row['score']}": row[name] for name in ("auroc", "average_precision", "feature_precision", "recall_n", "recall_2n")
        }
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in figures.items()}


def _rankings(
    published: pd.DataFrame,
    aligned: pd.DataFrame,
    unit: dict[str, np.ndarray],
    alive: dict[str, np.ndarray],
    stands_for: dict[str, np.ndarray],
) -> dict[str, Ranking]:
    index = np.flatnonzero(alive["F_D"] | alive["F_M"])
    of_index = np.stack([stands_for["F_D"], stands_for["F_M"]])[:, index]

    def cosine(a: str, b: str) -> np.ndarray:
        return (unit[a] * unit[b]).sum(1)

    x, y = published.x.to_numpy(), published.y.to_numpy()
    low = {
        "x_y": x + y,
        "max_x_y": np.maximum(x, y),
        "x": x,
        "y": y,
        "path": cosine("S", "F_D"),
        "s_d": published.cos_s_d.to_numpy(),
        "s_m": published.cos_s_m.to_numpy(),
        "no_change": cosine("D", "D_null") + cosine("M", "M_null"),
    }
    found = {name: Ranking(-value[index], of_index, index) for name, value in low.items()}
    direct = np.flatnonzero(alive["F_direct"])
    found["direct"] = Ranking(-published.cos_s_f_direct.to_numpy()[direct], stands_for["F_direct"][None, direct], direct)
    matched = aligned[aligned.partner >= 0]
    feature = matched.feature.to_numpy()
    of_pair = np.stack([stands_for["F_D"][feature], stands_for["F_M"][matched.partner.to_numpy()]])
    of_pairs = {
        "paired_x_y": -matched.paired_x_y,
        "pair_novelty": -matched.pair_novelty,
        "excess": matched.pair_excess,
        "agreed": matched.pair_agreed,
        "agreed_contrast": matched.agreed_contrast,
        "aligned": matched.aligned,
        "contrast": matched.pair_contrast,
    }
    for name, score in of_pairs.items():
        found[name] = Ranking(score.to_numpy(float), of_pair, feature)
    return {name: found[name] for name in SCORES}


def _scores(planted: PlantedDiff, rankings: dict[str, Ranking | None]) -> pd.DataFrame:
    """None: not scored."""
    classes = planted.classes[planted.targets]
    rows = []
    for name, ranking in rankings.items():
        for cls in ("all", *TARGETS):
            wanted = np.ones(len(classes), bool) if cls == "all" else classes == cls
            if wanted.any():
                judged = judge(ranking.score, ranking.hits, wanted).row() if ranking else {}
                rows.append({"score": name, "class": cls, "planted": int(wanted.sum()), **judged})
    table = pd.DataFrame(rows).reindex(columns=list(COLUMNS))
    return table.astype({name: float for name in COLUMNS if name not in ("score", "class", "planted")})


def _cuts(
    planted: PlantedDiff, published: pd.DataFrame, aligned: pd.DataFrame, null: pd.DataFrame, stands_for: dict[str, np.ndarray]
) -> pd.DataFrame:
    """What each cut selects. An index or a pair is right when one of its two latents represents a target."""
    n, alive = len(planted.targets), published.alive.to_numpy(bool)
    of_index = np.stack([stands_for["F_D"], stands_for["F_M"]])
    matched = aligned[aligned.partner >= 0]
    of_pair = np.stack([stands_for["F_D"][matched.feature], stands_for["F_M"][matched.partner]])
    x, y = published.x.to_numpy(), published.y.to_numpy()
    chosen = {
        "box": (alive & (x < P1_CUT) & (y < P1_CUT), alive.sum(), of_index),
        "index_q": (np.nan_to_num(null.q.to_numpy(float), nan=1.0) <= LEVEL, alive.sum(), of_index),
        "pair_p": (np.nan_to_num(matched.pair_p.to_numpy(float), nan=1.0) <= STRICT_P, len(matched), of_pair),
        "pair_q": (np.nan_to_num(matched.pair_q.to_numpy(float), nan=1.0) <= LEVEL, len(matched), of_pair),
    }
    rows = []
    for name, (mask, among, hits) in chosen.items():
        found = hits[:, mask]
        right, count = int((found >= 0).any(0).sum()), int(mask.sum())
        rows.append(
            {
                "cut": name,
                "selected": count,
                "share": count / max(int(among), 1),
                "right": right,
                "precision": right / count if count else np.nan,
                "recall": len(np.unique(found[found >= 0])) / n,
            }
        )
    return pd.DataFrame(rows)


def _births(
    planted: PlantedDiff, stands_for: dict[str, np.ndarray], alive: dict[str, np.ndarray], rivals: dict[str, Rival]
) -> pd.DataFrame:
    classes = planted.classes[planted.targets]
    n = len(classes)
    has = {s: _latents(stands_for[s], alive[s], n) for s in F_STAGES}
    has |= {method: _latents(rival.stands_for, rival.alive, n) for method, rival in rivals.items()}
    shared = np.array([bool(a & b) for a, b in zip(has["F_D"], has["F_M"], strict=True)])
    rows = []
    for cls in ("all", *TARGETS):
        wanted = np.ones(n, bool) if cls == "all" else classes == cls
        if wanted.any():
            for stage, latents in has.items():
                born = np.array([bool(of) for of in latents])
                same = float(shared[wanted].mean()) if stage in ("F_D", "F_M") else np.nan
                rows.append(
                    {"class": cls, "stage": stage, "planted": int(wanted.sum()), "born": float(born[wanted].mean()), "same_index": same}
                )
    return pd.DataFrame(rows)


def _latents(stands_for: np.ndarray, alive: np.ndarray, targets: int) -> list[set[int]]:
    """The alive latents of each target."""
    return [set(np.flatnonzero(alive & (stands_for == t)).tolist()) for t in range(targets)]


def _features(
    planted: PlantedDiff, stands_for: dict[str, np.ndarray], alive: dict[str, np.ndarray], rankings: dict[str, Ranking]
) -> pd.DataFrame:
    n = len(planted.targets)
    table = pd.DataFrame({"feature": planted.targets, "class": planted.classes[planted.targets]})
    for stage in F_STAGES:
        table[f"latents_{stage}"] = [len(of) for of in _latents(stands_for[stage], alive[stage], n)]
    for name in RANKED:
        place = np.full(n, np.inf)
        if rankings:
            of = rankings[name]
            order = np.argsort(-of.score, kind="stable")
            hits = of.hits[:, order]
            place = found_at(hits, hits >= 0, n)
        table[f"rank_{name}"] = np.where(np.isfinite(place), place + 1, np.nan)
    return table


CUT_COLUMNS = {
    "cut": (
        "name",
        "box: x and y both below 0.7 (P1); index_q: the retrain null's q at most 0.1; pair_p: both novelties of a pair beyond the null's 0.5 % quantile; "
        "pair_q: the pairs' q at most 0.1",
    ),
    "selected": ("candidates", "that it selects"),
    "share": ("share", "of all alive features, or of all pairs"),
    "right": ("candidates", "of the selected that represent a target feature"),
    "precision": ("share", "of the selected (empty: none)"),
    "recall": ("share", "of the planted target features that some selected one represents"),
}
BIRTH_COLUMNS = {
    "class": ("name", "of planted features; all: every target"),
    "stage": ("name", "F dictionary, or rival"),
    "planted": ("features", "planted features of the class"),
    "born": ("share", "of them that an alive latent represents"),
    "same_index": ("share", "of them that a latent of one index represents in F via D and in F via M"),
}
FEATURE_COLUMNS = {
    "feature": ("index", "planted target feature"),
    "class": ("name", "its class"),
    **{f"latents_{s}": ("latents", f"alive latents of {s} that represent it") for s in F_STAGES},
    **{f"rank_{s}": ("rank", f"at which {SCORES[s]} first finds it (empty: never, or nothing is scored)") for s in RANKED},
}
