"""The plain sentence about a feature, made by rules: what is shown, what was looked for and not shown, what cannot be told, what was not measured.

Every claim stands with its number and with its control in brackets; a number without a control makes no claim. What was not measured is always said, with
the reason.
"""

from collections.abc import Sequence
from typing import Any

from stagediff.evidence.verdict.criteria import CLAIMS, NO, NOT_MEASURED, OPEN, YES
from stagediff.markup import number

__all__ = ["cost", "detail", "percent", "points", "sentence"]

CLAIM = {
    "moved": ("moved", "have moved", " farther on both paths than retraining alone moves it"),
    "newer": ("has", "have", " directions newer than retraining alone makes"),
    "carries": ("fires", "fire", " most strongly on new rows"),
    "flagged": ("is", "be", " related to {topic}, as the labeller says"),
    "steers": ("brings", "bring", " the {measure} more often than random features when added"),
    "removes": ("makes", "make", " the {keyword} rarer when it alone is clamped"),
}
"""Claim -> verb, infinitive, and the rest."""
NOUN = {
    "moved": "its move against retraining",
    "newer": "its novelty against retraining",
    "carries": "on which rows it fires",
    "flagged": "its label",
    "steers": "what adding it does",
    "removes": "what its removal takes away and costs",
}


def sentence(row: dict[str, Any], control: dict[str, Any]) -> str:
    """Parameters: row: a feature's columns (`compute.COLUMNS`, with the outcomes); control: the figures of the controls (`parts`)."""
    groups = {outcome: [claim for claim in CLAIMS if row[claim] == outcome] for outcome in (YES, NO, OPEN, NOT_MEASURED)}
    name = f"Feature {row['feature']}"
    if groups[YES]:
        said = [f"{name} {_listed([_claim(c, 0, row, control) for c in groups[YES]], 'and')}."]
    else:
        said = [f"Nothing is shown of feature {row['feature']} beyond what its controls show."]
    if groups[NO]:
        said.append(f"It was not shown to {_listed([_claim(c, 1, row, control) for c in groups[NO]], 'or')}.")
    if groups[OPEN]:
        said.append(f"Too little was measured to tell whether it {_listed([_claim(c, 0, row, control) for c in groups[OPEN]], 'or')}.")
    if groups[NOT_MEASURED]:
        said.append(f"Not measured: {'; '.join(_missing(groups[NOT_MEASURED], row, control))}.")
    return " ".join(said)


def detail(claim: str, row: dict[str, Any], control: dict[str, Any]) -> str:
    """The numbers of a claim and those of its control, in a few words."""
    return _DETAILS[claim](row, control)


def percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def points(value: float) -> str:
    """A difference of shares."""
    return f"{100 * value:+.3g}" if round(value, 6) else "0"


def cost(value: float) -> str:
    """Nats of clean loss."""
    return f"{round(value, 4) + 0.0:+.4f} nats"


def _claim(claim: str, form: int, row: dict[str, Any], control: dict[str, Any]) -> str:
    rest = CLAIM[claim][2].format(measure=control["steer_measure"], keyword=control["ablate_keyword_name"], topic=row["topic"] or "a topic")
    return f"{CLAIM[claim][form]}{rest} ({detail(claim, row, control)})"


def _moved(row: dict[str, Any], control: dict[str, Any]) -> str:
    return f"q {_small(row['q'])}, p {_small(row['p'])}, at least {_small(1 / (1 + control['null_values']))} with {number(control['null_values'])} null values"


def _newer(row: dict[str, Any], control: dict[str, Any]) -> str:
    least = 1 / (1 + control["null_novelties"])
    return f"q {_small(row['pair_q'])}, p {_small(row['pair_p'])}, at least {_small(least)} with {number(control['null_novelties'])} null values"


def _carries(row: dict[str, Any], control: dict[str, Any]) -> str:
    return f"{percent(row['new_top'])} of its top examples; {_as_many(row['new_top_p'], control['new_random'])}"


def _flagged(row: dict[str, Any], control: dict[str, Any]) -> str:
    return f"{row['examples_flagged']} of {row['examples']} examples; {_as_many(row['label_p'], control['label_random'])}"


def _steers(row: dict[str, Any], control: dict[str, Any]) -> str:
    return (
        f"in {percent(row['steer_rate'])} of answers at strength {row['steer_strength']:g}, {points(row['steer_effect'])} points, 95 % interval "
        f"{points(row['steer_low'])} to {points(row['steer_high'])}; {control['steer_random_above']} of {control['steer_random']} random features do so"
    )


def _removes(row: dict[str, Any], control: dict[str, Any]) -> str:
    left = f"in {percent(row['ablate_keyword'])} of answers, untouched {percent(control['ablate_untouched_keyword'])}"
    price = f"clean loss {cost(row['ablate_cost'])}"
    if control["ablate_random_size"] is None:
        return f"{left}; no random features were clamped to compare with; {price}"
    lowest = f"{percent(control['ablate_random_keyword'])} or more with {control['ablate_random_size']} random features clamped"
    return f"{left}, {lowest}: p {_small(row['ablate_p'])}; {price}, those {cost(control['ablate_random_cost'])}"


_DETAILS = {"moved": _moved, "newer": _newer, "carries": _carries, "flagged": _flagged, "steers": _steers, "removes": _removes}


def _missing(claims: Sequence[str], row: dict[str, Any], control: dict[str, Any]) -> list[str]:
    """What was not measured, each with the reason."""
    if control["null_values"] is None and "moved" in claims and "newer" in claims:
        by_pairs = f" and {number(row['rank_pair'])} of {number(control['pairs'])} pairs by paired novelty" if row["rank_pair"] else ""
        rank = f"it ranks {number(row['rank_score'])} of {number(control['alive'])} by x + y{by_pairs}, which is no test"
        return [
            f"its move and its novelty against retraining (no retrain null was run; {rank})",
            *(_lack(c, row, control) for c in claims[2:]),
        ]
    return [_lack(c, row, control) for c in claims]


def _lack(claim: str, row: dict[str, Any], control: dict[str, Any]) -> str:
    return f"{NOUN[claim]} ({_why_not(claim, row, control)})"


def _why_not(claim: str, row: dict[str, Any], control: dict[str, Any]) -> str:
    if claim == "moved":
        return "it is not alive in all stages of the null"
    if claim == "newer":
        if control["pairs"] is None:
            return "the paths were not aligned"
        return "no latent of F via M matches it" if row["rank_pair"] == 0 else "the align step was given no retrain null"
    if claim == "carries":
        return "it has no examples on held-out rows"
    if claim == "flagged":
        if control["labeller"] is None:
            return "no labeller was asked"
        return "the labeller gave no clear answer" if row["unclear"] else "the labeller was not asked about it"
    step, part = ("steer", "steering") if claim == "steers" else ("ablate", "ablation")
    if control[f"{step}_candidates"] is None:
        return f"the run has no {part}"
    return f"it is not among the {control[f'{step}_candidates']} candidates"


def _as_many(p: float, random: int) -> str:
    count = round(p * (1 + random)) - 1
    return f"as many in {count} of {number(random)} random features"


def _small(value: float) -> str:
    return number(float(value), 2)


def _listed(parts: Sequence[str], word: str) -> str:
    *most, last = parts
    return f"{', '.join(most)} {word} {last}" if most else last
