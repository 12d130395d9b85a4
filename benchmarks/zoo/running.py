"""Fits of the zoo, each in a process of its own, as rows of a CSV file."""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.records import Row
from benchmarks.zoo import FAMILIES, family_of, zoo
from benchmarks.zoo.judging import figures, outcome_of_error

OUT = records.RESULTS / "zoo.csv"
SECONDS = 180.0  # of the processor, for one fit
WALL, WALL_LEAST = 6.0, 300.0  # times as long a fit may take on a busy machine; seconds that it may take at least

FIELDS = (
    *("seed", "number", "version", "zoo", "family", "name", "dtype", "dim", "outcome", "status", "ratio"),
    *("strict_ratio", "worst", "mean_error", "sd_error", "quantile_error", "mode_error", "mode_share_error"),
    *("evidence_error", "k_hat", "ess_ratio", "seconds", "rounds", "reasons", "ledger", "error", "machine", "software"),
)
KEY = ("seed", "number", "version", "zoo")


@dataclass(frozen=True)
class Task:
    """One fit to be done, within ``limit`` seconds of the processor."""

    seed: int
    number: int
    version: str
    zoo: str
    limit: float = SECONDS

    @property
    def key(self) -> tuple[str, ...]:
        """What tells its row from others."""
        return tuple(str(getattr(self, name)) for name in KEY)


def sources(family: str) -> dict[str, str]:
    """Return the modules that make the cases of a family and judge the fits, and their source."""
    found: dict[str, str] = {}
    waiting = {FAMILIES[family][0].__module__, figures.__module__}
    while waiting:
        name = waiting.pop()
        found[name] = Path(sys.modules[name].__file__ or "").read_text(encoding="utf-8")
        imports = [node for node in ast.walk(ast.parse(found[name])) if isinstance(node, ast.ImportFrom)]
        waiting |= {node.module for node in imports if node.module and node.module.startswith("benchmarks.zoo.")}
        waiting -= found.keys()
    return found


def zoo_version(family: str) -> str:
    """Return a digest of :func:`sources`; comments and docstrings do not count."""
    texts = ["\n".join(sorted(records.definitions(source))) for _, source in sorted(sources(family).items())]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:8]


def numbers(models: int, families: Sequence[str] = (), first: int = 0) -> list[int]:
    """Return the numbers of the cases from ``first`` to ``models`` that belong to the families, all by default."""
    return [number for number in range(first, models) if not families or family_of(number) in families]


# ---- one fit ---------------------------------------------------------------------------------------------------------


def fill(row: dict[str, Any], task: Task) -> None:
    """Fit one case and put its figures into the row."""
    import torch

    import pyro_flows
    from benchmarks.clock import Stopwatch
    from pyro_flows.support.process.ledger import ledger

    torch.set_num_threads(1)
    case = zoo(task.seed, task.number)
    row.update(family=case.family, name=case.name, dtype=str(case.dtype).removeprefix("torch."), dim=case.dim)
    row.update(machine=records.machine(), software=records.software())
    watch = Stopwatch()
    try:
        with ledger() as kept:
            posterior = pyro_flows.fit(
                case.model, *case.args, model_kwargs=case.kwargs, seed=task.number, progress=False
            )
    except Exception as error:
        row.update(seconds=watch.cpu(), outcome=outcome_of_error(case, error))
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        row["error"] = " ".join(text.split())[:600]
        return
    row.update(seconds=watch.cpu(), ledger=kept.as_json())
    row.update(figures(case, posterior))
    row["rounds"] = " > ".join(
        stage["stage"] for stage in posterior.history
    )  # a change of `figures` would make all cases new ones


def blank(task: Task) -> dict[str, Any]:
    """Return the row of a fit that left no figures."""
    return {**dict.fromkeys(FIELDS, ""), **dict(zip(KEY, task.key, strict=True)), "family": family_of(task.number)}


def fitted(seed: int, number: int) -> dict[str, Any]:
    """Return the row of one fit, which is made in this process, without a version."""
    task = Task(seed, number, "", "")
    row = blank(task)
    fill(row, task)
    return row


def _texts(row: dict[str, Any]) -> Row:
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def _child(task: Task, pipe: Any) -> None:
    os.setsid()  # so that compilers which it starts end with it
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + task.limit) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    row = blank(task)
    try:
        fill(row, task)
    except BaseException as error:  # a mistake of the zoo's own; the parent shows it
        row.update(outcome="crash", error=f"outside of fit: {type(error).__name__}: {error}"[:600])
    pipe.send(row)
    pipe.close()


def work(task: Task) -> Row:
    """Do one fit in a process of its own; what becomes of it, its row comes back."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_flows", "pyro", "scipy.special", "benchmarks.zoo.running"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, theirs))
    process.start()
    theirs.close()
    row, patience = blank(task), max(WALL * task.limit, WALL_LEAST)
    try:
        if ours.poll(patience):
            row = ours.recv()
        else:
            row.update(outcome="late", error=f"not done after {patience:.0f} seconds of the wall clock")
    except EOFError:
        process.join(10.0)
        late = process.exitcode == -signal.SIGXCPU
        what = f"cut off after {task.limit:.0f} seconds" if late else f"the process ended with {process.exitcode}"
        row.update(outcome="late" if late else "crash", error=what, seconds=task.limit if late else "")
    finally:
        _end(process)
        ours.close()
    if not row["name"]:
        row["name"] = zoo(task.seed, task.number).name
    return _texts(row)


def _end(process: Any) -> None:
    process.join(5.0)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join(5.0)


# ---- all of them -----------------------------------------------------------------------------------------------------


def bench(
    *,
    seed: int,
    models: int,
    families: Sequence[str] = (),
    first: int = 0,
    limit: float = SECONDS,
    out: Path = OUT,
    jobs: int = 1,
    do: Callable[[Task], Row] = work,
    show: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Do all fits that ``out`` does not have yet, in the order of their numbers; return the rows of this version.

    Args:
        seed: of the zoo.
        models: the number after the last.
        families: only these, all by default.
        first: the first number.
        limit: seconds of the processor for one fit.
        out: the CSV file, which gets each row as soon as its fit is done.
        jobs: how many processes at a time, of one thread each.
        do: what does a fit.
        show: what is told of each row that is new.

    Raises:
        ValueError: for an unknown family, or a file with other columns.
    """
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"families: expected some of {', '.join(FAMILIES)}, got {family!r}.")
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    version, digests = records.code_version(), {family: zoo_version(family) for family in FAMILIES}
    wanted = numbers(models, families, first)
    tasks = [Task(seed, number, version, digests[family_of(number)], limit) for number in wanted]
    for row in _done([task for task in tasks if task.key not in rows], do, jobs):
        records.append(out, FIELDS, row)
        rows[tuple(row[name] for name in KEY)] = row
        show(row)
    return [rows[task.key] for task in tasks]


def _done(tasks: Sequence[Task], do: Callable[[Task], Row], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        yield from map(do, tasks)
        return
    with ThreadPoolExecutor(jobs) as pool:  # each thread waits for a process of its own
        for future in as_completed([pool.submit(do, task) for task in tasks]):
            yield future.result()
