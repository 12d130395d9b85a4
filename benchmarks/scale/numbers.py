"""Fits of models with known posteriors in both precisions: scales, near-singular covariances, sizes, time and memory.

    python -m benchmarks.scale.numbers --kinds scale latents

One row of the CSV file is one fit, in a process of its own with one thread. Its errors are those of the weighted draws
against the closed form: the largest error of a mean in posterior standard deviations, and the largest absolute log
ratio of standard deviations, over all latents.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row

OUT = records.RESULTS / "numbers.csv"
FIELDS = (
    *("kind", "size", "dtype", "status", "mean_error", "sd_error", "seconds", "megabytes"),
    *("error", "version", "machine", "software"),
)
SIZES: dict[str, tuple[float, ...]] = {
    "scale": (1e-8, 1e-4, 1.0, 1e4, 1e8),
    "scales side by side": (1e1, 1e4, 1e8),
    "correlation": (1e-2, 1e-4, 1e-6, 1e-8),
    "latents": (1, 10, 100, 1_000, 3_000),
    "rows": (100, 10_000, 1_000_000),
}
TITLES = {
    "scale": "all latents and data times s",
    "scales side by side": "three latents of scales 1/s, 1 and s",
    "correlation": "five latents, each pair with a correlation of 1 - s",
    "latents": "s latents, each observed with its neighbor",
    "rows": "s rows, mean and precision unknown",
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DRAWS = 4000
TOLERANCE = 0.1  # of means in sds, and of log sds: four standard errors of 4000 draws, for three thousand latents


class Problem(NamedTuple):
    """A model, its arguments, and the exact means and sds of each site."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    means: dict[str, Tensor]
    sds: dict[str, Tensor]


def exact(prior: Tensor, map_: Tensor, noise: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return means and sds of x ~ N(0, prior) given y ~ N(map x, diag(noise^2))."""
    precision = torch.linalg.inv(prior) + map_.T @ (map_ / noise.square()[:, None])
    covariance = torch.linalg.inv(precision)
    return {"x": covariance @ (map_.T @ (y / noise.square()))}, {"x": covariance.diagonal().sqrt()}


def scaled(scales: Tensor, dtype: torch.dtype) -> Problem:
    """Latents of these scales, each observed twice."""
    y = torch.randn(2, len(scales), dtype=torch.float64) * scales

    def model(y: Tensor, scales: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros_like(scales), 3.0 * scales).to_event(1))
        with pyro.plate("row", 2):
            pyro.sample("y", dist.Normal(x, scales).to_event(1), obs=y)

    map_ = torch.eye(len(scales), dtype=torch.float64).repeat(2, 1)
    known = exact((3.0 * scales).square().diag(), map_, scales.repeat(2), y.flatten())
    return Problem(model, (y.to(dtype), scales.to(dtype)), *known)


def correlated(gap: float, dtype: torch.dtype) -> Problem:
    """Five latents whose prior is near-singular, each observed."""
    identity, y = torch.eye(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    prior = (1.0 - gap) + gap * identity

    def model(y: Tensor, root: Tensor) -> None:
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=root))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    root = torch.linalg.cholesky(prior)
    return Problem(model, (y.to(dtype), root.to(dtype)), *exact(prior, identity, torch.ones_like(y), y))


def chained(dim: int, dtype: torch.dtype) -> Problem:
    """Latents that are observed together with their neighbors."""
    y = torch.randn(dim, dtype=torch.float64)

    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
        before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        pyro.sample("y", dist.Normal(x + 0.5 * before, 0.7).to_event(1), obs=y)

    identity = torch.eye(dim, dtype=torch.float64)
    map_ = identity + 0.5 * torch.diag(torch.ones(dim - 1, dtype=torch.float64), -1)
    return Problem(model, (y.to(dtype),), *exact(identity, map_, torch.full_like(y, 0.7), y))


def many_rows(count: int, dtype: torch.dtype) -> Problem:
    """tau ~ Gamma(2, 2), mu ~ N(0, 1 / (.1 tau)), rows N(mu, 1 / tau): a normal-gamma posterior."""
    y = 3.0 + 2.0 * torch.randn(count, dtype=torch.float64)

    def model(y: Tensor) -> None:
        two, tenth = y.new_tensor(2.0), y.new_tensor(0.1)
        tau = pyro.sample("tau", dist.Gamma(two, two))
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(two), (tenth * tau).rsqrt()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    given = y.to(dtype).double()  # what the model sees
    weight, shape = 0.1 + count, 2.0 + 0.5 * count
    mean = given.sum() / weight
    rate = 2.0 + 0.5 * ((given - given.mean()).square().sum() + 0.1 * count * given.mean().square() / weight)
    means = {"tau": shape / rate, "mu": mean}
    return Problem(
        model, (y.to(dtype),), means, {"tau": shape**0.5 / rate, "mu": (rate / ((shape - 1.0) * weight)).sqrt()}
    )


def problem(kind: str, size: float, dtype: torch.dtype) -> Problem:
    """Return a model of this kind and size, from its seed."""
    pyro.set_rng_seed(0)
    if kind == "scale":
        return scaled(torch.full((3,), size, dtype=torch.float64), dtype)
    if kind == "scales side by side":
        return scaled(torch.tensor([1.0 / size, 1.0, size], dtype=torch.float64), dtype)
    made = {"correlation": correlated, "latents": chained, "rows": many_rows}[kind]
    return made(size if kind == "correlation" else round(size), dtype)  # type: ignore[operator]


def errors(posterior: pf.Posterior, known: Problem) -> tuple[float, float]:
    """Return the largest error of a mean in sds, and the largest absolute log ratio of sds."""
    of_means, of_sds = [], []
    for name, mean in known.means.items():
        draws = posterior.samples[name].double()
        of_means.append(((draws.mean(0) - mean).abs() / known.sds[name]).max())
        of_sds.append((draws.std(0) / known.sds[name]).log().abs().max())
    return float(max(of_means)), float(max(of_sds))


def fill(row: dict[str, Any], limit: float = math.inf) -> None:
    """Fit one problem, and put its figures into the row."""
    known = problem(row["kind"], float(row["size"]), DTYPES[row["dtype"]])
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pf.fit(known.model, *known.args, draws=DRAWS, max_seconds=limit, progress=False)
    row.update(seconds=time.process_time() - began, status=found.verdict.status)
    row["mean_error"], row["sd_error"] = errors(found, known)
    row["megabytes"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0:.0f}"


def measure(kind: str, size: float, dtype: str, limit: float = math.inf) -> Row:
    """Return the row of one fit."""
    row = {**dict.fromkeys(FIELDS, ""), "kind": kind, "size": f"{size:g}", "dtype": dtype}
    return records.attempt({**row, "version": records.code_version()}, lambda row: fill(row, limit))


def agree(found: Sequence[Row]) -> bool:
    """Whether a fit that is trusted is within the tolerance, or is not trusted."""
    return all(
        row["status"] == "unreliable" or max(float(row["mean_error"]), float(row["sd_error"])) < TOLERANCE
        for row in found
    )


def section(rows: Sequence[Row]) -> str:
    """Return the table of all fits in Markdown."""
    shown = []
    for kind, title in TITLES.items():
        for number, size in enumerate(dict.fromkeys(row["size"] for row in rows if row["kind"] == kind)):
            mine = {row["dtype"]: row for row in rows if row["kind"] == kind and row["size"] == size}
            cells = [" / ".join(_cell(mine.get(dtype), name) for dtype in DTYPES) for name in SHOWN]
            shown.append(["" if number else title, size, *cells])
    text = (
        "Fits of models whose posteriors are known, in single and double precision (in this order), with one thread. "
        "Errors are the largest over all latents: of means in posterior standard deviations, and of log standard "
        f"deviations. Up to {TOLERANCE:g} they are within what {DRAWS} draws tell."
    )
    head = ["what has size s", "s", "verdict", "error of means", "of log sds", "CPU-seconds", "megabytes"]
    versions = ", ".join(dict.fromkeys(row["version"] for row in rows))
    return f"{text}\n\n{about(rows)} pyro_flows {versions}.\n\n{table(head, shown)}"


SHOWN = {"status": "", "mean_error": ".3f", "sd_error": ".3f", "seconds": ".1f", "megabytes": ""}


def _cell(row: Row | None, name: str) -> str:
    if row is None or row["error"]:
        return "-" if row is None else "refused" if name == "status" else "-"
    return f"{float(row[name]):{SHOWN[name]}}" if SHOWN[name] else row[name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.numbers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kinds", nargs="+", default=list(SIZES), choices=list(SIZES), help="what has a size")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="of a fit")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows")
    options = parser.parse_args(arguments)
    kept = [row for row in records.start(options.out, FIELDS) if row["kind"] not in options.kinds]
    records.write(options.out, FIELDS, kept)
    measure("scale", 1.0, "float64")  # what is imported on the way, no fit has to import
    for kind in options.kinds:
        for size in SIZES[kind]:
            for dtype in DTYPES:
                with multiprocessing.get_context("fork").Pool(1) as pool:
                    row = pool.apply(measure, (kind, size, dtype, options.max_seconds))
                records.append(options.out, FIELDS, row)
                print(*(row[name] for name in FIELDS[:9]), flush=True)
    print(section(records.read(options.out)))


if __name__ == "__main__":
    main()
