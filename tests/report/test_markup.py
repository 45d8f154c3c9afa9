"""Numbers and tables as readers see them."""

import pytest

from stagediff.markup import escape, facts, number, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (0.98765, "0.988"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (0.00001234, "1.23e-5"),
        (0.0, "0"),
        (1.0, "1.00"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "yes"),
        (-0.5, "-0.500"),
        (2000.0, "2,000"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_tables_and_facts_escape_every_text():
    html = table(("<a>",), [["<b>", 3]], caption="<c>") + facts([("<d>", "<e>", "<f>")]) + escape("\"'<&")
    assert not any(f"<{letter}>" in html for letter in "abcdef")
    assert "&lt;b&gt;" in html
    assert '<td class="n">3</td>' in html
