"""Ten batches one after the other, the posterior of each the prior of the next, against all data at once.

    python -m benchmarks.priors --seeds 3

Two problems: a logistic regression with five coefficients, 100 rows a batch; and counts of 12 new groups a batch, whose
effects are latents of their own, so that only the mean, a slope and the scale of the effects go on. Each seed has other
data. Methods: ``prior_from``, and a multivariate normal distribution of the unconstrained draws, as PyMC's
``prior_from_idata`` makes it. A row of the CSV file is one chain: how far its last prior is from the posterior of all
data, and how far it says it may be. What is right comes from one fit of all data, by weighted draws or Markov
chains, in which the effects of groups are integrated out by quadrature.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.markdown import about, table
from benchmarks.records import Row
from pyro_flows.priors.errors import UNKNOWN, Sample, box, equal, moments
from pyro_flows.priors.making import parts_of
from pyro_flows.priors.parts import coordinates

OUT = records.RESULTS / "chains.csv"
BATCHES, SEEDS = 10, 3
METHODS = ("prior_from", "normal")
NODES = 48  # of the quadrature over the effect of a group
REFERENCE_DRAWS = 100_000  # of the last prior, and of all data at once
MEASURED = 0.012  # what the comparison of so many draws may be off by, for all coordinates with 95 %
REFERENCE_ERROR = MEASURED / 3.0  # standard error of a mean, in sds, or log sd: independent draws have .003 of it
MEAN_GOAL, SD_GOAL = 0.15, 0.15  # sds; log ratio
KEY = ("problem", "method", "seed", "version")
FIELDS = (
    *KEY,
    *("links", "mean_off", "sd_off", "mean_error", "sd_error", "verdicts", "seconds", "error", "machine", "software"),
)
Prior = pf.FittedPrior | None


# problems -------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model of one batch, ``model(*batch, prior)``; one of all data, ``whole(*data)``; and its sites."""

    model: Callable[..., None]
    whole: Callable[..., None]
    sites: tuple[str, ...]
    data: Callable[[torch.Generator], tuple[Tensor, ...]]


def logistic(x: Tensor, y: Tensor, prior: Prior = None) -> None:
    """A logistic regression."""
    wide = dist.Normal(x.new_zeros(x.shape[1]), 2.5).to_event(1)
    beta = pyro.sample("beta", wide) if prior is None else prior.sample()["beta"]
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def _logistic_data(generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn(100 * BATCHES, 5, generator=generator)
    x[:, 0], x[:, 2] = 1.0, 0.6 * x[:, 1] + 0.8 * x[:, 2]
    chance = torch.sigmoid(x @ torch.tensor([-0.5, 1.0, -0.7, 0.3, 0.0]))
    return x, (torch.rand(len(x), generator=generator) < chance).float()


def _tops(prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
    if prior is None:
        mean, slope = pyro.sample("mean", dist.Normal(0.0, 2.0)), pyro.sample("slope", dist.Normal(0.0, 1.0))
        return mean, slope, pyro.sample("scale", dist.HalfNormal(1.0))
    values = prior.sample()
    return values["mean"], values["slope"], values["scale"]


def counts(x: Tensor, y: Tensor, prior: Prior = None) -> None:
    """Counts (groups, 4) with an effect of each group."""
    mean, slope, scale = _tops(prior)
    with pyro.plate("group", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        rate = mean + slope * x + scale * effect[..., None]
        pyro.sample("y", dist.Poisson(rate.exp()).to_event(1), obs=y)


def counts_at_once(x: Tensor, y: Tensor) -> None:
    """The same without the effects."""
    mean, slope, scale = _tops(None)
    nodes, weights = (torch.as_tensor(part, dtype=y.dtype) for part in np.polynomial.hermite_e.hermegauss(NODES))
    rate = mean + slope * x[..., None] + scale * nodes
    each = dist.Poisson(rate.exp()).log_prob(y[..., None]).sum(1)
    pyro.factor("y", (torch.logsumexp(each + weights.log(), -1) - 0.5 * math.log(2.0 * math.pi)).sum())


def _counts_data(generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn(12 * BATCHES, 4, generator=generator)
    effect = torch.randn(len(x), 1, generator=generator)
    return x, torch.poisson((0.8 + 0.3 * x + 0.6 * effect).exp(), generator=generator)


PROBLEMS = {
    "logistic regression": Problem(logistic, logistic, ("beta",), _logistic_data),
    "hierarchical counts": Problem(counts, counts_at_once, ("mean", "slope", "scale"), _counts_data),
}


# chains ---------------------------------------------------------------------------------------------------------------


def of_normal(posterior: pf.Posterior, sites: Sequence[str]) -> pf.FittedPrior:
    """Return the multivariate normal distribution with the moments of the unconstrained draws."""
    density = posterior.density
    assert density is not None
    names = [name for name in density.names if name in (*sites, "prior")]
    parts = {name: parts_of(density, name) for name in names}
    z = torch.cat([coordinates(parts[name], posterior.samples[name])[0] for name in names], -1)
    scale = torch.linalg.cholesky(z.double().T.cov().reshape(z.shape[1], -1)).to(z)
    flow = pf.Flow(pf.transforms.LowerTriangularAffine(z.shape[1], loc=z.mean(0), scale_tril=scale))
    whole = [part for own in parts.values() for part in own]
    return pf.FittedPrior(flow, whole, status=posterior.verdict.status, verdict=str(posterior.verdict), error=UNKNOWN)


def of_flow(posterior: pf.Posterior, sites: Sequence[str]) -> pf.FittedPrior:
    """Return what ``prior_from`` makes."""
    assert posterior.density is not None
    return pf.prior_from(posterior, [name for name in posterior.density.names if name in (*sites, "prior")])


def moments_of(prior: pf.FittedPrior) -> tuple[Tensor, Tensor]:
    """Return the means and sds of a prior's coordinates, by the names of its sites in order."""
    with torch.no_grad():
        z = prior.flow.draw(REFERENCE_DRAWS)[0]
    found = moments(Sample(z, equal(z)), box(z))
    sizes = [part.size for part in prior.parts]
    places = dict(zip(prior.sites, torch.arange(sum(sizes)).split(sizes), strict=True))
    order = torch.cat([places[name] for name in sorted(places)])
    return found.mean[order], found.sd[order]


def at_once(problem: Problem, data: tuple[Tensor, ...], draws: int = REFERENCE_DRAWS) -> tuple[Tensor, Tensor]:
    """Return the means and sds given all data."""
    posterior = pf.fit(problem.whole, *data, draws=draws, progress=False)
    assert posterior.verdict.status in ("ok", "refined"), posterior.verdict
    density = posterior.density
    assert density is not None
    columns = [coordinates(parts_of(density, name), posterior.samples[name])[0] for name in sorted(problem.sites)]
    z = torch.cat(columns, -1)
    weights = equal(z) if posterior.chain_count > 1 else posterior.log_weights.double().exp()
    found = moments(Sample.of(z, weights, posterior.chain_count), box(z))
    error = float(torch.cat([found.mean_error, found.sd_error]).max())
    assert error <= REFERENCE_ERROR, f"the reference has a standard error of {error:.4f}; draw more"
    return found.mean, found.sd


def chain(problem: Problem, method: str, data: tuple[Tensor, ...], seed: int) -> tuple[pf.FittedPrior, list[str]]:
    """Fit all batches one after the other; return the last prior and the verdicts."""
    make: Any = {"prior_from": of_flow, "normal": of_normal}[method]
    prior, statuses = None, []
    for batch in zip(*(part.chunk(BATCHES) for part in data), strict=True):
        posterior = pf.fit(problem.model, *batch, prior, seed=seed, progress=False)
        prior = make(posterior, problem.sites)
        statuses.append(posterior.verdict.status)
    assert prior is not None
    return prior, statuses


def measure(name: str, method: str, seed: int, version: str) -> Row:
    """Do one chain and return its row."""
    row: dict[str, Any] = {**dict.fromkeys(FIELDS, ""), "problem": name, "method": method, "seed": seed}
    row["version"] = version

    def fill(row: dict[str, Any]) -> None:
        problem = PROBLEMS[name]
        data = problem.data(torch.Generator().manual_seed(seed))
        began = time.process_time()
        prior, statuses = chain(problem, method, data, seed)
        row["seconds"] = time.process_time() - began
        row["verdicts"] = ", ".join(f"{statuses.count(one)} {one}" for one in dict.fromkeys(statuses))
        (mean, sd), (right, spread) = moments_of(prior), at_once(problem, data)
        row["mean_off"] = float(((mean - right) / spread).abs().max())
        row["sd_off"] = float((sd / spread).log().abs().max())
        if method == "prior_from":
            row["links"], row["mean_error"], row["sd_error"] = prior.links, prior.mean_error, prior.sd_error

    return records.attempt(row, fill)


def section(rows: Sequence[Row]) -> str:
    """Return the text and the table, of the newest row of each chain."""
    newest = list({(row["problem"], row["method"], row["seed"]): row for row in rows}.values())
    ours = [row for row in newest if row["method"] == "prior_from" and not row["error"]]
    good = sum(float(row["mean_off"]) <= MEAN_GOAL and float(row["sd_off"]) <= SD_GOAL for row in ours)
    covered = sum(_covered(row) for row in ours)
    text = (
        f"Chains of {BATCHES} batches, against all data at once: the largest difference of a mean, in standard "
        "deviations, and of a standard deviation, over unconstrained coordinates; the worst of "
        f"{len({row['seed'] for row in newest})} seeds, each with other data. In brackets: what `prior_from` states. "
        f"{good} of {len(ours)} chains of `prior_from` are within {MEAN_GOAL} standard deviations and "
        f"{100 * SD_GOAL:.0f} %. In {covered} of {len(ours)}, the stated errors cover the true ones."
    )
    versions = ", ".join(dict.fromkeys(row["version"] for row in newest))
    header = ("problem", "method", "means off by, sd", "sds off by, %", "verdicts", "CPU s")
    body = [line for name in PROBLEMS for method in METHODS if (line := _line(newest, name, method))]
    return "\n\n".join([text, f"{about(newest)} pyro_flows {versions}.", table(header, body)])


def _covered(row: Row) -> bool:
    return all(float(row[f"{what}_off"]) <= float(row[f"{what}_error"]) + MEASURED for what in ("mean", "sd"))


def _line(rows: Sequence[Row], name: str, method: str) -> list[str]:
    mine = [row for row in rows if (row["problem"], row["method"]) == (name, method)]
    if not mine:
        return []
    if failed := [row["error"] for row in mine if row["error"]]:
        return [name, method, f"failed: {failed[0]}", "", "", ""]
    worst = {what: max(mine, key=lambda row, what=what: float(row[f"{what}_off"])) for what in ("mean", "sd")}
    cells = [f"{float(worst['mean']['mean_off']):.3f}", f"{100 * math.expm1(float(worst['sd']['sd_off'])):.1f}"]
    if method == "prior_from":
        cells[0] += f" ({float(worst['mean']['mean_error']):.3f})"
        cells[1] += f" ({100 * math.expm1(float(worst['sd']['sd_error'])):.1f})"
    shown = {"prior_from": "`prior_from`", "normal": "multivariate normal"}[method]
    verdicts = "; ".join(dict.fromkeys(row["verdicts"] for row in mine))
    seconds = sum(float(row["seconds"]) for row in mine) / len(mine)
    return [name, shown, *cells, verdicts, f"{seconds:.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.priors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=SEEDS, help=f"of data and fits (default: {SEEDS})")
    parser.add_argument("--only", nargs="+", default=list(PROBLEMS), choices=PROBLEMS, help="these problems only")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="these methods only")
    parser.add_argument("--out", type=Path, default=OUT, help="the CSV file")
    options = parser.parse_args(arguments)
    version = records.code_version()
    done = {tuple(row[name] for name in KEY) for row in records.start(options.out, FIELDS)}
    for seed in range(options.seeds):
        for name in options.only:
            for method in options.methods:
                if (name, method, str(seed), version) not in done:
                    row = measure(name, method, seed, version)
                    records.append(options.out, FIELDS, row)
                    found = ", ".join(f"{key} {row[key]}" for key in FIELDS[len(KEY) + 1 : -2])
                    print(f"{name}, {method}, seed {seed}: {found}", flush=True)
