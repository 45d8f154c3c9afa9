"""How numbers, sizes, times, JSON and YAML are printed."""

import json
from typing import Any

__all__ = ["count", "indent", "print_json", "seconds", "size"]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def count(n: int | None) -> str:
    return "" if n is None else f"{n:,}"


def size(n: float | None) -> str:
    """Bytes in binary units."""
    if n is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def seconds(s: float | None) -> str:
    if s is None:
        return ""
    if s < 90:
        return f"{s:.0f} s"
    return f"{s / 60:.0f} min" if s < 5400 else f"{s / 3600:.1f} h"


def indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
