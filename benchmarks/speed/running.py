"""Speed, side by side: steps of variational inference, bare flows, growth, and the distance to what products cost.

    python -m benchmarks.speed --only steps flows growth limit --peers PYTHON --numpyro PYTHON

Every method runs in a process of its own, on one thread; the processes take turns, so that a busy machine is busy for
all of them. Methods whose package is not there are left out with a sentence. Rows are written when a case is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import records
from benchmarks.records import Row

OUT = records.RESULTS / "speed.csv"
FIELDS = (
    *("part", "case", "dim", "batch", "layers", "rows", "method", "round", "milliseconds", "megabytes"),
    *("setup_seconds", "version", "machine", "software"),
)
ROUNDS = 7
SECONDS = 0.3  # of each turn
PEERS = ("zuko", "nflows", "normflows", "Pyro")
EAGER, RECORDED, GUIDE = "eager", "recorded", "recorded, the guide of fit"
STEPS = (EAGER, RECORDED, GUIDE, "Pyro", "zuko in Pyro", "NumPyro")
THREADS = ("1 thread", "2 threads")
PATH, PLAIN, PRODUCTS = "path gradient", "plain gradient", "products"
FLOWS = ("ours", "ours, compiled", *PEERS)


@dataclass(frozen=True)
class Case:
    """One thing to be timed: ``rows`` of data for a model, ``batch`` particles or points."""

    part: str
    case: str
    dim: int
    batch: int
    layers: int = 8
    rows: int = 0


SCHOOLS = Case("steps", "eight schools", 10, 256, 10)
CASES = (
    SCHOOLS,
    *(Case("steps", "student", dim, batch) for dim in (10, 50, 200) for batch in (16, 64, 256)),
    Case("gradients", "realnvp", 10, 256, 10),
    Case("gradients", "planar", 10, 256, 10),
    Case("flows", "sample and score", 20, 4096),
    Case("flows", "score", 20, 4096),
    *(Case("growth", "student", dim, 64) for dim in (10, 30, 100, 300, 1000)),
    *(Case("growth", "student", 20, batch) for batch in (16, 256, 1024, 4096)),
    *(Case("growth", "student", 20, 64, layers) for layers in (2, 4, 16, 32)),
    *(Case("growth", "regression", 5, 64, 8, rows) for rows in (100, 1000, 10_000, 100_000, 1_000_000)),
    *(Case("threads", "regression", 5, 64, 8, rows) for rows in (100, 10_000, 30_000, 100_000, 1_000_000)),
    Case("limit", "products alone", 10, 256, 10),
    Case("limit", "products alone", 10, 64, 10),
)


def methods(case: Case) -> tuple[str, ...]:
    """What is timed in a case."""
    parts = {"steps": STEPS, "gradients": (PATH, PLAIN), "flows": FLOWS, "growth": (RECORDED,), "threads": THREADS}
    return parts.get(case.part, (RECORDED, PRODUCTS))


class Worker:
    """A process that repeats one step when it is told to."""

    def __init__(self, case: Case, method: str, python: str) -> None:
        command = [python, "-m", "benchmarks.speed.worker", json.dumps(asdict(case)), method]
        threads = method[0] if method in THREADS else "1"
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "JAX_ENABLE_X64": "0"}
        environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload]
        self.ready = self._read()

    def _read(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        return json.loads(line) if line.startswith("{") else {}

    def turn(self) -> dict[str, float]:
        """Repeat the step for a while; return milliseconds a step and megabytes of memory at the peak."""
        self.process.stdin.write(f"{SECONDS}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def measure(case: Case, pythons: dict[str, str], *, rounds: int = ROUNDS, only: Sequence[str] = ()) -> list[Row]:
    """Time all methods of a case; they take turns, in rotating order."""
    workers = {}
    for method in methods(case):
        if only and method not in only:
            continue
        worker = Worker(case, method, pythons.get(method, sys.executable))
        if worker.ready:
            workers[method] = worker
        else:
            print(f"{case.case}, {method}: left out; the process that should time it did not start.")
            worker.close()
    about = {"version": records.code_version(), "machine": records.machine(), "software": records.software()}
    rows, names = [], list(workers)
    for number in range(rounds):
        shift = number % len(names)
        for method in names[shift:] + names[:shift]:
            found = workers[method].turn()
            if found:
                figures = {name: f"{value:.5g}" for name, value in {**workers[method].ready, **found}.items()}
                named = {name: str(value) for name, value in asdict(case).items()}
                rows.append({**named, "method": method, "round": str(number), **figures, **about})
    for worker in workers.values():
        worker.close()
    return rows


def medians(rows: Iterable[Row]) -> dict[str, float]:
    """Return the median milliseconds of one case, by method."""
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["method"], []).append(float(row["milliseconds"]))
    return {method: statistics.median(found) for method, found in times.items()}


def ratios(rows: Sequence[Row], to: str) -> dict[str, float]:
    """Return how many times faster than ``to`` each method is: the median of the ratios within a round."""
    by_round: dict[str, dict[str, float]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["method"]] = float(row["milliseconds"])
    found: dict[str, list[float]] = {}
    for times in by_round.values():
        for method, time in times.items():
            if to in times:
                found.setdefault(method, []).append(times[to] / time)
    return {method: statistics.median(values) for method, values in found.items()}


def key(row: Row) -> tuple[str, ...]:
    """Return what tells one case from others, and its version."""
    return tuple(row[name] for name in ("part", "case", "dim", "batch", "layers", "rows", "version"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = list(dict.fromkeys(case.part for case in CASES))
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts (default: all)")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="with zuko, nflows and normflows")
    parser.add_argument("--numpyro", default=sys.executable, metavar="PYTHON", help="with NumPyro")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    options = parser.parse_args(arguments)
    pythons = dict.fromkeys((*PEERS, "zuko in Pyro"), options.peers) | {"NumPyro": options.numpyro}
    done = {key(row) for row in records.start(options.out, FIELDS)}
    version = records.code_version()
    for case in CASES:
        if case.part not in options.only or (*map(str, asdict(case).values()), version) in done:
            continue
        rows = measure(case, pythons, rounds=options.rounds)
        for row in rows:
            records.append(options.out, FIELDS, row)
        shown = ", ".join(f"{method} {value:.3g}" for method, value in medians(rows).items())
        print(
            f"{case.part}, {case.case}, D {case.dim}, batch {case.batch}, layers {case.layers}: {shown} ms", flush=True
        )
