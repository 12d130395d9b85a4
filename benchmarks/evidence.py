"""Run the benchmarks whose tables are of older code, then write all tables: what ``make evidence`` does.

    python -m benchmarks.evidence --list
    python -m benchmarks.evidence --jobs 2
    python -m benchmarks.evidence --only posteriordb zoo --within 0

A table is stale if rows are missing, or if more than 5 % of the lines of code that decide about it have changed since
its rows were made (``benchmarks/fingerprints.py``). Rows within these 5 % are kept and count as those of the present
code. What is stale is printed first, with the minutes that its rows took the last time. A run that was stopped goes on
where it was. Seconds are comparable only if nothing else runs: with ``--jobs 1``, on a machine that is free.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from benchmarks import fingerprints, records, standing, tables
from benchmarks.posteriors.reference import find_posteriordb


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(standing.TABLES)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these tables")
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument(
        "--within", type=float, default=100.0 * fingerprints.LIMIT, metavar="PERCENT",
        help="of the lines that may have changed before rows are made anew (default: 5)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only say what is stale")
    options = parser.parse_args(arguments)
    within = options.within / 100.0
    found = standing.stale(within, options.only)
    for name, reasons in found.items():
        print(f"{reasons} About {standing.TABLES[name].minutes(within):.0f} minutes of one process.")
    if not found:
        print("All tables are of the present code.")
    if options.list:
        return
    torch.set_num_threads(1)
    for name in found:
        run(name, options.jobs, within)
    standing.tidy()
    tables.write_tables()
    for reasons in standing.stale(within, options.only).values():
        print(f"Still stale: {reasons}")


def run(name: str, jobs: int, within: float) -> None:
    """Make the rows that a table lacks."""
    table = standing.TABLES[name]
    if name == "posteriordb" and find_posteriordb() is None:
        print("posteriordb: left out, since there is no checkout; name its folder in the variable POSTERIORDB")
        return
    with records.resuming(within):
        for arguments in table.runs:
            print(f"\n{name} {' '.join(arguments)}", flush=True)
            table.main([*arguments, *(("--jobs", str(jobs)) if table.side_by_side else ())])


if __name__ == "__main__":
    main()
