"""Where a flow guide starts, if it sees a part of a model or a part of its rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList

import pyro_flows as pf
from tests.guides.test_guides import case_of
from tests.invariants import close
from tests.models import nested, normal, real


def mixed(y):
    loc = pyro.sample("loc", dist.Normal(real(0.0), 5.0))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(loc + k, 0.5), obs=y)


FAR = normal(4, seed=52) + 9.0
BLOCKS = {
    "exposed": lambda model: poutine.block(model, expose=["loc"]),  # as in Pyro's tutorials; it hides the data too
    "hidden": lambda model: poutine.block(model, hide=["k"]),
    "in handlers": lambda model: poutine.scale(
        poutine.block(poutine.scale(model, scale=1.0), expose=["loc"]), scale=1.0
    ),
    "twice": lambda model: poutine.block(poutine.block(model, hide=["k"]), hide=["y"]),
}


def is_at_the_prior(guide):
    return torch.equal(guide.affine.scale_tril, torch.eye(guide.latent_dim).to(guide.affine.scale_tril))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_guide_inside_of_a_block_starts_as_without_it(block):
    model = config_enumerate(mixed)
    whole, part, guide = pf.AutoRealNVP(model), pf.AutoRealNVP(BLOCKS[block](model)), AutoGuideList(model)
    whole.initialize(FAR)
    guide.append(part)
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    guide(FAR)
    alone = pf.AutoRealNVP(BLOCKS[block](model)).initialize(FAR)
    assert abs(float(whole.affine.loc) - float(FAR.mean()) + 0.5) < 0.5
    for other in (alone, part):
        close(other.affine.loc, whole.affine.loc, 0.0)
        close(other.affine.scale_tril, whole.affine.scale_tril, 0.0)


@pytest.mark.parametrize("exposed", [["x"], ["mu", "tau"]])
def test_a_part_of_a_model_starts_at_its_marginal(exposed):
    args = case_of("nested").args
    models = poutine.block(nested, expose=exposed), nested
    part, whole = (pf.AutoRealNVP(model, noncentered=()).initialize(*args) for model in models)
    kept = [latent for latent in whole.structure.latents if latent.name in exposed]
    own = torch.cat([torch.arange(latent.offset, latent.offset + latent.size) for latent in kept])
    covariance = whole.affine.scale_tril @ whole.affine.scale_tril.mT
    close(part.affine.loc, whole.affine.loc[own], 1e-6)
    close(part.affine.scale_tril @ part.affine.scale_tril.mT, covariance[own][:, own], 1e-6)


def test_a_guide_whose_data_a_block_hides_says_so_where_nothing_tells_of_them():
    """Classes that are not enumerated are drawn at random."""
    with pytest.warns(pf.NothingObservedWarning, match=r"give the guide the model itself"):
        guide = pf.AutoRealNVP(poutine.block(mixed, expose=["loc"])).initialize(FAR)
    assert abs(float(guide.affine.loc)) < 3.0  # a median of draws
    assert is_at_the_prior(guide)


# a part of the rows ---------------------------------------------------------------------------------------------------

ROWS, COEFFICIENTS = 400, real(0.5, -1.0, 0.3)
X = normal(ROWS, 3, seed=1)


def regression(x, y, size=40):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3).double(), 10.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ beta, 0.5), obs=y[rows])


def poisson(x, y, size=40):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3).double(), 10.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Poisson((1.0 + x[rows] @ beta).exp()), obs=y[rows])


def test_a_model_that_draws_its_rows_starts_at_the_mode_by_many_of_them():
    """With normal errors, the posterior is known."""
    y = X @ COEFFICIENTS + 0.5 * normal(ROWS, seed=2)
    guide = pf.AutoRealNVP(regression, layers=2).initialize(X, y)
    precision = 4.0 * X.mT @ X + 0.01 * torch.eye(3).double()
    exact = torch.linalg.solve(precision, 4.0 * X.mT @ y)
    covariance = torch.linalg.inv(precision)
    sds = covariance.diagonal().sqrt()
    close(guide.affine.loc / sds, exact / sds, 0.02)
    found = 15.0 / 13.0 * guide.affine.scale_tril @ guide.affine.scale_tril.mT  # of Student's t with 15 degrees
    close(found / sds.outer(sds), covariance / sds.outer(sds), 0.02)


def test_rates_of_rows_do_not_overflow_at_the_start():
    """By the prior they are up to exp(50), and the loss is 1e8 and more for thousands of steps."""
    pyro.set_rng_seed(0)
    y = torch.poisson((1.0 + X @ COEFFICIENTS).exp(), generator=torch.Generator().manual_seed(3))
    guides = [pf.AutoRealNVP(poisson, layers=2, init=init) for init in ("auto", "prior")]
    losses = []
    for guide in guides:
        pyro.clear_param_store()
        svi = SVI(poisson, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=20))
        losses.append(svi.evaluate_loss(X, y, size=ROWS))
    whole = pf.AutoRealNVP(poisson, layers=2).initialize(X, y, size=ROWS)
    best = Trace_ELBO(num_particles=200).loss(poisson, whole, X, y, size=ROWS)
    assert math.isfinite(best)
    assert losses[0] < best + 5.0 < losses[1]


def test_a_model_that_draws_other_random_numbers_too_starts_at_the_prior():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 10.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu + torch.randn(2).double(), 1.0), obs=y[rows])

    assert is_at_the_prior(pf.AutoRealNVP(model, layers=2).initialize(FAR))


def test_rows_with_latents_that_a_block_hides_leave_the_others_at_the_prior():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 10.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    assert is_at_the_prior(pf.AutoRealNVP(poutine.block(model, hide=["z"]), layers=2).initialize(FAR))
