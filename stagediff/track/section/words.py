"""The words of the report: what was followed and what was found, in sentences and key figures that follow from the tables."""

from typing import Any

import numpy as np

from stagediff.markup import escape, facts, number, table
from stagediff.track.section.overview import GAINS, HOWS
from stagediff.track.section.run import NONE, TrackRun
from stagediff.track.spec import KINDS, PATTERNS, FormationSpec, PhasesSpec

__all__ = ["cut_words", "efficiency_words", "formation_rule", "gains_html", "headline_html", "phase_words"]

KIND_WORDS = {"token": "token-level", "concept": "concept-level", "noise": "noise"}
AXIS_WORDS = {"index": "the checkpoints", "log_step": "the logarithm of the step", "step": "the step"}


def headline_html(run: TrackRun, parts: dict[str, Any]) -> str:
    """A few sentences and the key figures. `parts`: the overview."""
    sentences = [_followed(run), _kinds(run), _formation(run, parts), _drift(parts), _patterns(run)]
    text = "".join(f'<p class="lead">{s}</p>' for s in sentences if s)
    return text + facts(_facts(run, parts))


def phase_words(run: TrackRun, parts: dict[str, Any]) -> str:
    """Where the boundaries lie on each axis, and whether the axes agree."""
    part = parts.get("phases") or {}
    boundaries = part.get("boundaries")
    spec = run.artifacts["phases"].spec() if "phases" in run.artifacts else None
    if part.get("reason"):
        return f"What features were, and what they did, at every checkpoint. No phases were found: {escape(part['reason'])}."
    if not boundaries or not isinstance(spec, PhasesSpec):
        return "What features were, and what they did, at every checkpoint."
    told = [f"{AXIS_WORDS[axis]}: {', '.join(_boundary(run, b) for b in found)}" for axis in AXIS_WORDS if (found := boundaries.get(axis))]
    common = _common(boundaries)
    verdict = (
        f"{number(common) if common else 'None'} of the {max(len(b) for b in boundaries.values())} boundaries "
        f"{'lies' if common == 1 else 'lie'} at the same checkpoint, or within each other's intervals, on every axis."
        if len(boundaries) > 1
        else ""
    )
    return (
        f"Training was cut into {spec.rule.phases} phases where the shares of kinds and the drift change most. Boundaries by {'; by '.join(told)}. "
        f"{verdict} A boundary that appears on one axis only may come from how the checkpoints were spaced.{_are_phases(part.get('gains') or {})}"
    )


def gains_html(parts: dict[str, Any]) -> str:
    """A table of how much the phases explain on each axis; empty where that was not measured."""
    gains = (parts.get("phases") or {}).get("gains") or {}
    rows = [
        [AXIS_WORDS[axis], *(_percent(g[n]) if g.get(n) is not None else "–" for n in GAINS), "yes" if _is_above(g) else "no"]
        for axis in AXIS_WORDS
        if (g := gains.get(axis)) and g.get("gain") is not None
    ]
    head = ("Axis", "Explained by these phases", "Same values in random order, 95 % of times below", "By a steady change", "Above both")
    return table(head, rows, caption="Are there phases?") if rows else ""


def formation_rule(run: TrackRun) -> str:
    """The rule by which a feature counts as formed."""
    spec = run.artifacts["formation"].spec()
    assert isinstance(spec, FormationSpec)
    return (
        f"A feature has formed at the first checkpoint from which its M ({escape(run.measure.replace('_', ' '))}, strongest positions) stays at or above "
        f"{100 * spec.rule.share:g} % of its final value; one whose final M is below {spec.rule.smallest_m:g} never did. Shares are of all features "
        "of that kind at the end."
    )


def efficiency_words(run: TrackRun, part: dict[str, Any]) -> str:
    """Whether the following budget is enough, by the numbers."""
    quality, compared = part["quality"], part["compared"]
    text = "Quality of every checkpoint's dictionary on held-out rows. "
    if "chained" in quality:
        chained = quality["chained"]
        known = [v for v in chained["explained_variance"] if v is not None]
        if known:
            text += f"Along the chain explained variance lies between {min(known):.3f} and {max(known):.3f}. "
        short, first = min(chained["tokens"]), max(chained["tokens"])
        if short < first:
            text += f"A following dictionary gets {number(short)} training tokens, {_percent(short / first)} of the first one's {number(first)}. "
    for how, words in (("scratch_full", "from scratch with the first budget"), ("scratch_short", "from scratch with the following budget")):
        gaps = [r["ev_gap"] for r in compared if r["how"] == how and r["ev_gap"] is not None]
        if gaps:
            worst = min(gaps)
            verdict = "at least as much as" if worst >= 0 else f"up to {abs(worst):.3f} less than" if max(gaps) >= 0 else _less(gaps)
            checkpoints = _count(len(gaps), "checkpoint", "checkpoints")
            text += f"At the {checkpoints} compared, the chain explains {verdict} a dictionary trained {words}. "
    return text


def cut_words(run: TrackRun, curves: int, full: int, examples: int) -> str:
    """What the page leaves out, and how the rest was chosen."""
    if not run.features:
        return ""
    said = []
    if curves < run.features:
        said.append(f"curves of {number(curves)}")
    if full < run.features:
        said.append(f"all measures and paths of {number(full)}")
    said.append(f"examples and regions of {number(examples)}")
    rounded = "" if full == run.features else " Curves are rounded to one byte a number (0.7° for angles)."
    return (
        f"This page holds the table of all {number(run.features)} features, {' and '.join(said)}: those that stand out (largest final M of each kind, rare "
        f"patterns, largest drift after formation, shown in the UMAP) and a random sample.{rounded} Everything is in the run's tables (Lineage)."
    )


def _are_phases(gains: dict[str, dict[str, float | None]]) -> str:
    known = {axis: g for axis, g in gains.items() if g.get("gain") is not None and axis in AXIS_WORDS}
    if not known:
        return ""
    above = [AXIS_WORDS[axis] for axis in AXIS_WORDS if axis in known and _is_above(known[axis])]
    if not above:
        return (
            " On no axis do these phases explain more than the same values in random order and a steady change would: the cut is no evidence of "
            "phases."
        )
    where = "every axis" if len(above) == len(known) else "the axis of " + " and of ".join(above)
    return f" On {where} the phases explain more than the same values in random order and than a steady change would."


def _is_above(g: dict[str, float | None]) -> bool:
    gain = g.get("gain")
    return gain is not None and all(gain > other for n in GAINS[1:] if (other := g.get(n)) is not None)


def _followed(run: TrackRun) -> str:
    config = run.context.config.get("track") or run.context.config
    hook, steps = config.get("hook", {}), run.steps
    follow = {"forward": "from the first checkpoint on", "backward": "from the last checkpoint back"}.get(
        config.get("checkpoints", {}).get("direction", ""), "from checkpoint to checkpoint"
    )
    features = f" of {number(run.features)} features" if run.features else ""
    at = f" at <code>{escape(hook['site'])}</code> of layer {escape(hook['layer'])}" if "site" in hook and "layer" in hook else ""
    return (
        f"One dictionary{features}{at} of {escape(_model(config))} was carried along {number(len(steps))} checkpoints of its training, "
        f"steps {number(steps[0])} to {number(steps[-1])}, {follow}."
    )


def _kinds(run: TrackRun) -> str:
    if run.kind is None:
        return ""
    first, last = run.kind[:, 0], run.kind[:, -1]
    said = []
    for at, kinds in (("At the end", last), ("at the first checkpoint", first)):
        known = int((kinds < KINDS.index("dead")).sum())
        shares = ", ".join(f"{_percent((kinds == code).sum() / max(known, 1))} {KIND_WORDS[name]}" for code, name in enumerate(KINDS[:3]))
        said.append(f"{at} {number(known)} features are alive with a kind: {shares}")
    return f"{said[0]}; {said[1]}."


def _formation(run: TrackRun, parts: dict[str, Any]) -> str:
    formed = parts.get("formed")
    if not formed:
        return ""
    told = []
    for name in ("token", "concept", "all"):
        part = formed.get(name)
        if part and part["median"] is not None:
            told.append(
                f"{number(part['ever'])} of {number(part['features'])} {KIND_WORDS.get(name, '')} features have formed, half of these by step "
                f"{number(run.steps[part['median']])}".replace("  ", " ")
            )
    both = [formed[k]["median"] for k in ("token", "concept") if k in formed and formed[k]["median"] is not None]
    verdict = ""
    if len(both) == 2:
        verdict = {
            -1: " By their medians, token-level features form first.",
            0: " By their medians, both form at the same checkpoint.",
            1: " By their medians, concept-level features form first.",
        }[int(np.sign(both[0] - both[1]))]
    return f"{'; '.join(told)}.{verdict}" if told else ""


def _drift(parts: dict[str, Any]) -> str:
    part = (parts.get("turns") or {}).get("all")
    if not part or None in (part["before"][0], part["after"][0]):
        return ""
    before, after, null = (part[k][0] for k in ("before", "after", "null"))
    more = "keep turning as much as before" if _overlap(part["before"], part["after"]) else "turn less" if after < before else "turn more"
    text = f"After formation features {more}: median drift per checkpoint {number(before, 2)} before, {number(after, 2)} after"
    if null is None:
        return f"{text}. The run has no null to compare with.{_same_step(parts)}"
    beside = "more than" if after > part["null"][2] else "less than" if after < part["null"][1] else "as much as"
    return f"{text}; the latter is {beside} training alone makes of a model that stands still ({number(null, 2)}).{_same_step(parts)}"


def _same_step(parts: dict[str, Any]) -> str:
    """Late in training everything turns less, so before against after is not enough."""
    mean, low, high = (parts.get("same_step") or {}).get("mean") or [None] * 3
    if mean is None or low is None or high is None:
        return ""
    verdict = "turn less than" if high < 0 else "turn more than" if low > 0 else "turn as much as"
    return (
        f" At the same checkpoint, features that have formed {verdict} those that form later "
        f"(difference {number(mean, 2)}, 90 % interval {number(low, 2)} to {number(high, 2)})."
    ).replace("-", "−")


def _patterns(run: TrackRun) -> str:
    if run.pattern is None:
        return ""
    ever = {name: int((run.pattern == code).any(1).sum()) for code, name in enumerate(PATTERNS)}
    seen = run.pattern[run.pattern != NONE]
    steady = float((seen == PATTERNS.index("maintaining")).mean()) if seen.size else 0.0
    merges = run.table("patterns", "merges", ["feature"])
    merged = f", and {number(int(merges['feature'].nunique()))} merged with another" if merges is not None and len(merges) else ""
    return (
        f"Between neighbouring checkpoints features maintain what they are in {_percent(steady)} of cases. {number(ever['grouping'])} came out of noise "
        f"at least once, {number(ever['token_to_token'])} changed their token, {number(ever['token_to_concept'])} went from token to concept and "
        f"{number(ever['concept_to_token'])} back{merged}."
    )


def _facts(run: TrackRun, parts: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(number(len(run.steps)), "checkpoints", f"steps {number(run.steps[0])} to {number(run.steps[-1])}")]
    if run.kind is not None:
        last = run.kind[:, -1]
        rows.append(
            (number(int((last < KINDS.index("dead")).sum())), "features alive with a kind at the end", f"of {number(run.features)}")
        )
        rows.append(
            (
                number(int((last == KINDS.index("concept")).sum())),
                "concept-level at the end",
                f"token-level {number(int((last == 0).sum()))}",
            )
        )
    formed = parts.get("formed")
    if formed:
        ever, total = sum(p["ever"] for p in formed.values()), sum(p["features"] for p in formed.values())
        rows.append(
            (_percent(ever / max(total, 1)), "of features with a kind at the end have formed", f"{number(ever)} of {number(total)}")
        )
    quality = (parts.get("efficiency") or {}).get("quality", {})
    if quality.get("chained"):
        ev = quality["chained"]["explained_variance"][-1]
        beside = [f"from scratch {number(quality[h]['explained_variance'][-1])}" for h in HOWS[1:2] if h in quality]
        rows.append((number(ev), "explained variance at the last checkpoint", beside[0] if beside else "chained"))
    if run.cos_previous is not None and run.features:
        both = run.alive[:, -1] & run.alive[:, -2]
        if both.any():
            stays = float(np.nanmedian(run.cos_previous[both, -1]))
            null = (parts.get("null") or {}).get("previous", [None] * 3)[1]
            rows.append(
                (f"{stays:.3f}", "median cosine of the last two checkpoints", f"null {null:.3f}" if null is not None else "no null")
            )
    return rows


def _model(config: dict[str, Any]) -> str:
    model = config.get("model") or {}
    if model.get("name"):
        return str(model["name"])
    shape = (model.get("organism") or {}).get("architecture", {})
    return (
        f"a language model made here ({shape.get('layers', '?')} layers of width {shape.get('width', '?')})" if model else "a planted world"
    )


def _boundary(run: TrackRun, b: dict[str, Any]) -> str:
    inner = f" ({number(run.steps[b['low']])} to {number(run.steps[b['high']])})" if b["low"] is not None and b["high"] is not None else ""
    return f"step {number(run.steps[b['at']])}{inner}"


def _common(boundaries: dict[str, list[dict[str, Any]]]) -> int:
    """How many boundaries every axis has, in its own interval or at the same checkpoint."""
    axes = list(boundaries.values())
    return sum(all(i < len(other) and _near(b, other[i]) for other in axes[1:]) for i, b in enumerate(axes[0]))


def _near(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["at"] == b["at"]:
        return True
    known = None not in (a["low"], a["high"], b["low"], b["high"])
    return known and a["low"] <= b["at"] <= a["high"] and b["low"] <= a["at"] <= b["high"]


def _overlap(a: list[float | None], b: list[float | None]) -> bool:
    if None in (*a[1:], *b[1:]):
        return False
    return a[1] <= b[2] and b[1] <= a[2]  # type: ignore[operator]


def _less(gaps: list[float]) -> str:
    return f"between {abs(max(gaps)):.3f} and {abs(min(gaps)):.3f} less than"


def _count(n: int, one: str, many: str) -> str:
    return f"{number(n)} {one if n == 1 else many}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
