"""The report's parts about labels, on a made-up diff, and the terminal's card of one feature."""

import io
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from stagediff import steps
from stagediff.diff.spec import STAGES
from stagediff.evidence.labels.section import named_features, section
from stagediff.evidence.labels.section.distributions import HEIGHT, LOWEST, WIDTH, outline, read_panels
from stagediff.evidence.labels.section.scatter import scatter_files, scatter_html
from stagediff.evidence.labels.section.words import named_html
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.report.terminal import feature_card
from stagediff.sections import ReportContext
from stagediff.store import Store


@pytest.fixture(scope="module")
def labelled(written, builder, tmp_path_factory):
    """A diff with histograms in every stage, labelled by keywords, and its sections: store, nodes, table (the diff's), labels, context, sections."""
    folder, nodes, config = written
    store = Store(str(shutil.copytree(folder, tmp_path_factory.mktemp("labelled") / "store")))
    rng = np.random.default_rng(3)
    diff = store.artifact(nodes["diff"]).spec()
    for stage in STAGES:
        store_histogram(store, diff.statistics[stage], rng)
    refs = {"diff": nodes["diff"], "statistics": nodes["statistics-F_D"]}
    spec = LabelsSpec(**refs, topics=("import",), share=0.8, random=60, most=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
        nodes = {**nodes, "labels": steps.run(spec, store, device="cpu")}
        context = ReportContext(store, nodes, config, 10, 0)
        sections = section(context)
    labels = store.artifact(spec.ref).read_table("labels.parquet")
    table = store.artifact(nodes["diff"]).read_table("features.parquet")
    return SimpleNamespace(store=store, nodes=nodes, table=table, labels=labels, context=context, sections=sections)


def store_histogram(store, ref, rng) -> None:
    """Puts a full statistics artifact in the place of the builder's, which holds histograms of F via D only."""
    spec = store.artifact(ref).spec()
    store.remove(ref)
    feature = np.repeat(np.arange(256, dtype=np.int32), 5)
    table = pd.DataFrame({"feature": feature, "bin": np.tile(np.arange(30, 35, dtype=np.int16), 256)})
    table = table.assign(base=rng.integers(0, 50, len(table)), new=rng.integers(0, 20, len(table)))
    with store.write(spec) as writer:
        writer.write_table("histogram.parquet", table)
        writer.write_json("histogram.json", {"edges": np.geomspace(1e-3, 1e3, 65).tolist()})
        writer.commit(
            figures={"tokens_base": 4000, "tokens_new": 500, "explained_variance": 0.8, "l0": 9.0, "dead_share": 0.0}, numerics={}
        )


def test_a_run_without_labels_has_no_such_part(run):
    assert section(ReportContext(run.store, run.nodes, run.config, 10, 0)) is None


def test_shares_stand_in_words_and_in_the_figure(labelled):
    html = labelled.sections[0].html
    for group in ("selected", "random"):
        members = labelled.labels[labelled.labels[group]]
        assert html.count(f"{members.flagged.sum()} of {len(members)}") >= 2
    assert "Fisher" in html


def test_named_features_are_numbered_alike_in_table_and_scatter(labelled):
    html = labelled.sections[0].html
    expected = labelled.table[labelled.table.selected].sort_values(["score", "feature"]).feature.tolist()[:20]
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>(\d+)</td><td>(\w+)</td>', html)
    assert [(int(n), int(f)) for n, f, group in rows if group == "selected"] == list(enumerate(expected, 1))
    drawn = re.findall(r'<circle class="([\w-]+)"[^>]*><title>feature (\d+):', html)
    numbers = re.findall(r'class="ink number"[^>]*>(\d+)<', html)
    assert [int(n) for n in numbers] == list(range(1, len(rows) + 1))
    flagged = set(labelled.labels[labelled.labels.flagged].feature)
    assert {int(f) for kind, f in drawn if kind in ("c-flagged", "c-other")} == flagged
    assert {int(f) for kind, f in drawn if kind == "c-plain"} == {int(f) for _, f, _ in rows} - flagged


def test_texts_of_corpus_and_labeller_stay_text(labelled):
    labels = labelled.labels.assign(label="<script>window.hacked=1</script>")
    named = named_features(labels, labelled.table)
    figures = labelled.store.artifact(labelled.nodes["labels"]).manifest.figures
    for html in (scatter_html(labelled.table, labels, named), named_html(named, {}, figures), *(s.html for s in labelled.sections)):
        assert "<script" not in html
        assert "<img" not in html


def test_panels_are_the_statistics_counts_over_their_rows_tokens(labelled):
    diff = labelled.store.artifact(labelled.nodes["diff"]).spec()
    features = np.array([200, 3, 77])
    panels = read_panels(labelled.context, diff, features)
    assert list(panels) == list(STAGES)
    for stage in STAGES:
        table = labelled.store.artifact(diff.statistics[stage]).read_table("histogram.parquet")
        for i, f in enumerate(features):
            rows = table[table.feature == f]
            for k, (name, tokens) in enumerate((("base", 4000), ("new", 500))):
                expected = np.zeros(64)
                expected[rows.bin] = rows[name] / tokens
                np.testing.assert_allclose(panels[stage].shares[k, i], expected)


def test_an_outline_is_as_high_as_the_share_on_a_log_scale():
    path = outline(np.array([0.0, 1.0, LOWEST**0.5, LOWEST / 10]))
    tops = [float(v) for v in re.findall(r"V([\d.]+)H", path)]
    assert tops == [HEIGHT, 0, HEIGHT / 2, HEIGHT]
    assert [float(h) for h in re.findall(r"H([\d.]+)", path)] == [WIDTH / 4, WIDTH / 2, 3 * WIDTH / 4, WIDTH]
    assert outline(np.zeros(4)) == ""


def test_every_named_feature_has_a_panel_per_stage(labelled):
    distributions = labelled.sections[1].html
    named = named_features(labelled.labels, labelled.table)
    assert distributions.count("<svg") == len(named) * len(STAGES)
    for row in named.itertuples():
        assert f"<strong>{row.number}</strong> · feature {row.feature}" in distributions


def test_the_files_for_papers_are_deterministic_and_numbered(labelled):
    named = named_features(labelled.labels, labelled.table)
    one = scatter_files(labelled.table, labelled.labels, named)
    assert one == labelled.sections[0].figures
    assert set(one) == {"labels.svg", "labels.png"}
    assert all(f">{n}</text>".encode() in one["labels.svg"] for n in named.number)


def test_a_card_shows_what_the_labeller_said(labelled, builder, monkeypatch):
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    diff = labelled.store.artifact(labelled.nodes["diff"])
    row = labelled.labels[labelled.labels.flagged].iloc[0]
    out = io.StringIO()
    Console(file=out, width=160).print(feature_card(labelled.store, diff.ref, diff.spec().statistics, int(row.feature)))
    assert f"keywords: {row.label}  related to import, {row.examples_flagged} of 20 examples" in out.getvalue()
    other = int(next(f for f in labelled.table.feature if f not in set(labelled.labels.feature)))
    out = io.StringIO()
    Console(file=out, width=160).print(feature_card(labelled.store, diff.ref, diff.spec().statistics, other))
    assert "keywords" not in out.getvalue()
