"""Seconds to a right posterior: our fit against NUTS of Pyro, NumPyro and nutpie, on ported posteriors of posteriordb.

    python -m benchmarks.nuts --posteriordb PATH --only kilpisjarvi --numpyro PYTHON

One row of the CSV file is one posterior by one method, each in a process of its own with one thread, one after the
other. A row of the same version is not done again. Seconds run from just before a model is built to the last draw, with
recording, compiling and warm-up, but without imports. They are compared as seconds of the processor, which depend less
on what else the machine does than those of the wall.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks import records
from benchmarks.nuts.samplers import INTERPRETER, METHODS, NUMPYRO, NUTPIE, PYRO, Sampled, numpyro_version
from benchmarks.posteriors.judging import MEAN, SD, by_posterior, newest
from benchmarks.posteriors.models import NAMES, load
from benchmarks.posteriors.reference import ENVIRONMENT_VARIABLE, find_posteriordb
from benchmarks.posteriors.running import KEY, OURS, Task, compare, full_name
from benchmarks.records import Row
from pyro_flows import LogDensity

OUT = records.RESULTS / "nuts.csv"
MUCH = 10.0  # times faster
AT_LEAST = "at least"  # a time of a short chain that was broken off
RIVALS = (PYRO, NUMPYRO, NUTPIE)
LEFT_OUT = (
    "{method}: left out, since no interpreter with {needs} was found. Make an environment that has it and name its "
    f"interpreter with --numpyro or in the environment variable {INTERPRETER}."
)
NEEDS = {NUMPYRO: "NumPyro", NUTPIE: "NumPyro and nutpie"}

FIELDS = (
    *("posterior", "method", "seed", "version", "dim", "draws", "mean", "sd", "right"),
    *("seconds", "cpu_seconds", "scaled", "status", "gradients", "parts", "ledger", "error", "machine", "software"),
)


# ---- one posterior by one method -------------------------------------------------------------------------------------


def work(task: Task) -> Row:
    """Do one task and return its row; an exception is recorded in the column ``error``."""

    def fill(row: dict[str, Any]) -> None:
        problem = load(task.posterior, task.root)
        found = METHODS[task.method](problem, task.seed)
        reference = LogDensity(problem.model, problem.args).unconstrain(problem.reference)
        enter(row, found, reference.shape[1], lambda draws: (*compare(draws, reference), True))

    return records.attempt({**dict.fromkeys(FIELDS, ""), **task.named}, fill)


def enter(row: dict[str, Any], found: Sampled, dim: int, judge: Callable[[Tensor], tuple[float, float, bool]]) -> None:
    """Write what a method came to into its row.

    Args:
        row: the row.
        found: draws, if there are any, and seconds.
        dim: the number of coordinates.
        judge: draws -> the worst errors of means and sds, see :func:`benchmarks.posteriors.running.compare`, and
            whether all else that has to be is right.
    """
    row.update(dim=dim, draws=0, mean=math.nan, sd=math.nan, right="no", scaled=AT_LEAST)
    row.update(seconds=found.seconds, cpu_seconds=found.cpu_seconds, **found.notes)
    if found.draws is not None:
        mean, sd, well = judge(found.draws)
        row.update(draws=len(found.draws), mean=mean, sd=sd, scaled="yes" if found.scaled else "no")
        row.update(right="yes" if well and mean <= MEAN and sd <= SD else "no")


def alone(task: Task, do: Callable[[Task], Row] = work) -> Row:
    """Do one task in a process of its own that finds nothing compiled by earlier ones."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, context, initializer=_compile_into, initargs=(folder,)) as pool,
    ):
        return pool.submit(do, task).result()


def _compile_into(folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


# ---- all of them -----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return what a row of each method depends on, of the methods that can be run here."""
    found = {OURS: records.code_version(), PYRO: f"pyro-{version('pyro-ppl')}", NUMPYRO: numpyro_version()}
    found[NUTPIE] = numpyro_version("nutpie")
    return {method: made for method, made in found.items() if made is not None}


def bench(
    root: str | None,
    *,
    seeds: int = 1,
    only: Sequence[str] = (),
    methods: Sequence[str] = tuple(METHODS),
    out: Path = OUT,
    do: Callable[[Task], Row] = alone,
) -> list[Row]:
    """Do all tasks that ``out`` does not have yet; return its rows of the present versions.

    Args:
        root: the checkout of posteriordb, see :func:`benchmarks.posteriors.reference.find_posteriordb`.
        seeds: how many seeds a posterior and method, from 0 on.
        only: full names of posteriors, or their parts after the dash; all by default.
        methods: which of `METHODS`.
        out: the CSV file.
        do: what does a task.
    """
    names = [full_name(name) for name in only] or list(NAMES)
    made = {method: made for method, made in versions().items() if method in methods}
    say_left_out(methods, made)
    tasks = [Task(name, method, seed, made[method], root) for name in names for seed in range(seeds) for method in made]
    return do_all(tasks, out, do)


def say_left_out(methods: Sequence[str], made: Mapping[str, str]) -> None:
    """Print which of the methods cannot be run here, and why."""
    for method, needs in NEEDS.items():
        if method in methods and method not in made:
            print(LEFT_OUT.format(method=method, needs=needs))


def do_all(tasks: Sequence[Task], out: Path, do: Callable[[Task], Row]) -> list[Row]:
    """Do the tasks that ``out`` does not have yet; return the rows of all."""
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    for row in records.done([task for task in tasks if task.key not in rows], do, jobs=1):
        records.append(out, FIELDS, row)
        rows[tuple(row[name] for name in KEY)] = row
        print(line(row), flush=True)
    return [rows[task.key] for task in tasks]


def line(row: Row) -> str:
    """Return one line about one row."""
    head = f"{row['posterior']}, {row['method']}, seed {row['seed']}: "
    if row["error"]:
        return f"{head}{row['error']}"
    return (
        f"{head}{'right' if row['right'] == 'yes' else 'not right'} ({float(row['mean']):.3f} / "
        f"{float(row['sd']):.3f}), {float(row['cpu_seconds']):.1f} s of the processor, {float(row['seconds']):.1f} s"
        f"{'' if row['scaled'] == 'no' else ', scaled'}{', at least' if row['scaled'] == AT_LEAST else ''}"
        f"{', ' + row['status'] if row['status'] else ''}{'; ' + row['parts'] if row['parts'] else ''}"
    )


# ---- what they say ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One posterior by one method: the median seconds of the processor over seeds; right if all seeds are."""

    seconds: float
    right: bool
    scaled: bool
    broken: bool = False


def cells(rows: Iterable[Row]) -> dict[str, dict[str, Cell]]:
    """Return the cells by method and posterior, without those where a seed failed."""
    return {method: cells_of(by_posterior(kept)) for method, kept in newest(rows).items()}


def cells_of(groups: Mapping[str, Sequence[Row]]) -> dict[str, Cell]:
    """Return the cells of one method by posterior, from its rows, without those where a seed failed."""
    return {
        name: Cell(
            statistics.median(float(row["cpu_seconds"]) for row in group),
            all(row["right"] == "yes" for row in group),
            any(row["scaled"] != "no" for row in group),
            any(row["scaled"] == AT_LEAST for row in group),
        )
        for name, group in groups.items()
        if not any(row["error"] for row in group)
    }


def ratio(ours: Cell, theirs: Cell) -> float:
    """Return how many times faster we are, whether or not draws are right."""
    return theirs.seconds / ours.seconds


def summary(rows: Sequence[Row]) -> str:
    """Return one line about each rival, of the posteriors that both have done; a failed fit of ours is not faster."""
    found, tried = cells(rows), {row["posterior"] for row in rows if row["method"] == OURS}
    return "\n".join(_against(found, rival, tried) for rival in RIVALS if rival in found)


def _against(found: dict[str, dict[str, Cell]], rival: str, tried: set[str]) -> str:
    pairs = [(found[OURS].get(name), theirs) for name, theirs in found[rival].items() if name in tried]
    ratios = [ratio(ours, theirs) if ours and ours.right else 0.0 for ours, theirs in pairs]
    much, faster = (sum(value >= limit for value in ratios) for limit in (MUCH, 1.0))
    median = f", {statistics.median(ratios):.2f} x in the median" if ratios else ""
    return (
        f"seconds to a right posterior against {rival}: {much} of {len(pairs)} {MUCH:g} x faster, {faster} faster, "
        f"{len(pairs) - faster} slower or not right{median}; its draws are right on "
        f"{sum(theirs.right for _, theirs in pairs)}, its time is scaled on {sum(theirs.scaled for _, theirs in pairs)}"
    )


# ---- command line ----------------------------------------------------------------------------------------------------


def add_numpyro(parser: argparse.ArgumentParser) -> None:
    """Add the option that names an interpreter."""
    parser.add_argument(
        "--numpyro",
        metavar="PYTHON",
        help=f"an interpreter with NumPyro and nutpie (else the variable {INTERPRETER})",
    )


def name_numpyro(options: argparse.Namespace) -> None:
    """Put the named interpreter where this process and those that it starts look for it."""
    if options.numpyro:
        os.environ[INTERPRETER] = options.numpyro


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nuts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--posteriordb", metavar="PATH", help=f"checkout of posteriordb (else the variable {ENVIRONMENT_VARIABLE})"
    )
    parser.add_argument("--seeds", type=records.positive, default=3, help="seeds a posterior, from 0 on (default: 3)")
    parser.add_argument(
        "--only", metavar="NAME", action="extend", nargs="+", default=[], help="only these posteriors; can be repeated"
    )
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="only these")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows; those in it are kept")
    add_numpyro(parser)
    options = parser.parse_args(arguments)
    if find_posteriordb(options.posteriordb) is None:
        parser.error("no posteriordb found; clone it and give its folder with --posteriordb")
    try:
        only = [full_name(name) for name in options.only]
    except ValueError as error:
        parser.error(str(error))
    name_numpyro(options)
    bench(options.posteriordb, seeds=options.seeds, only=only, methods=options.methods, out=options.out)
    print(summary(records.read(options.out)))
