"""A finished tracking run for the report's tests, of any number of features and checkpoints: tables as the steps' contracts say, through the real store.

Every feature has a made-up life (when it is born, when it forms, what it is before and after), and all tables follow from it, so that they agree with each
other. Texts hold what a corpus can hold: markup, control characters, other scripts. Token rows, tokenizer, final dictionary and final probe activations are
real artifacts, so that examples are looked up as in a real run.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
from track.fake_inputs import commit, write_inputs
from track.fake_lives import (
    CONCEPT,
    CONTEXT,
    DATAPOINTS,
    DEAD,
    NASTY,
    NOISE,
    ROWS,
    TOKEN,
    WORDS,
    Lives,
    formed_index,
    make_lives,
    steps_like_pythia,
)

from stagediff.lm.spec import ActivationData, ModelSource
from stagediff.report.page import build
from stagediff.report.spec import ReportSpec
from stagediff.sae.spec import QualitySpec
from stagediff.sections import ReportContext, Section
from stagediff.spec import Ref
from stagediff.store import Store
from stagediff.track.before_after import same_step
from stagediff.track.section import section
from stagediff.track.section.overview import summarise
from stagediff.track.section.run import TrackRun, open_run
from stagediff.track.spec import (
    KINDS,
    MEASURES,
    PATTERNS,
    SETS,
    DriftSpec,
    EfficiencyRow,
    EfficiencySpec,
    FormationSpec,
    KindsSpec,
    PatternsSpec,
    PhasesSpec,
    Point,
    UmapSpec,
)

__all__ = ["NASTY", "FakeRun", "Reported", "context_of", "finish", "page_of", "report_of", "sections_of", "write_track"]

FIGURES = {"drift": {"same_step_difference": -0.002, "same_step_difference_low": -0.003, "same_step_difference_high": -0.001}}


@dataclass
class FakeRun:
    store: Store
    spec: ReportSpec
    lives: Lives
    words: list[str]


@dataclass
class Reported:
    """A fake run with its context, what the section makes of it, and its tables by (node, table)."""

    fake: FakeRun
    context: ReportContext
    run: TrackRun
    parts: dict[str, Any]
    sections: list[Section]
    tables: dict[tuple[str, str], pd.DataFrame]


def context_of(run: FakeRun) -> ReportContext:
    """What the section reads."""
    return ReportContext(run.store, run.spec.nodes, run.spec.config, run.spec.examples, run.spec.seed)


def sections_of(context: ReportContext, pictures: bool = False) -> list[Section]:
    """The track's sections; without the still pictures, which take seconds, unless asked for."""
    with pytest.MonkeyPatch.context() as patch:
        if not pictures:
            patch.setattr("stagediff.track.section.overview_files", lambda *_: {})
            patch.setattr("stagediff.track.section.feature_files", lambda *_: {})
        return section(context) or []


def page_of(run: FakeRun) -> str:
    """The report with the track's sections alone, without still pictures."""
    context = context_of(run)
    return build(run.spec, context, sections_of(context))


def report_of(run: FakeRun) -> Reported:
    """The run as the section reads it."""
    context = context_of(run)
    opened = open_run(context)
    assert opened is not None
    tables = {
        (node, name.removesuffix(".parquet")): artifact.read_table(name)
        for node, artifact in opened.artifacts.items()
        for name in artifact.names()
        if name.endswith(".parquet")
    }
    return Reported(run, context, opened, summarise(opened), sections_of(context), tables)


def finish(run: FakeRun) -> None:
    """Commits the run's report (without a page), as a finished run has one."""
    commit(run.store, run.spec)


def write_track(
    store: Store,
    features: int,
    checkpoints: int,
    *,
    seed: int = 0,
    leave_out: tuple[str, ...] = (),
    texts: bool = True,
    name: str = "Toy <b>track</b>",
    slower: float = 0.0,
) -> FakeRun:
    """Writes the run and returns the spec of its report. `leave_out`: nodes that the run lacks. `texts` False: probe rows without a tokenizer.

    `slower`: share of the chain by which every life is later (for comparisons of runs).
    """
    rng = np.random.default_rng(seed)
    words = [*WORDS, *NASTY]
    steps = steps_like_pythia(checkpoints)
    lives = make_lives(features, steps, len(words), rng, slower)
    nodes: dict[str, Ref] = {}
    points, reference, tokenizer = write_inputs(store, lives, words, rng, nodes, texts, name)
    kinds = KindsSpec(points=points, tokenizer=tokenizer, reference=reference)
    formation = FormationSpec(points=points, kinds=kinds.ref)
    drift = DriftSpec(points=points, formation=formation.ref, null=(points[-2].dictionary, points[-1].dictionary), null_step=steps[-1])
    patterns = PatternsSpec(points=points, kinds=kinds.ref)
    phases = PhasesSpec(points=points, kinds=kinds.ref, drift=drift.ref)
    umap = UmapSpec(points=points, formation=formation.ref, kinds=kinds.ref)
    efficiency = _efficiency_spec(store, points, nodes)
    formed = formed_index(lives.m)
    writers = {
        "kinds": (kinds, lambda: _kinds(lives, words)),
        "formation": (formation, lambda: _formation(lives, formed, rng, "kinds" not in leave_out)),
        "drift": (drift, lambda: _drift(lives, formed, rng)),
        "patterns": (patterns, lambda: _patterns(lives, words, rng)),
        "phases": (phases, lambda: _phases(lives, rng)),
        "umap": (umap, lambda: _umap(lives, rng)),
        "efficiency": (efficiency, lambda: _efficiency(efficiency, rng)),
    }
    for node, (spec, make) in writers.items():
        if node in leave_out:
            continue
        with store.write(spec) as writer:
            for table, frame in make().items():
                writer.write_table(f"{table}.parquet", frame)
            writer.commit(figures=FIGURES.get(node, {}), numerics={})
        nodes[node] = spec.ref
    config = {
        "kind": "track",
        "name": name,
        "seed": seed,
        "model": {"name": "some/model-410m", "revision": "step{step}"},
        "checkpoints": {"steps": steps, "direction": "forward"},
        "hook": {"layer": 4, "site": "resid_pre"},
        "dictionary": {"architecture": "relu", "features": features},
        "train": {"tokens": 4_000_000},
        "follow": {"tokens": 200_000},
    }
    return FakeRun(store, ReportSpec(title=name, nodes=nodes, config=config, examples=60, seed=seed), lives, words)


# --- tables -----------------------------------------------------------------------------------------------------------------------------


def _long(lives: Lives) -> dict[str, np.ndarray]:
    F, T = lives.kind.shape
    return {"feature": np.repeat(np.arange(F, dtype=np.int32), T), "step": np.tile(np.array(lives.steps, np.int64), F)}


def _names(codes: np.ndarray, names: Any) -> pd.Series:
    return pd.Series(np.array([*names, None], dtype=object)[codes])


def _kinds(lives: Lives, words: list[str]) -> dict[str, pd.DataFrame]:
    kind, flat = lives.kind, lives.kind.ravel()
    n = flat.size
    few = (np.arange(n) % 997 == 3) & (flat != DEAD)
    dead = flat == DEAD
    table = pd.DataFrame({**_long(lives), "kind": _names(np.where(few, len(KINDS), flat), KINDS)})
    token = np.where(dead, len(words), lives.token.ravel())
    table["token"], table["token_id"] = _names(token, words), np.where(dead, -1, token).astype(np.int32)
    table["token_share"] = np.where(dead, np.nan, np.where(flat == TOKEN, 0.93, 0.31))
    table["distinct_tokens"] = np.where(dead, 0, np.where(flat == TOKEN, 2, 14)).astype(np.int32)
    table["likeness"] = np.where(dead, np.nan, np.where(flat == CONCEPT, 0.52, 0.21))
    table["set_size"] = np.where(dead, np.nan, DATAPOINTS)
    table["likeness_random"], table["likeness_p"] = np.where(dead, np.nan, 0.2), np.where(flat == CONCEPT, 0.001, 0.4)
    table["examples"] = np.where(dead, 0, np.where(few, 3, DATAPOINTS)).astype(np.int32)
    table["reason"] = _names(np.where(few, 0, np.where(dead, 1, 2)), ["too few examples", "dead"])
    shares = []
    for k, step in enumerate(lives.steps):
        counts = np.bincount(kind[:, k], minlength=4)
        alive = max(int(counts[:3].sum()), 1)
        for code, name in enumerate(KINDS):
            shares.append((step, name, int(counts[code]), counts[code] / (len(kind) if code == DEAD else alive)))
    return {"kinds": table, "shares": pd.DataFrame(shares, columns=["step", "kind", "count", "share"])}


def _formation(lives: Lives, formed: np.ndarray, rng: np.random.Generator, with_kinds: bool) -> dict[str, pd.DataFrame]:
    F, T = lives.kind.shape
    steps = np.array(lives.steps)
    never, dead = formed == T, lives.kind[:, -1] == DEAD
    factor = {"activation_cosine": 1.0, "feature_cosine": 0.9, "feature_jaccard": 0.55, "feature_weighted_jaccard": 0.5}
    parts, formed_rows, values = [], [], {}
    for which in SETS:
        part = pd.DataFrame({**_long(lives), "set": which})
        for measure in MEASURES:
            m = lives.m * factor[measure] * (1.0 if which == "top" else 0.7) + rng.normal(0, 0.01, (F, T))
            if measure == MEASURES[0] and which == "top":
                m = lives.m
            m = np.where(dead[:, None], np.nan, m)
            values[which, measure] = m
            part[f"m_{measure}"] = m.ravel()
            at = np.where(never, 0, formed)
            row = {"feature": np.arange(F, dtype=np.int32), "set": which, "measure": measure}
            low, high = np.maximum(at - rng.integers(0, 2, F), 0), np.minimum(at + rng.integers(0, 3, F), T - 1)
            for name, index in (("formed_step", at), ("low", low), ("high", high)):
                row[name] = np.where(never, np.nan, steps[index].astype(float))
            row |= {"final_m": m[:, -1], "datapoints": np.where(dead, 0, DATAPOINTS)}
            frame = pd.DataFrame(row)
            frame["reason"] = _names(np.where(dead, 0, np.where(never, 1, 2)), ["no datapoints", "final M too small"])
            formed_rows.append(frame)
        parts.append(part)
    tables = {"formation": pd.concat(parts, ignore_index=True), "formed": pd.concat(formed_rows, ignore_index=True)}
    baseline = [(s, m, 0.15 + 0.1 * k / T) for k, s in enumerate(lives.steps) for m in MEASURES]
    tables["baseline"] = pd.DataFrame(baseline, columns=["step", "measure", "similarity"])
    tables["regions"] = _regions(F, dead, rng)
    tables["random"] = pd.DataFrame({"row": rng.integers(0, ROWS, 100), "position": rng.integers(1, CONTEXT, 100)})
    if with_kinds:
        tables["by_kind"] = _by_kind(lives, values)
    pairs = []
    sample = np.flatnonzero(~dead)[:2000]
    for which in SETS:
        for a in MEASURES:
            for b in MEASURES:
                r = np.corrcoef(values[which, a][sample].ravel(), values[which, b][sample].ravel())[0, 1]
                pairs.append((which, a, b, r, 0.5 + r / 2, len(sample)))
    columns = ["set", "measure_a", "measure_b", "m_correlation", "time_correlation", "features"]
    return {**tables, "agreement": pd.DataFrame(pairs, columns=columns)}


def _regions(F: int, dead: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    ids = np.flatnonzero(~dead)
    parts = []
    for which in SETS:
        n = len(ids) * DATAPOINTS
        rank = np.tile(np.arange(DATAPOINTS), len(ids))
        level = np.zeros(n, int) if which == "top" else rank * 5 // DATAPOINTS
        activation = 9.0 - 0.1 * rank if which == "top" else 0.3 + 1.8 * level + rng.random(n)
        where = {"row": rng.integers(0, ROWS, n), "position": rng.integers(1, CONTEXT, n)}
        parts.append(
            pd.DataFrame(
                {"feature": np.repeat(ids, DATAPOINTS), "set": which, "rank": rank, "level": level, **where, "activation": activation}
            )
        )
    return pd.concat(parts, ignore_index=True)


def _by_kind(lives: Lives, values: dict[tuple[str, str], np.ndarray]) -> pd.DataFrame:
    rows = []
    for (which, measure), m in values.items():
        for code, name in enumerate(KINDS[:3]):
            part = m[lives.kind[:, -1] == code]
            for k, step in enumerate(lives.steps):
                mean, error = part[:, k].mean(), 1.6 * part[:, k].std() / np.sqrt(len(part))
                rows.append((step, which, measure, name, mean, mean - error, mean + error, len(part)))
    return pd.DataFrame(rows, columns=["step", "set", "measure", "kind", "m", "low", "high", "features"])


def _drift(lives: Lives, formed: np.ndarray, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    F, T = lives.kind.shape
    W = lives.decoder
    final, previous = np.einsum("ftd,fd->ft", W, W[:, -1]), np.full((F, T), np.nan)
    previous[:, 1:] = np.einsum("ftd,ftd->ft", W[:, 1:], W[:, :-1])
    alive = lives.kind != DEAD
    is_formed = pd.array((np.arange(T)[None] >= formed[:, None]).ravel(), dtype="boolean")
    is_formed[np.repeat(formed == T, T)] = pd.NA
    norm = 0.3 + 0.7 * np.clip(lives.m, 0, 1) + 0.1 * rng.random((F, 1))
    table = {"cos_final": final, "cos_previous": previous, "norm": norm, "density": lives.density, "alive": alive}
    features = pd.DataFrame({**_long(lives), **{name: v.ravel() for name, v in table.items()}, "formed": is_formed})
    null = 1 - rng.gamma(1.5, 0.006, (F, 2))
    edges = np.linspace(-1, 1, 101)
    rows = []
    for k, step in enumerate(lives.steps):
        for against, values, both in (("final", final[:, k], alive[:, k] & alive[:, -1]), ("previous", previous[:, k], alive[:, k])):
            counts, _ = np.histogram(values[both & np.isfinite(values)], edges)
            rows += [(step, against, *pair) for pair in zip(edges[:-1], edges[1:], counts, strict=True)]
    counts, _ = np.histogram(null[alive[:, -1]], edges)
    rows += [(lives.steps[-1], "null", *pair) for pair in zip(edges[:-1], edges[1:], counts, strict=True)]
    by_repeat = [
        pd.DataFrame({"feature": np.arange(F), "repeat": r, "cos_start": null[:, :r].prod(1), "cos_previous": null[:, r - 1]})
        for r in (1, 2)
    ]
    centred = W - W.mean(1, keepdims=True)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    flat = np.einsum("ftd,fcd->ftc", centred, axes[:, :2])
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = (singular[:, :2] ** 2).sum(1) / (singular**2).sum(1)
    at = _long(lives)
    turned = 1 - previous
    formed_step = np.array([*map(float, lives.steps), np.nan])[formed]
    same, _ = same_step(np.where(alive, turned, np.nan), np.array(lives.steps), formed_step, seed=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        before = np.array([np.nanmean(turned[i, 1 : formed[i]]) if 1 < formed[i] < T else np.nan for i in range(F)])
        after = np.array([np.nanmean(turned[i, max(1, formed[i]) :]) if formed[i] < T - 1 else np.nan for i in range(F)])
    return {
        "features": features,
        "histogram": pd.DataFrame(rows, columns=["step", "against", "low", "high", "count"]),
        "null": pd.concat(by_repeat, ignore_index=True),
        "trajectories": pd.DataFrame({**at, "pc1": flat[..., 0].ravel(), "pc2": flat[..., 1].ravel(), "formed": is_formed}),
        "trajectory": pd.DataFrame(
            {
                "feature": np.arange(F),
                "explained": explained,
                "length": np.degrees(np.arccos(np.clip(previous[:, 1:], -1, 1))).sum(1),
            }
        ),
        "before_after": pd.DataFrame({"feature": np.arange(F), "drift_before": before, "drift_after": after, "null": (1 - null).mean(1)}),
        "same_step": same,
    }


def _patterns(lives: Lives, words: list[str], rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    F, T = lives.kind.shape
    code = {name: i for i, name in enumerate(PATTERNS)}
    parts, counts = [], []
    for k in range(1, T):
        a, b = lives.kind[:, k - 1], lives.kind[:, k]
        same = lives.token[:, k - 1] == lives.token[:, k]
        conditions = {
            "vanishing": (a != DEAD) & (b == DEAD),
            "appearing": (a == DEAD) & (b != DEAD),
            "token_to_token": (a == TOKEN) & (b == TOKEN) & ~same,
            "maintaining": (a == b) & (a != DEAD),
            "token_to_concept": (a == TOKEN) & (b == CONCEPT),
            "concept_to_token": (a == CONCEPT) & (b == TOKEN),
            "grouping": (a == NOISE) & (b < NOISE),
            "losing": (a < NOISE) & (b == NOISE),
        }
        pattern = np.select(list(conditions.values()), [code[n] for n in conditions], len(PATTERNS))
        frame = pd.DataFrame({"feature": np.arange(F, dtype=np.int32), "from_step": lives.steps[k - 1], "to_step": lives.steps[k]})
        frame["pattern"], frame["from_kind"], frame["to_kind"] = _names(pattern, PATTERNS), _names(a, KINDS), _names(b, KINDS)
        frame["from_token"] = _names(np.where(a == DEAD, len(words), lives.token[:, k - 1]), words)
        frame["to_token"] = _names(np.where(b == DEAD, len(words), lives.token[:, k]), words)
        frame["cosine"] = np.einsum("fd,fd->f", lives.decoder[:, k - 1], lives.decoder[:, k])
        frame["reason"] = _names(np.where(pattern == len(PATTERNS), 0, 1), ["dead at both"])
        parts.append(frame)
        n = np.bincount(pattern, minlength=len(PATTERNS) + 1)[: len(PATTERNS)]
        counts += [(lives.steps[k - 1], lives.steps[k], p, int(c), c / max(n.sum(), 1)) for p, c in zip(PATTERNS, n, strict=True)]
    pairs = rng.integers(0, F, (max(F // 50, 1), 2))
    at = rng.integers(1, T, len(pairs))
    merges = pd.DataFrame({"feature": pairs[:, 0], "partner": pairs[:, 1]})
    merges["from_step"], merges["to_step"] = np.array(lives.steps)[at - 1], np.array(lives.steps)[at]
    merges["cos_before"], merges["cos_after"], merges["shared"] = 0.35, 0.81, 0.33
    return {
        "patterns": pd.concat(parts, ignore_index=True),
        "merges": merges,
        "counts": pd.DataFrame(counts, columns=["from_step", "to_step", "pattern", "count", "share"]),
    }


def _phases(lives: Lives, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    steps, T = lives.steps, len(lives.steps)
    rows = []
    for axis, at, gain in (
        ("index", (T // 4, T // 2), 0.71),
        ("log_step", (T // 4, T // 2 + 1), 0.66),
        ("step", (T // 2, 3 * T // 4), 0.4),
    ):
        for b, i in enumerate(at):
            rows.append((axis, b + 1, steps[i], steps[max(i - 1, 0)], steps[min(i + 1, T - 1)], gain, 0.35, 0.55, None))
    W, series = lives.decoder, []
    for k, step in enumerate(steps):
        counts = np.bincount(lives.kind[:, k], minlength=4)
        values = {name: counts[i] / (len(lives.kind) if name == "dead" else max(counts[:3].sum(), 1)) for i, name in enumerate(KINDS)}
        if k:
            values["drift"] = float(1 - np.einsum("fd,fd->f", W[:, k], W[:, k - 1]).mean())
        series += [(step, name, v, v - 0.01 - 0.005 * rng.random(), v + 0.01) for name, v in values.items()]
    return {
        "phases": pd.DataFrame(
            rows, columns=["axis", "boundary", "at_step", "low", "high", "gain", "gain_shuffled", "gain_trend", "reason"]
        ),
        "series": pd.DataFrame(series, columns=["step", "series", "value", "low", "high"]),
    }


def _umap(lives: Lives, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    T = len(lives.steps)
    chosen = [int(i) for code in (TOKEN, CONCEPT, NOISE) for i in np.flatnonzero(lives.kind[:, -1] == code)[:2]]
    rows = []
    for fit in ("apart", "aligned"):
        for k in sorted({0, T // 4, T // 2, 3 * T // 4, T - 1}):
            for n, feature in enumerate([*chosen, -1]):
                count = DATAPOINTS if feature >= 0 else 100
                spread = 4.0 if feature < 0 else 0.4 + 4 * (1 - k / (T - 1))
                middle = np.zeros(2) if feature < 0 else 6 * k / (T - 1) * np.array([np.cos(n), np.sin(n)])
                uv = middle + rng.normal(0, spread, (count, 2))
                where = rng.integers(0, ROWS, count), rng.integers(1, CONTEXT, count)
                rows.append(
                    pd.DataFrame(
                        {
                            "fit": fit,
                            "step": lives.steps[k],
                            "feature": feature,
                            "row": where[0],
                            "position": where[1],
                            "u": uv[:, 0],
                            "v": uv[:, 1],
                        }
                    )
                )
    kinds = [KINDS[lives.kind[i, -1]] for i in chosen]
    features = pd.DataFrame({"feature": chosen, "kind": kinds, "why": "largest final M of its kind"})
    return {"umap": pd.concat(rows, ignore_index=True), "features": features}


def _efficiency_spec(store: Store, points: tuple[Point, ...], nodes: dict[str, Ref]) -> EfficiencySpec:
    rows, T = [], len(points)
    for k, point in enumerate(points):
        hows = ["chained", *(("scratch_full", "scratch_short") if k in (0, T // 2, T - 1) else ())]
        for how in hows:
            quality = QualitySpec(
                dictionary=point.dictionary, model=ModelSource(digest=how), data=ActivationData(base=point.probe, rows=ROWS), rows=16
            )
            nodes[f"quality-{how}-{point.step}"] = commit(store, quality)
            tokens = 4_000_000 if how == "scratch_full" or k == 0 else 200_000
            rows.append(
                EfficiencyRow(
                    step=point.step, how=how, tokens=tokens, dictionary=point.dictionary, statistics=point.statistics, quality=quality.ref
                )
            )
    return EfficiencySpec(rows=tuple(rows))


def _efficiency(spec: EfficiencySpec, rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    chained = sorted({r.step for r in spec.rows})
    base = {"chained": 0.86, "scratch_full": 0.88, "scratch_short": 0.7}
    rows = []
    for r in spec.rows:
        ev = base[r.how] + 0.01 * rng.normal() - 0.05 * chained.index(r.step) / len(chained)
        scale = 1 / (1 + 0.1 * chained.index(r.step))
        rows.append((r.step, r.how, r.tokens, ev, 20 + rng.normal(), 0.03 + 0.01 * rng.random(), ev + 0.08, scale, 0))
    names = ["step", "how", "tokens", "explained_variance", "l0", "dead", "loss_recovered", "input_scale", "revived"]
    quality = pd.DataFrame(rows, columns=names)
    own = quality[quality.how == "chained"].set_index("step")
    compared = []
    for r in quality[quality.how != "chained"].itertuples():
        mine = own.loc[r.step]
        gaps = mine.explained_variance - r.explained_variance, mine.loss_recovered - r.loss_recovered
        compared.append((r.step, r.how, mine.explained_variance, r.explained_variance, *gaps))
    columns = ["step", "how", "ev_chained", "ev_other", "ev_gap", "loss_recovered_gap"]
    return {"quality": quality, "compared": pd.DataFrame(compared, columns=columns)}
