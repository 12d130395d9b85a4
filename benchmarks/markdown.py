"""Tables and phrases of the pages in ``docs/evidence``."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.records import Row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are set to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(rows: Sequence[Row]) -> str:
    """Name the machines, the software and the versions that the rows come from."""
    columns = ("machine", "software")
    found = [" and ".join(dict.fromkeys(row[column] for row in rows if row[column])) for column in columns]
    return f"Measured on {found[0]}; {found[1]}."


def number(value: float, digits: int) -> str:
    """Return a number with so many digits after the point, three in all from a million on, nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def plural(number: int, noun: str) -> str:
    """Return a number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def range_text(values: Sequence[float], digits: int) -> str:
    """Return the smallest and the largest of numbers, or the one that they all are."""
    if not values:
        return ""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def yes(value: bool) -> str:
    """Return the word for a truth value."""
    return "yes" if value else "no"
