"""A flow as a prior, learned from noisy data (empirical Bayes), against a Gaussian prior learned in the same way.

Each unit has a hidden pair theta_i, seen through noise. The pairs lie along a banana. The prior is a Real-NVP with
parameters of its own, trained with a mean-field guide by Pyro's SVI on all data at each step. How good a prior is shows
in the true pairs of units that were never seen: their mean log density under it.

    python examples/flow_prior.py [--smoke]
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

import pyro_flows as pf

NOISE = 0.4


def banana(units, generator):
    """Draw true pairs (units, 2): a bent ridge."""
    across = 1.5 * torch.randn(units, generator=generator)
    up = 0.6 * across.square() - 1.0 + 0.3 * torch.randn(units, generator=generator)
    return torch.stack([across, up], -1)


def make_model(prior):
    """Units with hidden pairs from ``prior()``, a flow whose parameters are learned with the guide's."""

    def model(x):
        pyro.module("prior", prior)
        with pyro.plate("unit", len(x)):
            theta = pyro.sample("theta", prior())
            pyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)

    return model


def guide(x):
    """An own Gaussian for each unit."""
    loc = pyro.param("loc", lambda: x.clone())
    scale = pyro.param("scale", lambda: torch.full_like(x, 0.3), constraint=dist.constraints.positive)
    with pyro.plate("unit", len(x)):
        pyro.sample("theta", dist.Normal(loc, scale).to_event(1))


def learn(prior, x, steps):
    """Train prior and guide together on all of the data."""
    pyro.clear_param_store()
    svi = SVI(make_model(prior), guide, ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / steps)}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short training")
    steps = 250 if parser.parse_args().smoke else 2000

    pyro.set_rng_seed(0)
    generator = torch.Generator().manual_seed(1)
    theta = banana(1000, generator)
    x = theta + NOISE * torch.randn(theta.shape, generator=generator)
    unseen = banana(2000, generator)
    priors = {"gaussian": pf.Flow(pf.transforms.LowerTriangularAffine(2)), "realnvp": pf.realnvp(2, layers=6)}
    for name, prior in priors.items():
        learn(prior, x, steps)
        with torch.no_grad():
            score = prior.log_prob(unseen).mean()
        print(f"{name}: mean log density of unseen pairs {score:.3f}")


if __name__ == "__main__":
    main()
