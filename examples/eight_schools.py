"""The eight schools (Rubin 1981), from the model to ArviZ: fit, verdict, table, leave-one-out, figures, files.

python examples/eight_schools.py [--smoke] [--out DIR]
"""

import argparse
from pathlib import Path

import arviz_stats
import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf
from pyro_flows import plots

SCHOOLS = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "St. Paul's", "Mt. Hermon"]
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y, sigma):
    """Effects of coaching, drawn towards a common mean; sampled as standardized effects (non-centered)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a short fit, which may not be enough")
    parser.add_argument("--out", type=Path, default=None, help="where to save the posterior and its figures")
    options = parser.parse_args()

    posterior = pf.fit(eight_schools, Y, SIGMA, progress=False, **({"max_steps": 200} if options.smoke else {}))
    print(posterior.verdict)
    if posterior.verdict.status == "unreliable":
        print("A fit with more steps would be next; what follows is not to be relied on.")

    posterior = posterior.assign_coords({"school": SCHOOLS})
    print(posterior.summary(["mu", "tau", "theta"]))

    # The object that every ArviZ function takes, labeled by school.
    tree = posterior.to_arviz()
    print(arviz_stats.loo(tree, pointwise=True))

    # A ninth school, not in the data: its effect is new, mu and tau are the posterior's.
    mu, tau = posterior.samples["mu"], posterior.samples["tau"]
    ninth = mu + tau * torch.randn(len(mu), generator=torch.Generator().manual_seed(0))
    print(f"P(effect in a ninth school > 0) = {(ninth > 0).double().mean():.2f}")

    if options.out is not None:
        posterior.save(options.out)
        plots.plot_elbo(posterior).savefig(options.out / "elbo.png")
        plots.plot_posterior(posterior, ["mu", "tau", "theta"]).savefig(options.out / "posterior.png")
        again = pf.load(options.out, eight_schools, Y, SIGMA)
        print(f"Saved to {options.out}; read back with status {again.verdict.status!r}.")


if __name__ == "__main__":
    main()
