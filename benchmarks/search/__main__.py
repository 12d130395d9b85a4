"""Plant a second mode beside one that a candidate covers exactly, and count how often the search finds it.

    python -m benchmarks.search --modes 200
    python -m benchmarks.search --way fit --modes 10 --sums none --dims 3 10 --widths 1/3

The candidate is a normal distribution with exact draws; the search is the one that ``fit`` makes. Masses are drawn from
.1 to .9, distances from 2 to 10 standard deviations of the first mode, priors from 3 to 30 times its width. One row of
the CSV file is a block of ten planted modes of a cell: way, kind of sum, dimensions, width. A block that has a row of
the same version is not done again. ``--way fit`` makes whole fits of the same modes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.search import running
from benchmarks.search.planted import SUMS
from benchmarks.search.tables import section


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", type=records.positive, default=running.MODES, help="of each cell (default: 200)")
    parser.add_argument("--way", choices=running.WAYS, default="search", help="search alone (default), or whole fits")
    parser.add_argument("--sums", nargs="+", choices=list(SUMS), default=list(SUMS), help="all by default")
    parser.add_argument("--dims", nargs="+", type=records.positive, default=running.DIMS, metavar="D")
    parser.add_argument("--widths", nargs="+", choices=list(running.WIDTHS), default=list(running.WIDTHS))
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=running.OUT, metavar="CSV", help="file of the rows")
    options = parser.parse_args(arguments)
    rows = running.bench(**vars(options), show=lambda row: print(_line(row), flush=True))
    print(section(rows))


def _line(row: records.Row) -> str:
    found = row["error"] or f"{row['found'].count('1')} of {len(row['found'].split())}"
    return f"{row['way']}, sum {row['sum']}, D = {row['dim']}, width {row['width']}, block {row['block']}: {found}"


if __name__ == "__main__":
    main()
