"""Eight schools as users write them, in new processes: seconds from the first import to the verdict.

    python -m benchmarks.cold --repeats 5

The model is centered, its data are in single precision, Pyro's default. One thread. A first process that does not count
compiles the bytecode, as an installation does, and the C code that is kept between processes. Seconds are of the wall
clock, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.markdown import about, range_text, table

OUT = records.RESULTS / "cold.csv"
PARTS = ("torch and Pyro", "pyro_flows", "fit")
FIELDS = ("seed", "repeat", *PARTS, "verdict", "version", "machine", "software")
SCRIPT = """
import json, sys, time
clock = [time.perf_counter()]
import pyro, torch
import pyro.distributions as dist
clock.append(time.perf_counter())
import pyro_flows
clock.append(time.perf_counter())
y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

def model(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)

posterior = pyro_flows.fit(model, y, sigma, seed=int(sys.argv[1]), progress=False)
clock.append(time.perf_counter())
print(json.dumps([*(after - before for before, after in zip(clock, clock[1:])), posterior.verdict.status]))
"""


def run(seed: int) -> list[object]:
    """Return the seconds of each part in a new process, and the verdict."""
    unset = {"PYTHONDONTWRITEBYTECODE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(seed)], env=environment, capture_output=True, text=True, check=True
    )
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def section(rows: Sequence[records.Row]) -> str:
    """Return the section about new processes."""
    cells = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        each = [[float(row[part]) for row in mine] for part in PARTS]
        total = [sum(parts) for parts in zip(*each, strict=True)]
        medians = (f"{statistics.median(values):.2f}" for values in (*each, total))
        verdicts = ", ".join(dict.fromkeys(row["verdict"] for row in mine))
        cells.append([seed, *medians, range_text(total, 2), verdicts])
    text = "Eight schools, centered, in single precision, each in a new process with one thread: seconds, medians."
    head = ["seed", *PARTS, "in all", "from, to", "verdict"]
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    return f"{text}\n\n{about(rows)} pyro_flows {versions}.\n\n{table(head, cells)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=records.positive, default=5, help="processes for each seed (default: 5)")
    parser.add_argument("--seeds", type=records.positive, default=3, help="how many (default: 3)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, written anew")
    options = parser.parse_args(arguments)
    records.write(options.out, FIELDS, [])
    run(0)
    about_run = (records.code_version(), records.machine(), records.software())
    for repeat in range(options.repeats):
        for seed in range(options.seeds):
            *seconds, verdict = run(seed)
            row = (seed, repeat, *(f"{value:.3f}" for value in seconds), verdict, *about_run)
            records.append(options.out, FIELDS, dict(zip(FIELDS, row, strict=True)))
    print(section(records.read(options.out)))


if __name__ == "__main__":
    main()
