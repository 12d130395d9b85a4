"""NUTS of NumPyro and of nutpie on NumPyro's ports of the models, long runs to compare with, and log densities.

    python -m benchmarks.nuts.jax_runs MODEL IN.npz OUT.npz --seed 0 --by nutpie

Run by :mod:`benchmarks.nuts` and :mod:`benchmarks.larger` in an environment that has NumPyro, and nutpie where it is
asked for, and need not have torch. ``IN`` holds the arguments of the model under ``0``, ``1``, ... . ``OUT`` gets the
draws of each site, chain after chain, and the seconds that they took, compilation included. Where ``IN`` holds
unconstrained points of each site as well, ``OUT`` gets the log density at these instead.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import initialize_model, potential_energy

from benchmarks.clock import Stopwatch
from benchmarks.larger import numpyro_models as larger
from benchmarks.nuts import numpyro_models as seventeen
from benchmarks.scale import numpyro_models as scale

Model = Callable[..., None]
MODELS: dict[str, Model] = {**seventeen.MODELS, **larger.MODELS, **scale.MODELS}
CHAINS, LENGTH = 4, 1000
TUNE = 800  # of nutpie with a low-rank mass matrix, by its default
ANYWHERE = 2.0  # a chain starts in (-2, 2)
CAREFUL = 0.95  # acceptance that long runs aim at


def by_numpyro(model: Model, args: Sequence[Array], seed: int, length: int = LENGTH, **kernel: Any) -> dict[str, Any]:
    """Return draws of NumPyro's NUTS by site, and the seconds that they took.

    The chains run side by side, which takes little more than half of what one after the other takes on one thread.
    """
    watch = Stopwatch()
    mcmc = MCMC(
        NUTS(model, **kernel),
        num_warmup=length,
        num_samples=length,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(seed), *args)
    draws = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    return {**draws, "seconds": watch.wall(), "cpu_seconds": watch.cpu()}


def by_nutpie(model: Model, args: Sequence[Array], seed: int, length: int = LENGTH) -> dict[str, Any]:
    """Return draws of nutpie's NUTS with a low-rank mass matrix by site, and the seconds that they took.

    Chains run one after the other, each with nutpie's own length of warm-up. JAX compiles the log density and its
    gradient, which nutpie's sampler in Rust calls through Python, as with ``nutpie.compile_pymc_model(...,
    backend="jax")``.
    """
    import nutpie

    watch = Stopwatch()
    info = initialize_model(jax.random.PRNGKey(seed), model, model_args=tuple(args))
    flat, back = ravel_pytree(info.param_info.z if info.param_info.z else {})
    gradient = jax.jit(jax.value_and_grad(lambda x: -info.potential_fn(back(x))))

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = gradient(x)
        return float(value), np.asarray(slope, dtype="float64")

    compiled = _compiled(nutpie, len(flat), value_and_gradient)
    named = "adaptation" in inspect.signature(nutpie.sample).parameters
    low_rank: dict[str, Any] = {"adaptation": "low_rank"} if named else {"low_rank_modified_mass_matrix": True}
    options = {"draws": length, "chains": CHAINS, "cores": 1, "seed": seed, "progress_bar": False, "save_warmup": False}
    trace = nutpie.sample(compiled, tune=min(TUNE, length), **options, **low_rank)
    z = np.asarray(trace.posterior["z"]).reshape(-1, len(flat))
    sites = jax.jit(jax.vmap(lambda x: info.postprocess_fn(back(x))))(z)
    draws = {name: np.asarray(value) for name, value in sites.items()}
    return {**draws, "seconds": watch.wall(), "cpu_seconds": watch.cpu()}


def _compiled(nutpie: Any, dim: int, value_and_gradient: Callable[[np.ndarray], Any]) -> Any:
    """Return the density as nutpie takes it; what it stores is the unconstrained vector."""
    from nutpie.compiled_pyfunc import from_pyfunc

    return from_pyfunc(
        dim,
        lambda: value_and_gradient,
        lambda seed, chain_seed, chain: lambda x: {"z": np.asarray(x, dtype="float64")},
        [np.dtype("float64")],
        [(dim,)],
        ["z"],
        make_initial_point_fn=lambda seed: np.random.default_rng(seed).uniform(-ANYWHERE, ANYWHERE, dim),
    )


def long_run(model: Model, args: Sequence[Array], seed: int, length: int = LENGTH) -> dict[str, Any]:
    """Return draws of a careful run of NumPyro's NUTS by site, and the seconds that they took."""
    return by_numpyro(model, args, seed, length, target_accept_prob=CAREFUL)


def log_density(model: Model, args: Sequence[Array], points: dict[str, Array]) -> np.ndarray:
    """Return the log density (S,) at unconstrained points, by site (S, ...)."""
    count = len(next(iter(points.values())))
    rows = [{name: value[i] for name, value in points.items()} for i in range(count)]
    return np.array([-float(potential_energy(model, tuple(args), {}, row)) for row in rows])


BY = {"numpyro": by_numpyro, "noncentered": by_numpyro, "nutpie": by_nutpie, "long": long_run}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nuts.jax_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("given", type=Path, metavar="IN.npz")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by", choices=BY, default="numpyro")
    parser.add_argument("--length", type=int, default=LENGTH, help="draws of a chain, after warm-up")
    options = parser.parse_args(arguments)
    numpyro.enable_x64()
    given = {name: jnp.asarray(value) for name, value in np.load(options.given).items()}
    args = [given.pop(str(index)) for index in range(sum(name.isdigit() for name in given))]
    models = larger.LONG_RUNS if options.by in ("long", "noncentered") else MODELS
    model = models[options.model]
    if given:
        found: dict[str, Any] = {"log_density": log_density(model, args, given)}
    else:
        found = BY[options.by](model, args, options.seed, options.length)
    np.savez(options.out, **found)


if __name__ == "__main__":
    main()
