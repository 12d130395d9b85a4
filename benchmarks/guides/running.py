"""Train guides in Pyro's SVI for equal seconds, and estimate their ELBO: ours, and Pyro's.

    python -m benchmarks.guides --models banana gp --guides ours iaf --rates .01 --seconds 10

Adam, 16 particles a step; Pyro's are vectorized. One row of the CSV file is one run, in a process of its own. Seconds
are those of the processor, from before the guide is made: setting up, a start and recording count. At the end the ELBO
is estimated by 10,000 draws, and by up to 200,000 until its error is .005 nats. They do not count. A run that has
a row of the same version is not done again. The guide ``splines`` needs zuko (``pip install zuko``).
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor

import pyro_flows as pf
from benchmarks import records
from benchmarks.guides.models import MODELS, funnel
from benchmarks.records import Row

OUT = records.RESULTS / "guides.csv"
RATES = (0.001, 0.01, 0.1)
PARTICLES = 16
DRAWS, MOST_DRAWS, TOGETHER = 10_000, 200_000, 500
ERROR, HOPELESS = 0.005, 1.0  # nats, of an ELBO: few draws decide it where log p - log q has a long left tail
UNTIMED = 3  # steps after which the seconds of a step are counted: the first sets up
KEY = ("model", "guide", "rate", "budget", "seed", "version")
FIELDS = (*KEY, "elbo", "elbo_error", "steps", "ms", "setup", "seconds", "layers", "error", "machine", "software")


def _affine_autoregressive(model: Any) -> Any:
    stack = functools.partial(transforms.iterated, 3, transforms.affine_autoregressive)
    return autoguide.AutoNormalizingFlow(model, stack)


class _Splines(dist.TransformModule):
    """Zuko's neural spline flow in the direction that draws in one pass, as Pyro's inverse autoregressive flow."""

    domain = codomain = dist.constraints.real_vector
    bijective = True

    def __init__(self, dim: int) -> None:
        super().__init__(cache_size=1)
        import zuko

        self.flow = zuko.flows.NSF(dim, transforms=2, hidden_features=(32, 32))

    def _call(self, x: Tensor) -> Tensor:
        y, self._ladj = self.flow.transform().call_and_ladj(x)
        return y

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant of the pass that made ``y``."""
        return self._ladj


GUIDES: dict[str, Callable[[Any], Any]] = {
    "ours": pf.AutoRealNVP,
    "ours_trace": pf.AutoRealNVP,
    "plates": pf.AutoHierarchicalFlow,
    "normal": autoguide.AutoNormal,
    "full_rank": autoguide.AutoMultivariateNormal,
    "low_rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": functools.partial(autoguide.AutoIAFNormal, num_transforms=2),
    "affine_autoregressive": _affine_autoregressive,
    "splines": lambda model: autoguide.AutoNormalizingFlow(model, _Splines),
}
OURS = ("ours", "ours_trace", "plates")


@dataclass(frozen=True)
class Task:
    """One run to be done."""

    model: str
    guide: str
    rate: float
    budget: float
    seed: int
    version: str

    @property
    def named(self) -> dict[str, str]:
        """The columns that tell its row from others."""
        return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in asdict(self).items()}

    @property
    def key(self) -> tuple[str, ...]:
        """Their values."""
        return tuple(self.named[name] for name in KEY)


def loss_of(guide: str) -> Any:
    """Return the loss that a guide is trained with."""
    if guide == "ours":  # by paths
        return pf.PathELBO(num_particles=PARTICLES)
    return Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)


def train(row: dict[str, Any], task: Task, *, most: int | None = None) -> tuple[Any, tuple[Any, ...]]:
    """Train one guide until its seconds, or ``most`` steps, are over; return it and the model's arguments."""
    case = MODELS[task.model]
    arguments = case.arguments()
    pyro.clear_param_store()
    pyro.set_rng_seed(task.seed)
    began = time.process_time()
    guide = GUIDES[task.guide](case.model)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": task.rate}), loss=loss_of(task.guide))
    steps, since = 0, began
    while time.process_time() - began < task.budget and (most is None or steps < most):
        svi.step(*arguments)
        steps += 1
        if steps == UNTIMED:
            since = time.process_time()
        row["steps"] = steps
    row["seconds"] = time.process_time() - began
    row["setup"] = since - began if steps >= UNTIMED else row["seconds"]
    row["ms"] = 1e3 * (row["seconds"] - row["setup"]) / (steps - UNTIMED) if steps > UNTIMED else math.nan
    flow = guide._top if task.guide == "plates" else guide
    row["layers"] = flow._recipe.options["layers"] if task.guide in OURS else ""
    return guide, arguments


@torch.no_grad()
def elbo(
    model: Any, guide: Any, arguments: Sequence[Any], draws: int = DRAWS, most: int = MOST_DRAWS
) -> tuple[float, float]:
    """Return the ELBO in nats and its standard error, by Pyro's own handlers: by as many draws as the error needs."""
    loss = Trace_ELBO(num_particles=min(TOGETHER, draws), vectorize_particles=True)
    terms, error = list[Tensor](), math.inf
    with pyro.validation_enabled(False):
        while (have := len(terms) * TOGETHER) < draws or (have < most and ERROR < error < HOPELESS):
            for model_trace, guide_trace in loss._get_traces(model, guide, tuple(arguments), {}):
                log_p, log_q = (_by_particle(trace, loss.num_particles) for trace in (model_trace, guide_trace))
                terms.append(log_p - log_q)
            found = torch.cat(terms)
            error = float(found.std() / len(found) ** 0.5)
    return float(found.mean()), error


def _by_particle(trace: Any, particles: int) -> Tensor:
    """Return the log density of each particle, in double precision."""
    trace.compute_log_prob()
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    parts = (site["log_prob"].double() for site in sites)
    return sum((part.reshape(particles, -1).sum(1) for part in parts), torch.zeros((), dtype=torch.double))


def work(task: Task) -> Row:
    """Do one run and return its row; an exception is recorded in the column ``error``."""

    def fill(row: dict[str, Any]) -> None:
        guide, arguments = train(row, task)
        row["elbo"], row["elbo_error"] = elbo(MODELS[task.model].model, guide, arguments)

    return records.attempt({**dict.fromkeys(FIELDS, ""), **task.named}, fill)


def apart(task: Task) -> Row:
    """Do one run in a new process, which has neither graphs nor compiled code of the runs before."""
    logging.getLogger("pyro").setLevel(logging.WARNING)
    _import_all()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, (task,))


@functools.cache
def _import_all() -> None:
    """Let a first step of each loss import what torch and Pyro import late: a second, which no run should pay."""
    for kind, loss in (
        (autoguide.AutoNormal, Trace_ELBO()),
        (functools.partial(pf.AutoPlanar, layers=1), pf.PathELBO()),
    ):
        pyro.clear_param_store()
        SVI(funnel, kind(funnel), pyro.optim.Adam({}), loss=loss).step(1)


def bench(
    *,
    models: Sequence[str] = (),
    guides: Sequence[str] = (),
    rates: Sequence[float] = RATES,
    seconds: float = 10.0,
    seed: int = 0,
    out: Path = OUT,
    do: Callable[[Task], Row] = apart,
) -> list[Row]:
    """Do all runs that ``out`` does not have yet, one after the other; return their rows.

    Args:
        models: names, all by default.
        guides: names, all by default.
        rates: of Adam.
        seconds: of the processor for each run.
        seed: of all random numbers.
        out: the CSV file.
        do: what does a run.

    Raises:
        ValueError: for an unknown model or guide.
    """
    for kind, names, known in (("models", models, MODELS), ("guides", guides, GUIDES)):
        for name in names:
            if name not in known:
                raise ValueError(f"{kind}: expected one of {', '.join(known)}, got {name!r}.")
    ours, theirs = records.code_version(), f"pyro-{version('pyro-ppl')}"
    rows = {tuple(row[name] for name in KEY): row for row in records.start(out, FIELDS)}
    tasks = [
        Task(model, guide, rate, float(seconds), seed, ours if guide in OURS else theirs)
        for model in models or MODELS
        for rate in rates
        for guide in guides or GUIDES
    ]
    for task in tasks:
        if task.key not in rows:
            row = do(task)
            records.append(out, FIELDS, row)
            rows[task.key] = row
            print(line(row), flush=True)
    return [rows[task.key] for task in tasks]


def line(row: Row) -> str:
    """Return one line about one run."""
    head = f"{row['model']}, {row['guide']}, rate {row['rate']}: "
    if row["error"]:
        return f"{head}{row['error']}"
    return (
        f"{head}{float(row['elbo']):.3f} (.{1e3 * float(row['elbo_error']):03.0f}), {row['steps']} steps of "
        f"{float(row['ms']):.1f} ms after {float(row['setup']):.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guides", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--guides", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(GUIDES)}")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="of Adam (default: .001 .01 .1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the processor, each run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows, which is added to")
    options = parser.parse_args(arguments)
    choice = {"models": options.models, "guides": options.guides, "rates": options.rates, "seconds": options.seconds}
    try:
        rows = bench(**choice, seed=options.seed, out=options.out)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(rows)} runs, {sum(bool(row['error']) for row in rows)} of them raised")


if __name__ == "__main__":
    main()
