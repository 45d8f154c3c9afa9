"""The report's part about aligned scores."""

import re

import numpy as np
import pytest
from PIL import Image

from stagediff.diff.section.aligned import FOREMOST, section
from stagediff.diff.section.aligned_figure import figure_files
from stagediff.sections import ReportContext


@pytest.fixture
def said(made, builder, monkeypatch):
    """The section, with examples made up."""
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    return section(ReportContext(made.store, made.spec.nodes, made.spec.config, 10, 0))


def test_the_foremost_pairs_are_listed_with_both_scores_and_an_example(made, said):
    table = made.store.artifact(made.spec.nodes["align"]).read_table("features.parquet")
    found = table[table.partner >= 0].sort_values(["pair_novelty", "feature"]).head(FOREMOST)
    rows = re.findall(r'<tr><th scope="row">(\d+) · (\d+)</th><td>(.*?)</td>(.*?)</tr>', said.html)
    assert [(int(a), int(b)) for a, b, *_ in rows] == list(zip(found.feature, found.partner, strict=True))
    for row, (_, _, example, numbers) in zip(found.itertuples(), rows, strict=True):
        assert f"I{row.feature}" in example
        assert f">{row.pair_novelty:.3f}<" in numbers
        assert f">{row.score:.3f}<" in numbers


def test_texts_of_a_corpus_are_escaped(said):
    assert "<img" not in said.html
    assert "<script" not in said.html


def test_births_that_have_not_saturated_are_warned_of(said):
    assert "Births have not saturated" in said.html
    assert "85.7 %" in said.html
    assert "22.2 %" in said.html  # same index


def test_both_kinds_of_score_stand_in_one_table(said):
    for name in ("paired novelty (matched, no labels)", "x + y by index (published)", "paired novelty × contrast"):
        assert name in said.html


def test_the_page_holds_the_pairs_novelty_beside_the_published_score(made):
    assert '"pair_novelty":{"as":"linear"' in made.html
    assert 'id="aligned"' in made.html


def test_the_figure_is_deterministic_and_shows_what_carries_the_new_data(made, tmp_path):
    align = made.store.artifact(made.spec.nodes["align"]).read_table("features.parquet")
    one, again = (figure_files(align, made.table[["alive", "new_top"]]) for _ in range(2))
    assert one == again
    assert b"latents matched by direction" in one["aligned.svg"]
    (tmp_path / "a.png").write_bytes(one["aligned.png"])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - [0xD1, 0x49, 0x5B]).max(1) < 60).sum() > 200


def test_a_run_without_aligned_scores_has_no_such_part(made):
    nodes = {name: ref for name, ref in made.spec.nodes.items() if name != "align"}
    assert section(ReportContext(made.store, nodes, made.spec.config, 10, 0)) is None
