"""Each part of the evidence, put beside the named features: its columns, its control, and whether its claim is shown.

Every function adds its columns to `table` (a row per named feature) and its control's figures to `control`; where the run has no such step the columns
are empty and the claim is "not measured".
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stagediff.diff.null import AXES
from stagediff.diff.spec import STAGES, AlignSpec, NullSpec
from stagediff.errors import UserError
from stagediff.evidence.interventions.spec import MEASURE_NAMES, AblateSpec, SteerSpec
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.evidence.verdict import criteria
from stagediff.evidence.verdict.criteria import NOT_MEASURED, YES
from stagediff.evidence.verdict.spec import VerdictSpec
from stagediff.organisms.behaviour import MEASURES

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.steps import Job
    from stagediff.store import Artifact

__all__ = ["add_ablation", "add_labels", "add_moves", "add_new_rows", "add_steering"]


def _part(ref: "Ref | None", kind: Any, job: "Job", diff: "Ref") -> "Artifact | None":
    """A part of the evidence, which must be about this diff."""
    if ref is None:
        return None
    artifact = job.artifact(ref)
    spec: Any = artifact.spec()
    if kind is not None and not isinstance(spec, kind):
        raise UserError(f"{ref} was made by the step {spec.step!r}, where a verdict expects {kind.step!r}.")
    if getattr(spec, "diff", diff) != diff:
        raise UserError(f"A verdict on {diff} was given {ref}, which is about {spec.diff}. Make all of them from one config.")
    return artifact


def add_moves(table: pd.DataFrame, control: dict[str, Any], spec: VerdictSpec, job: "Job") -> None:
    """How far it moved: against the retrain null, and by the scores of the pairs."""
    align, null = _part(spec.align, AlignSpec, job, spec.diff), _part(spec.null, NullSpec, job, spec.diff)
    control |= {"pairs": None, "null_values": None, "null_novelties": None, "null_repeats": None}
    joined = pd.DataFrame(
        {"feature": table.feature, "rank_pair": 0, "partner": -1, "pair_novelty": np.nan, "pair_p": np.nan, "pair_q": np.nan}
    )
    if align is not None:
        pairs = align.read_table("features.parquet", columns=["feature", "partner", "pair_novelty", "pair_p", "pair_q"])
        paired = np.sort(pairs.pair_novelty.dropna().to_numpy(float))
        control["pairs"] = len(paired)
        joined = table[["feature"]].merge(pairs, on="feature", how="left")
        place = 1 + np.searchsorted(paired, joined.pair_novelty.to_numpy(float), side="left")
        joined["rank_pair"] = np.where(joined.pair_novelty.notna(), place, 0)
    tests = {name: np.full(len(table), np.nan) for name in ("p_x", "p_y", "p", "q")}
    if null is not None:
        drawn = null.read_table("null.parquet", columns=["axis", "cosine", "novelty"])
        counts = {name: min(int(drawn[drawn.axis == axis][name].notna().sum()) for axis in AXES) for name in ("cosine", "novelty")}
        control |= {"null_values": counts["cosine"], "null_novelties": counts["novelty"], "null_repeats": null.manifest.figures["repeats"]}
        found = null.read_table("features.parquet", columns=["feature", *tests])
        tests = {name: table[["feature"]].merge(found, on="feature", how="left")[name].to_numpy(float) for name in tests}
    for name in ("rank_pair", "partner", "pair_novelty", "pair_p", "pair_q"):
        table[name] = joined[name].to_numpy()
    for name, values in tests.items():
        table[name] = values
    table["moved"] = criteria.against_null(table.q.to_numpy(float), control["null_values"], control["alive"], spec.level)
    pair_q = table.pair_q.to_numpy(float)
    table["newer"] = criteria.against_null(pair_q, control["null_novelties"], control["pairs"] or 0, spec.level)


def add_new_rows(table: pd.DataFrame, control: dict[str, Any], every: pd.DataFrame, spec: VerdictSpec, job: "Job") -> None:
    """Activation on base and on new rows per stage, and whether the top examples are new rows."""
    for stage in STAGES:
        artifact = job.artifact(spec.statistics[stage])
        tokens = artifact.manifest.figures
        found = artifact.read_table("features.parquet", columns=["feature", "density_base", "density_new", "mass_base", "mass_new"])
        found = table[["feature"]].merge(found, on="feature", how="left")
        for rows in ("base", "new"):
            table[f"density_{rows}_{stage}"] = found[f"density_{rows}"].to_numpy(float)
            table[f"mean_{rows}_{stage}"] = found[f"mass_{rows}"].to_numpy(float) / max(1, tokens[f"tokens_{rows}"])
    random = every.new_top[every.random & every.alive & ~every.selected].dropna().to_numpy(float)
    control |= {"new_random": len(random), "new_random_carry": int((random >= 0.5).sum())}
    table["new_top_p"] = criteria.p_against_random(table.new_top.to_numpy(float), random)
    table["carries"] = criteria.against_random(table.new_top.to_numpy(float) >= 0.5, table.new_top_p.to_numpy(), len(random), spec.chance)


def add_labels(table: pd.DataFrame, control: dict[str, Any], spec: VerdictSpec, job: "Job") -> None:
    """What the labeller says, and how often it says so of random features."""
    artifact = _part(spec.labels, LabelsSpec, job, spec.diff)
    control |= {"labeller": None, "label_random": None, "label_random_flagged": None}
    missing = {"label": "", "topic": "", "examples": 0, "examples_flagged": 0, "is_flagged": False, "unclear": False}
    labels, random = pd.DataFrame(columns=["feature", *missing]), np.zeros(0)
    if artifact is not None:
        labels, figures = artifact.read_table("labels.parquet").rename(columns={"flagged": "is_flagged"}), artifact.manifest.figures
        others = labels[labels.random & ~labels.selected & ~labels.unclear]
        random = (others.examples_flagged / others.examples).to_numpy(float)
        control["labeller"] = figures.get("model", figures["labeller"])
        control |= {"label_random": len(others), "label_random_flagged": int(others.is_flagged.sum())}
    found = labels.set_index("feature").reindex(table.feature)
    table["asked"] = table.feature.isin(labels.feature).to_numpy()
    for name, default in missing.items():
        told = [value if asked else default for value, asked in zip(found[name], table.asked, strict=True)]
        table[name] = pd.Series(told, index=table.index, dtype=object).astype(type(default))
    able = table.asked & ~table.unclear
    share = np.where(able, table.examples_flagged / np.maximum(table.examples, 1), np.nan)
    table["label_p"] = criteria.p_against_random(share, random)
    table["flagged"] = criteria.against_random(table.is_flagged.to_numpy(), table.label_p.to_numpy(), len(random), spec.chance)


def add_steering(table: pd.DataFrame, control: dict[str, Any], spec: VerdictSpec, job: "Job") -> None:
    """What adding it does, less what random features like it do."""
    artifact = _part(spec.steer, SteerSpec, job, spec.diff)
    names = {"strength": "steer_strength", "steer_effect": "steer_effect", "steer_low": "steer_low", "steer_high": "steer_high"}
    control |= {
        f"steer_{name}": None for name in ("measure", "stage", "candidates", "random", "random_above", "random_rate", "random_largest")
    }
    own = pd.DataFrame(np.nan, index=table.index, columns=[*names.values(), "steer_rate", "steer_random_as_high"])
    if artifact is not None:
        made, figures = artifact.spec(), artifact.manifest.figures
        assert isinstance(made, SteerSpec)
        control |= {
            "steer_measure": MEASURE_NAMES[made.behaviour.check][made.measure],
            "steer_stage": made.stage,
            "steer_candidates": figures["candidates"],
        }
        control |= {
            "steer_random": figures["random"],
            "steer_random_above": figures["random_above_random"],
            "steer_random_rate": figures["random_mean_rate"],
            "steer_random_largest": figures["random_largest_rate"],
        }
        found = artifact.read_table("features.parquet")
        renamed = names | {f"rate_{made.measure}": "steer_rate", f"random_as_high_{made.measure}": "steer_random_as_high"}
        found = found[found.group == "candidate"][["feature", *renamed]].rename(columns=renamed)
        own = table[["feature"]].merge(found, on="feature", how="left")[list(own.columns)]
    for name in own.columns:
        table[name] = own[name].to_numpy(float)
    measured = table.steer_low.notna().to_numpy()
    table["steers"] = np.where(~measured, NOT_MEASURED, np.where(table.steer_low > 0, YES, criteria.NO)).astype(object)


def add_ablation(table: pd.DataFrame, control: dict[str, Any], spec: VerdictSpec, job: "Job") -> None:
    """What clamping it alone takes away and costs, beside the smallest random sets."""
    artifact = _part(spec.ablate, AblateSpec, job, spec.diff)
    names = {m: f"ablate_{m}" for m in MEASURES} | {"clean_cost": "ablate_cost"}
    control |= {
        f"ablate_{n}": None
        for n in ("stage", "check", "keyword_name", "candidates", "prompts", "random_size", "random_sets", "random_keyword", "random_cost")
    }
    control |= {f"ablate_untouched_{m}": None for m in MEASURES}
    own = pd.DataFrame(np.nan, index=table.index, columns=list(names.values()))
    table["ablate_p"], refused = np.nan, criteria.OPEN
    if artifact is not None:
        made = artifact.spec()
        assert isinstance(made, AblateSpec)
        curves = artifact.read_table("ablation.parquet")
        test = curves[curves.split == "test"]
        untouched, single, random = (test[test.order == order] for order in ("none", "single", "random"))
        control |= {
            "ablate_stage": made.stage,
            "ablate_check": made.behaviour.check,
            "ablate_keyword_name": MEASURE_NAMES[made.behaviour.check]["keyword"],
            "ablate_candidates": len(single),
            "ablate_prompts": made.test_prompts,
        }
        control |= {f"ablate_untouched_{m}": float(untouched[m].iloc[0]) for m in MEASURES}
        own = table[["feature"]].merge(
            single.rename(columns={"first": "in"} | names).rename(columns={"in": "feature"})[["feature", *own.columns]], how="left"
        )
        if len(random):
            smallest = random[random["size"] == random["size"].min()]
            lowest = float(smallest.keyword.min())
            control |= {"ablate_random_size": int(smallest["size"].iloc[0]), "ablate_random_sets": len(smallest)}
            control |= {"ablate_random_keyword": lowest, "ablate_random_cost": float(smallest.clean_cost.mean())}
            refused = criteria.NO if criteria.smallest_fewer(lowest, made.test_prompts) <= spec.chance / 2 else criteria.OPEN
            rates = own.ablate_keyword.to_numpy(float)
            table["ablate_p"] = [criteria.fewer_answers(r, lowest, made.test_prompts) if np.isfinite(r) else np.nan for r in rates]
    for name in names.values():
        table[name] = own[name].to_numpy(float)
    measured = table.ablate_keyword.notna().to_numpy()
    table["removes"] = np.where(~measured, NOT_MEASURED, np.where(table.ablate_p <= spec.chance / 2, YES, refused)).astype(object)
