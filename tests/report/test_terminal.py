"""The terminal's summary and feature card."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from stagediff.errors import UserError
from stagediff.plan import Node, Plan
from stagediff.report.terminal import clean, feature_card, shaded, summary


def printed(renderable, width: int = 120, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(renderable)
    return out.getvalue()


def test_the_summary_says_what_was_made_where_and_what_was_found(made):
    nodes = [Node(name, made.store.artifact(ref).spec()) for name, ref in made.spec.nodes.items()]
    text = printed(summary(made.store, Plan("demo", [*nodes, Node("report", made.spec)])), width=300)
    assert made.store.root in text
    assert f"{made.ref}/index.html" in text
    assert "99.6 % with the trigger, 0.4 % without" in text
    lowest = made.table[made.table.selected].sort_values("score").iloc[0]
    assert f"{lowest.score:.3f}" in text
    assert f" I{int(lowest.feature)}" in text  # its strongest token


def test_the_summary_of_an_unfinished_run_shows_what_there_is(made):
    spec = made.store.artifact(made.spec.nodes["diff"]).spec()
    unfinished = made.spec.model_copy(update={"title": "not yet"})
    text = printed(summary(made.store, Plan("half", [Node("diff", spec), Node("report", unfinished)])))
    assert "alive features" in text
    assert "index.html" not in text


def test_the_summary_needs_neither_torch_nor_pandas():
    code = "import sys, stagediff.report.terminal as t; print(sorted({'torch', 'pandas', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_card_shows_one_feature(made, builder, monkeypatch):
    monkeypatch.setattr("stagediff.sae.examples.feature_examples", builder.fake_examples)
    diff = made.store.artifact(made.spec.nodes["diff"])
    row = made.table[made.table.selected].iloc[0]
    text = printed(feature_card(made.store, diff.ref, diff.spec().statistics, int(row.feature)))
    assert f"Feature {int(row.feature)}" in text
    assert "selected" in text
    for name in ("x", "y", "cos_s_d", "cos_f_f"):
        assert f"{row[name]:.3f}" in text
    assert text.count("token 60") == 8


def test_an_unknown_feature_is_refused(made):
    diff = made.store.artifact(made.spec.nodes["diff"])
    with pytest.raises(UserError, match="0 to 1023"):
        feature_card(made.store, diff.ref, diff.spec().statistics, 1024)


def test_control_characters_of_a_corpus_never_reach_the_terminal():
    assert clean("a\x1b[31mb\u202ec\x07\n\t") == "a·[31mb·c·↵⇥"
    text = printed(shaded(["[red]x[/red]", "\x1b[2J"], [0.0, 1.0]), force_terminal=False)
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
