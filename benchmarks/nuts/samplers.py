"""Draws of a posterior and the seconds that they take: our fit, and NUTS of Pyro, of NumPyro and of nutpie.

Pyro's NUTS runs the model under Pyro's handlers at each point, as it does by itself, but in the unconstrained
coordinates of :class:`pyro_flows.LogDensity`: its own set-up cannot start from improper priors, and fixes a support
that depends on a latent. (On the *recorded* density a gradient of eight schools takes 0.2 ms in place of 1.0.)
NUTS of NumPyro and of nutpie get NumPyro's ports of the models, see :mod:`benchmarks.nuts.numpyro_models`.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyro_flows
from benchmarks.clock import Stopwatch
from benchmarks.nuts import stages
from benchmarks.posteriors.models import Problem
from benchmarks.posteriors.running import DRAWS, OURS
from pyro_flows import LogDensity
from pyro_flows.support.process.ledger import ledger

PYRO, NUMPYRO, NUTPIE = "Pyro NUTS", "NumPyro NUTS", "nutpie"
INTERPRETER = "NUMPYRO_PYTHON"  # the variable that names it
ROOT = Path(__file__).resolve().parents[2]

CHAINS, LENGTH = 4, 1000  # of Pyro's NUTS, with a warm-up as long;
LIMIT = 600.0  # where that would take more seconds of the processor,
SHORT, SCALE = 250, 16  # one chain this long, its time scaled,
MOST = 300.0  # and broken off after as many seconds, which scaled are a lower bound
SPREAD, TRIES = 2.0, 100  # a chain starts anywhere in (-2, 2), as Pyro's chains do
SINGLE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
    "NPROC": "1",
}


@dataclass(frozen=True)
class Sampled:
    """Draws (S, D) in the model's own unconstrained coordinates, and what they took; none of a chain broken off."""

    draws: Tensor | None
    seconds: float
    cpu_seconds: float
    scaled: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


def fit(problem: Problem, seed: int, draws: int = DRAWS) -> Sampled:
    """Fit as it comes; its draws are those to use."""
    watch = Stopwatch()
    with ledger() as kept:
        found = pyro_flows.fit(problem.model, *problem.args, seed=seed, draws=draws, progress=False)
    seconds, cpu_seconds = watch.wall(), watch.cpu()
    used: Tensor = found._used
    assert found.density is not None
    if found.density.structure.noncentered:
        used = LogDensity(problem.model, problem.args).unconstrain(found.density.constrain(used))
    notes = {"status": found.verdict.status, "gradients": found.settings["gradient_evaluations"]}
    notes |= {"parts": stages.written(kept.seconds), "ledger": kept.as_json()}
    return Sampled(used, seconds, cpu_seconds, notes=notes)


def pyro_nuts(problem: Problem, seed: int) -> Sampled:
    """Run Pyro's NUTS, chain after chain."""
    watch = Stopwatch()
    density = LogDensity(problem.model, problem.args)
    prepared = watch.wall(), watch.cpu()

    def chain(index: int, length: int, check: Callable[[], None]) -> Tensor:
        pyro.set_rng_seed(seed * CHAINS + index)
        mcmc = MCMC(
            NUTS(potential_fn=lambda values: -density.single(values["z"])),
            num_samples=length,
            warmup_steps=length,
            initial_params={"z": start(density)},
            hook_fn=lambda *_: check(),
            disable_progbar=True,
        )
        mcmc.run()
        return mcmc.get_samples()["z"]

    found = run_chains(chain)
    return Sampled(found.draws, found.seconds + prepared[0], found.cpu_seconds + prepared[1], found.scaled)


def start(density: LogDensity) -> Tensor:
    """Return a uniform point where the density and its gradient are finite."""
    for _ in range(TRIES):
        z = SPREAD * (2.0 * torch.rand(1, density.dim, dtype=density.dtype) - 1.0)
        if all(bool(torch.isfinite(part).all()) for part in density.value_and_grad(z)):
            return z[0]
    raise RuntimeError(f"no finite density at {TRIES} starting points")


class TooLong(Exception):
    """A chain has used up its seconds."""


def run_chains(
    chain: Callable[[int, int, Callable[[], None]], Tensor], clock: Callable[[], Stopwatch] = Stopwatch
) -> Sampled:
    """Run all chains, or a short one in their place where the first takes more than its share of `LIMIT`.

    The short one is broken off, without draws, after `MOST` seconds.

    Args:
        chain: (index, length, check) -> draws; it has to call ``check`` after each transition.
        clock: makes a stopwatch.
    """
    watch = clock()

    def within(seconds: float) -> Callable[[], None]:
        def check() -> None:
            if watch.cpu() > seconds:
                raise TooLong

        return check

    try:
        draws = [chain(0, LENGTH, within(LIMIT / CHAINS))]
    except TooLong:
        watch = clock()
        try:
            short = chain(0, SHORT, within(MOST))
        except TooLong:
            short = None
        return Sampled(short, SCALE * watch.wall(), SCALE * watch.cpu(), scaled=True)
    draws += [chain(index, LENGTH, within(math.inf)) for index in range(1, CHAINS)]
    return Sampled(torch.cat(draws), watch.wall(), watch.cpu())


def numpyro_nuts(problem: Problem, seed: int) -> Sampled:
    """Run NumPyro's NUTS by the interpreter that has it."""
    return in_jax(problem, seed, by="numpyro")


def nutpie_nuts(problem: Problem, seed: int) -> Sampled:
    """Run nutpie's NUTS by the interpreter that has NumPyro and nutpie."""
    return in_jax(problem, seed, by="nutpie")


def in_jax(problem: Problem, seed: int, by: str) -> Sampled:
    """Run what :mod:`benchmarks.nuts.jax_runs` calls ``by``."""
    found = in_numpyro(problem, seed=seed, by=by)
    seconds, cpu_seconds = (float(found.pop(name)) for name in ("seconds", "cpu_seconds"))
    density = LogDensity(problem.model, problem.args)
    draws = density.unconstrain({name: torch.from_numpy(found[name]) for name in density.names})
    return Sampled(draws, seconds, cpu_seconds)


def in_numpyro(
    problem: Problem,
    points: dict[str, Tensor] | None = None,
    *,
    seed: int = 0,
    by: str = "numpyro",
    length: int = LENGTH,
) -> dict[str, np.ndarray]:
    """Return what :mod:`benchmarks.nuts.jax_runs` finds: draws, or the log density at points by site."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given.npz", Path(folder) / "out.npz"
        arrays = {str(index): value for index, value in enumerate(problem.args)} | (points or {})
        np.savez(given, **{name: value.numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
        command = [os.environ[INTERPRETER], "-m", "benchmarks.nuts.jax_runs", problem.model.__name__]
        command += [str(given), str(out), "--seed", str(seed), "--by", by, "--length", str(length)]
        environment = {**os.environ, **SINGLE_THREAD}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}, maybe by its limit"]
            raise RuntimeError(said[-1])
        return dict(np.load(out))


def numpyro_version(*also: str) -> str | None:
    """Return the versions of NumPyro and JAX, and of packages named, None where no interpreter has all of them."""
    names = (*also, "numpyro", "jax")
    code = f"from importlib.metadata import version; print(*(f'{{name}}-{{version(name)}}' for name in {names}))"
    try:
        done = subprocess.run([os.environ[INTERPRETER], "-c", code], capture_output=True, text=True)
    except (KeyError, OSError):
        return None
    return None if done.returncode else done.stdout.strip()


METHODS: dict[str, Callable[[Problem, int], Sampled]] = {OURS: fit, PYRO: pyro_nuts, NUMPYRO: numpyro_nuts}
METHODS[NUTPIE] = nutpie_nuts
