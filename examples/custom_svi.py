"""A flow guide in Pyro's own SVI: own loop, own optimizer, own ELBO; the verdict afterwards by ``diagnose``.

python examples/custom_svi.py [--smoke]
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.optim import ClippedAdam

import pyro_flows as pf


def crossing(x, y):
    """Two slopes of which only the product is seen: a posterior along a hyperbola, which no Gaussian follows."""
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    with pyro.plate("observation", len(x)):
        pyro.sample("y", dist.Normal(a * b * x, 0.5), obs=y)


def train(guide, x, y, steps):
    """Pyro's usual loop; the learning rate decays to a hundredth."""
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / steps)})
    svi = SVI(crossing, guide, optimizer, Trace_ELBO(16, max_plate_nesting=1, vectorize_particles=True))
    for _ in range(steps):
        svi.step(x, y)
    return guide


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short training, which may not be enough")
    steps = 150 if parser.parse_args().smoke else 3000

    pyro.set_rng_seed(0)
    x = torch.linspace(0.5, 2.0, 30)
    y = 2.0 * x + 0.5 * torch.randn(30)
    # Guides train by small steps, which single draws need. Sixteen particles a step bear larger ones.
    for guide in (pf.AutoRealNVP(crossing, layers=6, cautious=False), AutoDiagonalNormal(crossing)):
        posterior = pf.diagnose(crossing, train(guide, x, y, steps), x, y)
        print(f"{type(guide).__name__}: ELBO {posterior.elbo:.3f}; {posterior.verdict}")
        if isinstance(guide, pf.AutoFlow):
            # The guide is an ordinary autoguide: Pyro's Predictive takes it too.
            drawn = Predictive(crossing, guide=guide, num_samples=500)(x, None)["y"]
            print(f"  predicted y at x = 2: {drawn[:, -1].mean():.2f} ± {drawn[:, -1].std():.2f} (truth 4 ± 0.5)")


if __name__ == "__main__":
    main()
