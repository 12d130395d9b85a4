"""Long runs of NumPyro's NUTS on the regressions of :mod:`benchmarks.named`, in non-centered coordinates.

    python -m benchmarks.named.numpyro_runs DATA.npz

In an environment with NumPyro; ``DATA.npz`` holds the arguments of the models as ``model/0``, ``model/1``, ...
(``python -m benchmarks.named.numpyro_runs --data DATA.npz`` writes it where torch and Pyro are). Means and standard
deviations of all sites are written to ``reference.json``, with R-hat and effective sample size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).resolve().parent / "reference.json"
WARM_UP, DRAWS, CHAINS = 2000, 10_000, 4


def write_data(file: str) -> None:
    """Write the arguments of the regressions."""
    from benchmarks.named.models import MODELS

    arrays = {}
    for name, named in MODELS.items():
        if not named.mirrored:
            arrays |= {f"{name}/{place}": value.numpy() for place, value in enumerate(named.data())}
    np.savez(file, **arrays)


def models(data: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Return the models in NumPyro, each on its data."""

    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def standard(name: str, *shape: int) -> Any:
        return numpyro.sample(name, dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))

    def seeds() -> None:
        r, n, kind, extract = data["seeds"]
        alpha = numpyro.sample("alpha", dist.Normal(jnp.zeros(4), 10.0).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(1.0))
        b = numpyro.deterministic("b", sigma * standard("raw_b", 21))
        logits = alpha[0] + alpha[1] * kind + alpha[2] * extract + alpha[3] * kind * extract + b
        numpyro.sample("r", dist.Binomial(n.astype(int), logits=logits), obs=r)

    def epilepsy() -> None:
        y, x, patient = data["epilepsy"]
        a = numpyro.sample("a", dist.Normal(0.0, 5.0))
        b = numpyro.sample("b", dist.Normal(jnp.zeros(5), 2.0).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        u = numpyro.deterministic("u", tau * standard("raw_u", 59))
        numpyro.sample("y", dist.Poisson(jnp.exp(a + x @ b + u[patient])), obs=y)

    def lkj_effects() -> None:
        y, x, group = data["lkj_effects"]
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(3), 5.0).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(3)).to_event(1))
        chol = numpyro.sample("chol", dist.LKJCholesky(3, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        b = numpyro.deterministic("b", mu + standard("raw_b", 20, 3) @ (tau[:, None] * chol).T)
        numpyro.sample("y", dist.Normal((x * b[group]).sum(-1), sigma), obs=y)

    def radon_slopes() -> None:
        y, basement, county = data["radon_slopes"]
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 5.0).to_event(1))
        tau = numpyro.sample("tau", dist.HalfNormal(jnp.ones(2)).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        alpha = numpyro.deterministic("alpha", mu[0] + tau[0] * standard("raw_alpha", 85))
        beta = numpyro.deterministic("beta", mu[1] + tau[1] * standard("raw_beta", 85))
        numpyro.sample("y", dist.Normal(alpha[county] + beta[county] * basement, sigma), obs=y)

    def network() -> None:
        x, y, grid = data["network_47"]
        wide = dist.Normal(jnp.zeros(15), 2.0).to_event(1)
        weight, bias = numpyro.sample("raw_weight", wide), numpyro.sample("raw_bias", wide)
        out = numpyro.sample("raw_out", dist.Normal(jnp.zeros(15), 0.5).to_event(1))
        level, sigma = numpyro.sample("raw_level", dist.Normal(0.0, 1.0)), numpyro.sample("sigma", dist.HalfNormal(0.5))
        numpyro.deterministic("function", jnp.tanh(grid[:, None] * weight + bias) @ out + level)
        numpyro.sample("y", dist.Normal(jnp.tanh(x[:, None] * weight + bias) @ out + level, sigma), obs=y)

    return {
        "network_47": network,
        "seeds": seeds,
        "epilepsy": epilepsy,
        "lkj_effects": lkj_effects,
        "radon_slopes": radon_slopes,
    }


def main(file: str) -> None:
    """Run NUTS on each model whose data are there."""
    import jax
    import numpyro
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    arrays = np.load(file)
    data: dict[str, list[np.ndarray]] = {}
    for key in arrays.files:
        data.setdefault(key.split("/")[0], []).append(arrays[key])
    found = {}
    for name, model in models(data).items():
        if name not in data:
            continue
        kernel = NUTS(model, target_accept_prob=0.95)
        mcmc = MCMC(
            kernel,
            num_warmup=WARM_UP,
            num_samples=DRAWS,
            num_chains=CHAINS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(jax.random.PRNGKey(1))
        draws = {site: np.asarray(x) for site, x in mcmc.get_samples(group_by_chain=True).items() if "raw" not in site}
        r_hat = max(float(np.nanmax(split_gelman_rubin(x))) for x in draws.values())
        ess = min(float(np.nanmin(effective_sample_size(x))) for x in draws.values())
        flat = {site: x.reshape(-1, *x.shape[2:]) for site, x in draws.items()}
        sites = {site: {"mean": x.mean(0).tolist(), "sd": x.std(0).tolist()} for site, x in flat.items()}
        divergent = int(mcmc.get_extra_fields()["diverging"].sum())
        how = f"NumPyro {numpyro.__version__}, NUTS, {CHAINS} chains of {DRAWS} after {WARM_UP}, target 0.95"
        found[name] = {"how": how, "r_hat": r_hat, "ess": ess, "divergent": divergent, "sites": sites}
        print(name, f"R-hat {r_hat:.4f}, ESS {ess:.0f}, {divergent} divergent", flush=True)
    REFERENCE.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--data":
        write_data(sys.argv[2])
    else:
        main(sys.argv[1])
