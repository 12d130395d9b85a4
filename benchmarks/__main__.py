"""What ``make bench`` runs: speed, toy targets, posteriors of posteriordb if they are there; then the tables.

The hours that NUTS takes on these posteriors are spent if they are asked for, by ``--nuts``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import tables
from benchmarks.nuts import running as nuts
from benchmarks.posteriors import running as posteriordb
from benchmarks.posteriors.reference import ENVIRONMENT_VARIABLE, find_posteriordb
from benchmarks.speed import running as speed
from benchmarks.toys import running as toys
from benchmarks.toys.targets import TARGETS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    posteriordb.add_options(parser)
    parser.add_argument("--nuts", action="store_true", help="the time that NUTS takes too, with one seed, one by one")
    nuts.add_numpyro(parser)
    options = parser.parse_args(arguments)
    targets = [name for name in options.only if name in TARGETS]
    try:
        only = [posteriordb.full_name(name) for name in options.only if name not in TARGETS]
    except ValueError as error:
        parser.error(str(error))
    print("Speed:")
    speed.main([])
    if targets or not options.only:
        print("Toy targets:")
        print(toys.summary(toys.bench(seeds=options.seeds, only=targets, jobs=options.jobs)))
    if only or not options.only:
        _posteriors(options, only)
    tables.write_tables(posteriordb_csv=options.out)
    print(f"Tables: docs/{tables.EVIDENCE.name}")


def _posteriors(options: argparse.Namespace, only: Sequence[str]) -> None:
    if find_posteriordb(options.posteriordb) is None:
        print(
            "Posteriors with reference draws: left out, since no posteriordb was found. Clone it and give its folder "
            f"with --posteriordb or in the environment variable {ENVIRONMENT_VARIABLE}."
        )
        return
    print("Posteriors with reference draws:")
    choice = {"seeds": options.seeds, "only": only, "rivals": options.rivals}
    print(posteriordb.summary(posteriordb.bench(options.posteriordb, **choice, out=options.out, jobs=options.jobs)))
    if options.nuts:
        nuts.name_numpyro(options)
        print("The time that NUTS takes:")
        print(nuts.summary(nuts.bench(options.posteriordb, only=only)))


if __name__ == "__main__":
    main()
