"""Small pieces of HTML for report sections. Everything that comes from outside (names, configs, corpora) passes through `escape`."""

import math
from collections.abc import Iterable, Sequence
from html import escape as _escape
from typing import Any

__all__ = ["escape", "facts", "number", "table"]


def escape(value: Any) -> str:
    """Text that can stand between tags and in quoted attributes."""
    return _escape(str(value), quote=True)


def number(value: Any, digits: int = 3) -> str:
    """A value as a reader wants it: thousands grouped, `digits` significant digits, a dash for None and NaN. Not escaped: numbers only."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if isinstance(value, float):
        size = abs(value)
        if size != 0 and (size < 1e-3 or size >= 1e7):
            mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
            return f"{mantissa}e{int(exponent)}"
        if size >= 10**digits:
            return f"{value:,.0f}"
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}" if size >= 1e-3 else "0"
    return str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", text_columns: int = 1) -> str:
    """A static table; numbers are formatted and aligned right, the first `text_columns` columns are text. Wide tables scroll inside their box."""
    head_cells = "".join(f'<th scope="col"{_align(i, text_columns)}>{escape(h)}</th>' for i, h in enumerate(head))
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            shown = escape(cell if isinstance(cell, str) else number(cell))
            cells.append(f'<th scope="row">{shown}</th>' if i == 0 else f"<td{_align(i, text_columns)}>{shown}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or head[0])}"><table class="plain">{title}'
        f"<thead><tr>{head_cells}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """Large key figures in a row: (figure, what it is, a short note)."""
    cells = "".join(
        f'<div class="fact"><dt>{escape(what)}</dt><dd>{escape(figure)}</dd><dd class="note">{escape(note)}</dd></div>'
        for figure, what, note in pairs
    )
    return f'<dl class="facts">{cells}</dl>'


def _align(i: int, text_columns: int) -> str:
    return "" if i < text_columns else ' class="n"'
