"""Which tables have to be of the present code, which of their rows are, and what is wrong with the others.

A table is stale if rows are missing, or if more than 5 % of the lines of code that decide about it have changed since
its rows were made (``benchmarks/fingerprints.py``). Rows within these 5 % are kept and count as those of the present
code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fingerprints, records, zoo
from benchmarks.larger import models as larger_models
from benchmarks.larger import running as larger
from benchmarks.larger import tables as larger_tables
from benchmarks.modes import __main__ as modes
from benchmarks.named import running as named
from benchmarks.posteriors import judging
from benchmarks.posteriors import models as posteriors_models
from benchmarks.posteriors import running as posteriordb
from benchmarks.records import Row
from benchmarks.zoo import __main__ as zoo_main
from benchmarks.zoo import reporting as zoo_reporting
from benchmarks.zoo import running as zoo_running

Main = Callable[[Sequence[str]], object]
FITS, SEEDS = 5, 3  # seeds of a posterior of posteriordb, and of a model elsewhere


@dataclass(frozen=True)
class Table:
    """A table that has to be of the present code.

    Attributes:
        csv: the file of its rows.
        shown: all rows -> rows of our fits that the page shows.
        wanted: how many these are when the table is complete.
        main: the benchmark's command.
        runs: arguments of each call of it.
        side_by_side: whether the command takes ``--jobs``.
    """

    csv: Path
    shown: Callable[[Sequence[Row]], Sequence[Row]]
    wanted: int
    main: Main
    runs: tuple[tuple[str, ...], ...]
    side_by_side: bool = True

    def rows(self) -> list[Row]:
        """Return the rows that the page shows."""
        return list(self.shown(records.read(self.csv)))

    def standing(self, within: float = fingerprints.LIMIT) -> list[Row]:
        """Return those of them that are of the present code, up to a share of its lines."""
        return [row for row in self.rows() if fingerprints.stands(row["version"], within)]

    def minutes(self, within: float = fingerprints.LIMIT) -> float:
        """Return how many minutes of one process the rows that are missing may take, as they did the last time."""
        seconds = [float(row["seconds"]) for row in self.rows() if row["seconds"]]
        missing = max(0, self.wanted - len(self.standing(within)))
        return missing * sum(seconds) / max(1, len(seconds)) / 60.0


def _ours(methods: dict[str, list[Row]]) -> list[Row]:
    return methods.get(posteriordb.OURS, [])


def _larger(rows: Sequence[Row]) -> list[Row]:
    return [row for group in larger_tables.newest(rows).get(posteriordb.OURS, {}).values() for row in group]


MIRRORED = ("mirrored_2", "mirrored_20", "factor_36", "items_76")  # shown with four runs too
TABLES = {
    "zoo": Table(
        zoo_running.OUT, zoo_reporting.newest, zoo.MODELS * len(zoo.SEEDS), zoo_main.main, ((),)
    ),
    "posteriordb": Table(
        posteriordb.OUT, lambda rows: _ours(judging.newest(rows)), FITS * len(posteriors_models.NAMES),
        posteriordb.main, (("--seeds", str(FITS)),),
    ),
    "larger": Table(
        larger.OUT, _larger, SEEDS * len(larger_models.MODELS), larger.main,
        (("--seeds", str(SEEDS), "--methods", posteriordb.OURS),), side_by_side=False,
    ),
    "named": Table(
        named.OUT, named.newest, SEEDS * len(named.MODELS) + len(MIRRORED), named.main,
        (("--seeds", str(SEEDS)), ("--seeds", "1", "--runs", "4", "--only", *MIRRORED)),
    ),
    "modes": Table(
        modes.OUT, modes.newest, SEEDS * len(modes.PROBLEMS), modes.main,
        (("--seeds", str(SEEDS), "--ways", "fit"),), side_by_side=False,
    ),
}  # fmt: skip

BEHIND: dict[str, int] = {}  # tables that are not complete yet; rows of the present code


def stale(within: float = fingerprints.LIMIT, only: Sequence[str] = ()) -> dict[str, str]:
    """Return what is wrong with each table that is not of the present code, or not complete.

    Args:
        within: the share of lines that may have changed.
        only: names of tables, all by default.
    """
    found = {}
    for name in only or TABLES:
        table, reasons = TABLES[name], []
        versions = dict.fromkeys(fingerprints.version_in(row["version"]) or row["version"] for row in table.rows())
        for version in versions:
            if not fingerprints.stands(version, within):
                share = fingerprints.changed(version, "fit")
                known = f"{share:.1%} of the deciding lines have changed" if fingerprints.load(version) else NO_TRACE
                reasons.append(f"{known} since its rows of {version} were made")
        if (count := len(table.rows())) < table.wanted:
            reasons.append(f"{count} of {table.wanted} rows are there")
        if reasons:
            found[name] = f"{name}: {'; '.join(reasons)}. Run `make evidence`."
    return found


NO_TRACE = "benchmarks/results/code has no fingerprint, so that all lines may have changed"


def tidy() -> None:
    """Leave out fingerprints of versions that no row of any benchmark names."""
    rows = "".join(file.read_text(encoding="utf-8") for file in records.RESULTS.glob("*.csv"))
    for file in fingerprints.KEPT.glob("*.txt"):
        if file.stem not in rows:
            file.unlink()
