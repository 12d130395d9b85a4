"""Regressions of very many rows: seconds of our fit beside those of NumPyro's NUTS, in one run.

    python -m benchmarks.scale.regressions --numpyro PYTHON --only poisson_groups

One row of the CSV file is one model: our fit with its default options, and NUTS with four chains of 1000 draws after as
many of warm-up, compilation included, each in a process of its own with one thread. The errors are those between the
two: the largest difference of a mean in NUTS's standard deviations, and the largest absolute log ratio of standard
deviations, over all unconstrained coordinates.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.nuts import running as nuts
from benchmarks.nuts import samplers
from benchmarks.posteriors.models import Problem
from benchmarks.records import Row

OUT = records.RESULTS / "regressions.csv"
FIELDS = (
    *("model", "rows", "dim", "status", "seconds", "parts", "numpyro_seconds", "mean_error", "sd_error"),
    *("error", "version", "numpyro_version", "machine", "software"),
)
GROUPS = 85


def logistic_rows(x: Tensor, y: Tensor) -> None:
    """A logistic regression."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_data(rows: int) -> tuple[Tensor, ...]:
    """Ten predictors, and outcomes."""
    rng = np.random.default_rng(0)
    x, beta = rng.normal(size=(rows, 10)), 0.5 * rng.normal(size=10)
    return _tensor(x), _tensor(rng.random(rows) < 1.0 / (1.0 + np.exp(-x @ beta)))


def poisson_groups(group: Tensor, x: Tensor, y: Tensor) -> None:
    """Counts whose log rate has an intercept for each of 85 groups, and a slope."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("group", GROUPS):
        level = pyro.sample("level", dist.Normal(mu, tau))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((level[group] + slope * x).exp()), obs=y)


def poisson_data(rows: int) -> tuple[Tensor, ...]:
    """Groups, a predictor, and counts of 3 on average."""
    rng = np.random.default_rng(0)
    group, level, x = rng.integers(0, GROUPS, rows), 1.0 + 0.5 * rng.normal(size=GROUPS), rng.normal(size=rows)
    return torch.from_numpy(group), _tensor(x), _tensor(rng.poisson(np.exp(level[group] + 0.3 * x)))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()


class Regression(NamedTuple):
    """A model, its data for some rows, and how many rows."""

    model: Callable[..., None]
    data: Callable[[int], tuple[Tensor, ...]]
    rows: int


MODELS = {
    "logistic_rows": Regression(logistic_rows, logistic_data, 1_000_000),
    "poisson_groups": Regression(poisson_groups, poisson_data, 100_000),
}


def fill(row: dict[str, Any]) -> None:
    """Fit one model, run NUTS on it where there is NumPyro, and put the figures into the row."""
    regression = MODELS[row["model"]]
    problem = Problem(row["model"], regression.model, regression.data(int(row["rows"])), {}, None)
    ours = samplers.fit(problem, 0, draws=4000)
    assert ours.draws is not None
    row.update(dim=ours.draws.shape[1], seconds=ours.cpu_seconds, status=ours.notes["status"])
    row["parts"] = ours.notes["parts"]
    if not row["numpyro_version"]:
        return
    theirs = samplers.numpyro_nuts(problem, 0)
    assert theirs.draws is not None
    one, other = ours.draws.double(), theirs.draws.double()
    row["numpyro_seconds"] = theirs.cpu_seconds
    row["mean_error"] = float(((one.mean(0) - other.mean(0)).abs() / other.std(0)).max())
    row["sd_error"] = float((one.std(0) / other.std(0)).log().abs().max())


def measure(name: str, rows: int) -> Row:
    """Return the row of one model."""
    torch.set_num_threads(1)
    row = {**dict.fromkeys(FIELDS, ""), "model": name, "rows": str(rows), "version": records.code_version()}
    return records.attempt({**row, "numpyro_version": samplers.numpyro_version() or ""}, fill)


def section(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    shown = []
    for row in rows:
        cells = [f"{float(row[name]):.0f}" if row[name] else "" for name in ("seconds", "numpyro_seconds")]
        cells += [f"{float(row[name]):.3f}" if row[name] else "" for name in ("mean_error", "sd_error")]
        shown.append([row["model"], f"{int(row['rows']):,}", row["dim"], row["status"], *cells])
    head = ["model", "rows", "D", "verdict", "pyro_flows.fit", "NumPyro NUTS", "difference of means", "of log sds"]
    versions = ", ".join(
        dict.fromkeys(row[name] for name in ("version", "numpyro_version") for row in rows if row[name])
    )
    return f"{about(rows)} {versions}.\n\n{table(head, shown)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.regressions", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="only these models")
    parser.add_argument("--rows", type=records.positive, default=None, help="rows, if not as many as in the table")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows")
    nuts.add_numpyro(parser)
    options = parser.parse_args(arguments)
    nuts.name_numpyro(options)
    for name in options.only:
        rows = options.rows or MODELS[name].rows
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (name, rows))
        kept = [one for one in records.start(options.out, FIELDS) if (one["model"], one["rows"]) != (name, str(rows))]
        records.write(options.out, FIELDS, [*kept, row])
    print(section(records.read(options.out)))


if __name__ == "__main__":
    main()
