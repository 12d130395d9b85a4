"""Measure what a step, a draw and a process cost as one size grows, and print slopes of logarithms.

    python -m benchmarks.scale --parts rows dim

One row of the CSV file is one size, in a process of its own, with the seconds of the processor and the peak of memory.
``processes`` measures seconds of the clock: two of ``torchrun``'s processes need two cores of their own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import distributed

import pyro_flows as pf
from benchmarks import records
from benchmarks.markdown import table
from benchmarks.records import Row
from pyro_flows.fitting.ranks import Ranks, RowsOfRank

OUT = records.RESULTS / "scale.csv"
FIELDS = ("part", "size", "milliseconds", "megabytes", "version", "machine", "software")
SIZES = {
    "dim": (10, 30, 100, 300, 1000),
    "particles": (1, 4, 16, 64, 256),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
    "batch": (30, 100, 300, 1000),
    "draws": (1_000, 10_000, 100_000),
    "processes": (1, 2),
}
TITLES = {
    "dim": "latents, a step of `PathELBO`, 16 particles",
    "particles": "particles, a step of `PathELBO`, 30 latents",
    "rows": "rows, a step of `AutoHierarchicalFlow`, batches of 100",
    "batch": "rows of a batch, a step of `AutoHierarchicalFlow`, 10,000 rows",
    "draws": "draws, `sample_posterior` of 30 latents",
    "processes": "processes, a step with 500 rows each, by the clock",
}
WARM, STEPS = 3, 15


def normal(dim: int) -> None:
    """A normal distribution of so many latents."""
    pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def rows(x: torch.Tensor, batch: int) -> None:
    """Normal rows of normal data, on minibatches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def timed(step: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return the milliseconds of a step."""
    for _ in range(WARM):
        step()
    began = clock()
    for _ in range(STEPS):
        step()
    return 1e3 * (clock() - began) / STEPS


def path(dim: int, particles: int) -> float:
    """Time a step of PathELBO."""
    guide = pf.AutoRealNVP(normal, init="prior")
    svi = SVI(normal, guide, pyro.optim.Adam({"lr": 0.01}), loss=pf.PathELBO(num_particles=particles))
    return timed(lambda: svi.step(dim))


def minibatch(count: int, batch: int) -> float:
    """Time a step of a guide with plates."""
    x = torch.randn(count)
    guide = pf.AutoHierarchicalFlow(rows, init="prior").initialize(x, batch)
    svi = SVI(rows, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return timed(lambda: svi.step(x, batch))


def drawing(count: int) -> float:
    """Time draws of a guide."""
    guide = pf.AutoRealNVP(normal, init="prior").initialize(30)
    return timed(lambda: guide.sample_posterior(count))


def together(rank: int, size: int, place: str, found: Any) -> None:
    """Time a step of one process of several; the first one tells."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    x = torch.randn(10_000)
    torch.manual_seed(0)
    guide = pf.AutoHierarchicalFlow(rows, init="prior").initialize(x, 500)
    module = torch.nn.parallel.DistributedDataParallel(Trace_ELBO()(rows, guide))
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
    own = RowsOfRank(Ranks(rank, size), 0)

    def step() -> None:
        optimizer.zero_grad()
        with own:
            loss = module(x, 500)
        loss.backward()
        optimizer.step()

    milliseconds = timed(step, time.perf_counter)
    if rank == 0:
        found.put(milliseconds)
    distributed.destroy_process_group()


def processes(size: int) -> float:
    """Time a step of so many processes, each with its rows, by the clock."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = [
            context.Process(target=together, args=(rank, size, f"{folder}/join", found)) for rank in range(size)
        ]
        for one in all_of_them:
            one.start()
        milliseconds: float = found.get(timeout=300)
        for one in all_of_them:
            one.join()
    return milliseconds


MEASURES: dict[str, Callable[[int], float]] = {
    "dim": lambda size: path(size, 16),
    "particles": lambda size: path(30, size),
    "rows": lambda size: minibatch(size, 100),
    "batch": lambda size: minibatch(10_000, size),
    "draws": drawing,
    "processes": processes,
}


def measure(part: str, size: int) -> Row:
    """Return the row of one size."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    milliseconds = MEASURES[part](size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    made = {"part": part, "size": str(size), "milliseconds": f"{milliseconds:.3f}", "megabytes": f"{peak:.0f}"}
    return {
        **made,
        "version": records.code_version(),
        "machine": records.machine(),
        "software": records.software(),
    }


def slope(found: Sequence[Row], of: str) -> float:
    """Return the slope of the logarithm between the two largest sizes."""
    first, last = found[-2:]
    return math.log(float(last[of]) / float(first[of])) / math.log(float(last["size"]) / float(first["size"]))


def lines(found: Sequence[Row]) -> str:
    """Return the table of all parts in Markdown."""
    shown = []
    for part, title in TITLES.items():
        own = [row for row in found if row["part"] == part]
        if own:
            sizes = ", ".join(f"{int(row['size']):,}" for row in own)
            times = ", ".join(f"{float(row['milliseconds']):.3g}" for row in own)
            memory = ", ".join(row["megabytes"] for row in own)
            shown.append([title, sizes, times, f"{slope(own, 'milliseconds'):.2f}", memory])
    return table(["what grows", "sizes", "milliseconds", "slope at the end", "megabytes"], shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(SIZES), choices=list(SIZES), help="what grows")
    options = parser.parse_args(arguments)
    kept = [row for row in records.start(OUT, FIELDS) if row["part"] not in options.parts]
    records.write(OUT, FIELDS, kept)
    found = list(kept)
    for part in options.parts:
        for size in SIZES[part]:
            if part == "processes":
                row = measure(part, size)
            else:
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    row = pool.apply(measure, (part, size))
            records.append(OUT, FIELDS, row)
            found.append(row)
            print(f"{part} {size}: {row['milliseconds']} ms, {row['megabytes']} MB", flush=True)
    print(lines(found))


if __name__ == "__main__":
    main()
