"""What labelling will cost: time, tokens, and money where the settings give prices; before the run from the specs, in it from the texts themselves."""

from collections.abc import Collection

from stagediff.diff.spec import Cut, DiffSpec
from stagediff.estimate import Estimate
from stagediff.evidence.labels.labeller import Question
from stagediff.evidence.labels.prompt import ANSWER_TOKENS, instructions, question_text, tokens_of
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.lm.estimate import activation_shape, spec_of
from stagediff.plan import Plan
from stagediff.sae.estimate import features_of

__all__ = ["cost_of", "estimate"]

SECONDS_PER_ANSWER = 3.0
CHARACTERS_PER_EXCERPT = 30
"""Around an excerpt in the question."""
CHARACTERS_PER_TOKEN = 3.5
BORN_SHARE = 0.05
"""Of the dictionary, for the estimate alone."""


def estimate(spec: LabelsSpec, plan: Plan) -> Estimate:
    """Before anything is known of the features: as many as the settings and the cut allow."""
    diff = spec_of(spec.diff, plan)
    assert isinstance(diff, DiffSpec)
    features = features_of(diff.dictionaries["F_D"], plan)
    asked = min(features, min(spec.most, _selected(diff.cut, features)) + min(spec.most, round(BORN_SHARE * features)) + spec.random)
    shown = asked * spec.examples * spec.window
    tokens, d, _ = activation_shape(spec_of(spec.statistics, plan).data, plan)
    reading = 2.0 + 2e-9 * tokens * d * (1 + asked // 256) + 2e-6 * shown
    if spec.model is None:
        return Estimate(bytes=200 * asked + 4 * asked * spec.examples, seconds=reading + 3e-7 * shown * len(spec.topics))
    longest = max(spec.window, spec.grow_to or 0)
    per_question = tokens_of(instructions(spec.topics)) + round(
        spec.examples * (CHARACTERS_PER_EXCERPT / CHARACTERS_PER_TOKEN + 1.1 * longest)
    )
    return Estimate(
        bytes=1500 * asked,
        seconds=reading + SECONDS_PER_ANSWER * asked / spec.requests.parallel,
        note=_said(spec, asked, asked * per_question, "up to "),
    )


def cost_of(spec: LabelsSpec, questions: Collection[Question], count: int) -> str:
    """In words, what `count` questions like these cost."""
    each = sum(tokens_of(question_text(q)) for q in questions) / max(len(questions), 1) + tokens_of(instructions(spec.topics))
    return _said(spec, count, round(count * each), "about ")


def _said(spec: LabelsSpec, count: int, tokens: int, about: str) -> str:
    answers = count * ANSWER_TOKENS
    text = f"{about}{count:,} questions to {spec.model.name if spec.model else spec.labeller}, {tokens:,} tokens in and {answers:,} out"
    if prices := spec.requests.prices:
        money = (tokens * prices.input + answers * prices.output) / 1e6
        return f"{text}: {about}{money:,.2f} {prices.currency}"
    return f"{text} (labels.prices would make it money)" if spec.model else text


def _selected(cut: Cut, features: int) -> int:
    """How many features a cut may select: known for a quantile alone."""
    return max(1, round(cut.value * features)) if cut.kind == "quantile" else features
