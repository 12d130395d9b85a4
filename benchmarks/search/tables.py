"""The tables of ``docs/evidence/search.md``: the share of planted modes that is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from benchmarks.markdown import about, table
from benchmarks.records import Row
from benchmarks.search.planted import SUMS
from benchmarks.search.running import WIDTHS

MARGINS = {"mass": (0.1, 0.3, 0.5, 0.7, 0.9), "distance": (2.0, 4.0, 6.0, 8.0, 10.0)}
TITLES = {
    "none": "No sum that can be seen (`torch.where(a > b, a, b)` of two log densities)",
    "by hand": "A sum by hand, in four forms (such as `m + torch.log(torch.exp(a - m) + torch.exp(b - m))`)",
    "logsumexp": "`torch.logsumexp`",
}
Mode = dict[str, float]


def modes_of(rows: Sequence[Row]) -> list[Mode]:
    """Return the planted modes of some rows, each with its mass, its distance, and whether it was found."""
    return [
        {"mass": float(mass), "distance": float(distance), "found": float(found)}
        for row in rows
        for mass, distance, found in zip(*(row[name].split() for name in ("masses", "distances", "found")), strict=True)
    ]


def share(modes: Sequence[Mode]) -> str:
    """Return the share that was found, in percent; nothing where there is none."""
    return f"{100.0 * sum(mode['found'] for mode in modes) / len(modes):.0f}" if modes else ""


def newest(rows: Sequence[Row]) -> list[Row]:
    """Return the last row of each block, of any version, without those of an error."""
    kept = {tuple(row[name] for name in ("way", "sum", "dim", "width", "block")): row for row in rows}
    return [row for row in kept.values() if not row["error"]]


def section(rows: Sequence[Row]) -> str:
    """Return the section of the page."""
    rows = newest(rows)
    searched = [row for row in rows if row["way"] == "search"]
    counts = sorted({len(modes_of(cell)) for cell in _cells(searched)})
    each = " to ".join(str(count) for count in (counts[:1] + counts[1:][-1:]))
    text = (
        f"Share of planted modes that the search finds, in percent, of {each} in each cell. "
        f"{about(rows)} pyro_flows {', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    parts = [text]
    for kind, title in TITLES.items():
        own = [row for row in searched if row["sum"] == kind]
        parts += [f"**{title}.**", table(["dimensions", *(f"width {width}" for width in WIDTHS)], _by_width(own))]
    hidden = [row for row in searched if row["sum"] == "none"]
    for name, edges in MARGINS.items():
        parts += [f"**No sum, by {name} of the second mode.**", _margin(hidden, name, edges)]
    parts.append(_fits(rows))
    return "\n\n".join(part for part in parts if part)


def _dims(rows: Sequence[Row]) -> list[str]:
    return sorted({row["dim"] for row in rows}, key=int)


def _cells(rows: Sequence[Row]) -> list[list[Row]]:
    keys = dict.fromkeys((row["sum"], row["dim"], row["width"]) for row in rows)
    return [[row for row in rows if (row["sum"], row["dim"], row["width"]) == key] for key in keys]


def _by_width(rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            dim,
            *(share(modes_of([row for row in rows if (row["dim"], row["width"]) == (dim, width)])) for width in WIDTHS),
        ]
        for dim in _dims(rows)
    ]


def _margin(rows: Sequence[Row], name: str, edges: Sequence[float]) -> str:
    within: list[Callable[[Mode], bool]] = [
        lambda mode, low=low, high=high: low <= mode[name] < high or mode[name] == high == edges[-1]  # type: ignore[misc]
        for low, high in pairwise(edges)
    ]
    body = []
    for dim in _dims(rows):
        modes = modes_of([row for row in rows if row["dim"] == dim])
        body.append([dim, *(share([mode for mode in modes if inside(mode)]) for inside in within)])
    return table(["dimensions", *(f"{low:g} to {high:g}" for low, high in pairwise(edges))], body)


def _fits(rows: Sequence[Row]) -> str:
    """Return a sentence on whole fits of the same planted modes."""
    fitted = [row for row in rows if row["way"] == "fit"]
    if not fitted:
        return ""
    keys = {
        tuple(row[name] for name in ("sum", "dim", "width", "block")): row for row in rows if row["way"] == "search"
    }
    pairs = [(row, keys.get(tuple(row[name] for name in ("sum", "dim", "width", "block")))) for row in fitted]
    both = [
        (told == "1", found == "1")
        for row, other in pairs
        if other is not None
        for told, found in zip(row["found"].split(), other["found"].split(), strict=False)
    ]
    told, found, same = sum(a for a, _ in both), sum(b for _, b in both), sum(a == b for a, b in both)
    return (
        f"Of {len(both)} planted modes that were fitted too, the search finds {found}; {told} fits have the mode or "
        f"are `unreliable`. Both agree on {same}."
    )


__all__ = ["SUMS", "modes_of", "newest", "section", "share"]
