"""Blocks of planted modes as rows of a CSV file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Row
from benchmarks.search.planted import SUMS, planted

OUT = records.RESULTS / "search.csv"
DIMS = (1, 2, 3, 5, 10, 20)
WIDTHS = {"1": 1.0, "1/3": 1.0 / 3.0, "1/10": 0.1, "1/50": 0.02}
WAYS = ("search", "fit")
BLOCK, MODES = 10, 200  # planted modes of a row, and of a cell
FIELDS = (
    *("way", "sum", "dim", "width", "block", "version", "masses", "distances", "found", "seconds", "error"),
    *("machine", "software"),
)
KEY = FIELDS[:6]
Task = tuple[str, ...]


def tasks(modes: int, way: str, sums: Sequence[str], dims: Sequence[int], widths: Sequence[str]) -> Iterator[Task]:
    """Yield the keys of all rows: first blocks of all cells come first, so that what is done covers all of them."""
    version, cells = records.code_version(), list(product(sums, dims, widths))
    for block in range(-(-modes // BLOCK)):
        for kind, dim, width in cells:
            yield way, kind, str(dim), width, str(block), version


def measure(task: Task, modes: int = BLOCK) -> Row:
    """Return the row of a block of planted modes."""
    way, kind, dim, width, block, _ = task

    def fill(row: dict[str, Any]) -> None:
        numbers = range(BLOCK * int(block), BLOCK * int(block) + modes)
        cases = [planted(kind, int(dim), WIDTHS[width], number) for number in numbers]
        row["masses"] = " ".join(f"{case.mass:.3f}" for case in cases)
        row["distances"] = " ".join(f"{case.distance:.2f}" for case in cases)
        began = time.process_time()
        row["found"] = " ".join(str(int(case.is_found() if way == "search" else case.is_told())) for case in cases)
        row["seconds"] = (time.process_time() - began) / modes

    return records.attempt({**dict.fromkeys(FIELDS, ""), **dict(zip(KEY, task, strict=True))}, fill)


def bench(
    *, modes: int = MODES, way: str = "search", sums: Sequence[str] = tuple(SUMS), dims: Sequence[int] = DIMS,
    widths: Sequence[str] = tuple(WIDTHS), out: Path = OUT, jobs: int = 1, do: Callable[[Task], Row] = measure,
    show: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """Do all blocks that ``out`` does not have yet; return the rows of this version.

    Args:
        modes: planted modes of each cell, a multiple of ten.
        way: ``"search"``: the search alone, with a candidate that covers the first mode; ``"fit"``: a whole fit.
        sums, dims, widths: of the cells.
        out: the CSV file, which gets each row as soon as it is done.
        jobs: how many processes at a time.
        do: what does a block.
        show: what is told of each row that is new.
    """
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    wanted = list(tasks(modes, way, sums, dims, widths))
    for row in records.done([task for task in wanted if task not in rows], do, jobs):
        records.append(out, FIELDS, row)
        rows[tuple(row[name] for name in KEY)] = row
        show(row)
    return [rows[task] for task in wanted]
