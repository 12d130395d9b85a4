"""What all benchmarks share: rows in CSV files, and the names of the machine and of the software they ran on."""

from __future__ import annotations

import ast
import csv
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

import pyro_flows

Row = dict[str, str]

RESULTS = Path(__file__).resolve().parent / "results"
PRESENTATION = {"__init__", "__main__", "cli", "data", "export", "labels", "plots", "storage"}  # no part of a fit


def machine() -> str:
    """Return the processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def software() -> str:
    """Return the versions of Python, torch and Pyro."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, Pyro {version('pyro-ppl')}"


def code_version() -> str:
    """Return the package's version and a digest of the code that makes a fit.

    Comments, docstrings, layout, and modules that only present results do not count.
    """
    digest = hashlib.sha256()
    folder = Path(pyro_flows.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        if file.parent != folder or file.stem not in PRESENTATION:
            digest.update(_without_docstrings(file.read_text(encoding="utf-8")).encode())
    return f"{pyro_flows.__version__}-{digest.hexdigest()[:8]}"


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def read(file: Path) -> list[Row]:
    """Return the complete rows of a CSV file; none where there is no file.

    A row that was cut short, by a benchmark that was stopped while writing it, is left out.
    """
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values() and None not in row]


def write(file: Path, fields: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file anew."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    with fresh.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(file)


def start(file: Path, fields: Sequence[str]) -> list[Row]:
    """Make ``file`` ready for :func:`append`, and return the rows that it has.

    Raises:
        ValueError: if the file has other columns.
    """
    if file.is_file() and (text := file.read_text(encoding="utf-8")):
        header = next(csv.reader(text.splitlines()[:1]))
        if header != list(fields):
            raise ValueError(f"out: expected the columns {', '.join(fields)} in {file.name}; give another file.")
        rows = read(file)
        if not text.endswith("\n"):
            write(file, fields, rows)
        return rows
    write(file, fields, [])
    return []


def append(file: Path, fields: Sequence[str], row: Mapping[str, object]) -> None:
    """Add one row and see that it is on the disk."""
    with file.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, fields, lineterminator="\n").writerow(row)
        stream.flush()
        os.fsync(stream.fileno())
