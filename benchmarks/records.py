"""What all benchmarks share: rows in CSV files, tasks that make them, the names of the machine and of the software."""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

import pyro_flows
from benchmarks import fingerprints
from pyro_flows.support.process.ledger import ledger

Row = dict[str, str]
Task = TypeVar("Task")
_within: ContextVar[float] = ContextVar("within", default=0.0)

RESULTS = Path(__file__).resolve().parent / "results"
PRESENTATION = {"cli", "_inputs", "arviz_groups", "dims", "files", "plots", "report"}  # no part of a fit


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


def code_version(package: Path = Path(pyro_flows.__file__).parent) -> str:
    """Return the package's version and a digest of the code that makes a fit.

    It is one of the set of definitions, names and bodies. In which files they stand, comments, docstrings, layout,
    imports, and modules that only present results do not count, so that a move makes no row stale.
    """
    found: set[str] = set()
    for file in package.rglob("*.py"):
        if PRESENTATION.isdisjoint((file.stem, file.parent.name)):
            found |= definitions(file.read_text(encoding="utf-8"))
    digest = hashlib.sha256("\n".join(sorted(found)).encode())
    return f"{pyro_flows.__version__}-{digest.hexdigest()[:8]}"


def definitions(source: str) -> set[str]:
    """Return the statements of a module, without docstrings and imports."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        kept = [part for part in body[1 if documented else 0 :] if not isinstance(part, (ast.Import, ast.ImportFrom))]
        node.body = kept  # type: ignore[attr-defined]
    return {ast.dump(part) for part in tree.body}


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


@contextmanager
def resuming(within: float) -> Iterator[None]:
    """Let :func:`start` take rows for those of the present code if at most this share of its lines has changed."""
    token = _within.set(within)
    try:
        yield
    finally:
        _within.reset(token)


def _resumed(rows: list[Row]) -> list[Row]:
    if not (within := _within.get()):
        return rows
    present = code_version()
    named = {row["version"]: fingerprints.version_in(row["version"]) for row in rows}
    standing = {
        text: text.replace(version, present)
        for text, version in named.items()
        if version is not None and fingerprints.stands(version, within)
    }
    return [{**row, "version": standing.get(row["version"], row["version"])} for row in rows]


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
        return _resumed(rows)
    write(file, fields, [])
    return []


def append(file: Path, fields: Sequence[str], row: Mapping[str, object]) -> None:
    """Add one row and see that it is on the disk; the first row of a version leaves the fingerprint of its code."""
    with file.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, fields, lineterminator="\n").writerow(row)
        stream.flush()
        os.fsync(stream.fileno())
    version = fingerprints.version_in(str(row.get("version", "")))
    kept = version is None or (fingerprints.KEPT / f"{version}.txt").is_file()
    if file.parent == RESULTS and not kept and version == code_version():  # the code may change while a benchmark runs
        fingerprints.save(version)


def by_process(module: str, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run a module in a process of one thread, and return the JSON of its last line; None, with a word, if it fails."""
    command, environment = [sys.executable, "-m", module, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ran.returncode:
        print(f"{' '.join(arguments)}: {ran.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def attempt(row: dict[str, Any], fill: Callable[[dict[str, Any]], None]) -> Row:
    """Let ``fill`` write its figures into ``row``; an exception is recorded in the column ``error``. One thread.

    A row with a column ``ledger`` gets the account of the fit, see :class:`pyro_flows.support.process.ledger.Ledger`.
    """
    torch.set_num_threads(1)
    row.update(machine=machine(), software=software())
    began = time.monotonic()
    try:
        with ledger() as kept:
            fill(row)
        if row.get("ledger") == "" and kept.said:
            row["ledger"] = kept.as_json()
    except Exception as error:
        row["seconds"] = time.monotonic() - began
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def done(
    tasks: Sequence[Task], do: Callable[[Task], Row], jobs: int, followers: Callable[[Row], list[Task]] = lambda row: []
) -> Iterator[Row]:
    """Yield the rows of ``tasks`` as they come, in ``jobs`` processes; what follows from a row is done as well."""
    if jobs == 1:
        queue = deque(tasks)
        while queue:
            row = do(queue.popleft())
            yield row
            queue.extendleft(reversed(followers(row)))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(do, task) for task in tasks}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                row = future.result()
                yield row
                pending |= {pool.submit(do, task) for task in followers(row)}


def positive(text: str) -> int:
    """Return a whole number from 1 on, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value
