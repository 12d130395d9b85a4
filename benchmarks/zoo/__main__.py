"""Fit random models whose posteriors are known exactly, and count how often the verdict is right about them.

    python -m benchmarks.zoo --jobs 2
    python -m benchmarks.zoo --seeds 1 --models 40
    python -m benchmarks.zoo --table

One row of the CSV file is one fit, in a process of its own. It is written as soon as the fit is done, and a fit that
has a row of the same version is not done again. Develop on seed 1; the table has others.

- right: means within .25 sd, sds within 25 % (quantiles within .25 sd where tails are heavy, masses of modes within
  .1), and not called unreliable; or impossible data refused, or called unreliable; or improper posteriors called so.
- lie: wrong, and not called unreliable. Alarm: right, and called unreliable; or proper, and called improper.
- honest: wrong, and called unreliable; or data that are possible refused with a ValueError.
- crash: another exception, or a process that ended. Cut off: no result after ``--seconds-per-fit``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.markdown import table
from benchmarks.records import Row
from benchmarks.zoo import FAMILIES, MODELS, SEEDS, running
from benchmarks.zoo.reporting import HEADER, line, newest, table_rows, wanting


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=f"of the zoo (default: {SEEDS})")
    parser.add_argument("--models", type=records.positive, default=MODELS, help="of each seed (default: 300)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the number to begin with (default: 0)")
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help=f"some of: {', '.join(FAMILIES)}")
    parser.add_argument(
        "--seconds-per-fit", type=float, default=running.SECONDS, help="of the processor (default: 180)"
    )
    parser.add_argument("--jobs", type=records.positive, default=1, help="processes, one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=running.OUT, metavar="CSV", help="file of the rows")
    parser.add_argument("--table", action="store_true", help="only show the table of the newest rows in the file")
    options = parser.parse_args(arguments)
    if options.table:
        rows = newest(records.read(options.out))
        if not rows:
            parser.error(f"no rows in {options.out}")
    else:
        try:
            rows = [row for seed in options.seeds for row in _bench(seed, options)]
        except ValueError as error:
            parser.error(str(error))
    print(table(HEADER, table_rows(rows)))
    print("\n".join(wanting(rows)))


def _bench(seed: int, options: argparse.Namespace) -> list[Row]:
    return running.bench(
        seed=seed,
        models=options.models,
        families=options.families,
        first=options.first,
        limit=options.seconds_per_fit,
        out=options.out,
        jobs=options.jobs,
        show=lambda row: print(line(row), flush=True),
    )


if __name__ == "__main__":
    main()
