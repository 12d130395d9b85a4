"""A page of tables of a test's own rows: the stored ones, which take seconds to read, are left out."""

import inspect
from pathlib import Path

from benchmarks import tables

FILES = [name for name in inspect.signature(tables.write_tables).parameters if name.endswith("_csv")]


def write_only(page: Path, **files: Path) -> None:
    """Write a page whose tables are of these files; all others have no rows."""
    tables.write_tables(page, **{**dict.fromkeys(FILES, page.with_name("none.csv")), **files})
