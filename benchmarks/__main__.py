"""What ``make bench`` runs: the step times, the posteriors of posteriordb if they are there, then the tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import posteriordb, steps, tables
from benchmarks.reference import ENVIRONMENT_VARIABLE, find_posteriordb


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    posteriordb.add_options(parser)
    options = parser.parse_args(arguments)
    try:
        only = [posteriordb.full_name(name) for name in options.only]
    except ValueError as error:
        parser.error(str(error))
    print("One optimisation step:")
    steps.main([])
    if find_posteriordb(options.posteriordb) is None:
        print(
            "Posteriors with reference draws: left out, since no posteriordb was found. Clone it and give its folder "
            f"with --posteriordb or in the environment variable {ENVIRONMENT_VARIABLE}."
        )
    else:
        print("Posteriors with reference draws:")
        choice = {"seeds": options.seeds, "only": only, "rivals": options.rivals}
        print(posteriordb.summary(posteriordb.bench(options.posteriordb, **choice, out=options.out, jobs=options.jobs)))
    tables.write_tables(posteriordb_csv=options.out)
    print(f"Tables: docs/{tables.PAGE.name}")


if __name__ == "__main__":
    main()
