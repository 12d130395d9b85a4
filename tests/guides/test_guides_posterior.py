"""What a flow guide says about the posterior: mass one, medians, quantiles and draws, checked against closed forms."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_flows as pf
from tests.guides.test_guides import KINDS, each_kind
from tests.invariants import close
from tests.models import CASES, dependent, nested, normal, real
from tests.registry import randomize

Y = real(0.4)


def random_guide(model, *args, kind="realnvp", sd=0.3, **options):
    guide = KINDS[kind](model, **options).initialize(*args)
    randomize(guide.flow, sd=sd, seed=61)
    return guide


# mass ----------------------------------------------------------------------------------------------------------------

# Integrals over logits, by the trapezoidal rule, exact to rounding for smooth densities this wide. Beyond a logit of 25
# the rounding of constrained values shows; with a normal base and mild flows less than 1e-5 lies out there.
GRID = torch.arange(-25.0, 25.0, 0.1, dtype=torch.float64)


@each_kind
def test_mass_on_an_interval(kind):
    """Over x in (2, 5), by x = 2 + 3 s(t), dx = 3 s (1 - s) dt."""
    guide = random_guide(lambda: pyro.sample("x", dist.Uniform(real(2.0), 5.0)), kind=kind, base="normal")
    s = torch.sigmoid(GRID)
    density = guide.log_prob({"x": 2.0 + 3.0 * s}).detach().exp()
    close((density * 3.0 * s * (1 - s)).sum() * 0.1, real(1.0), 1e-5)


@each_kind
def test_mass_on_a_triangle(kind):
    """Over alpha and beta > 0 with alpha + beta < 1: the second support depends on the first latent."""
    guide = random_guide(dependent, Y, kind=kind, sd=0.1, base="normal")
    s, t = torch.broadcast_tensors(torch.sigmoid(GRID)[:, None], torch.sigmoid(GRID))
    density = guide.log_prob({"alpha": s, "beta": (1 - s) * t}).detach().exp()
    close((density * s * (1 - s) ** 2 * t * (1 - t)).sum() * 0.01, real(1.0), 1e-5)


@each_kind
def test_mass_on_a_simplex(kind):
    """Over the first two of three probabilities, Lebesgue measure: p1 = s, p2 = (1 - s) t."""

    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=torch.float64)))

    guide = random_guide(model, kind=kind, sd=0.1, base="normal")
    s, t = torch.broadcast_tensors(torch.sigmoid(GRID)[:, None], torch.sigmoid(GRID))
    p = torch.stack([s, (1 - s) * t, (1 - s) * (1 - t)], dim=-1)
    density = guide.log_prob({"p": p}).detach().exp()
    close((density * s * (1 - s) ** 2 * t * (1 - t)).sum() * 0.01, real(1.0), 1e-5)


@each_kind
def test_draws_have_the_density(kind):
    """Inverse weights: for draws from q, the mean of h / q is the integral of h, here 1.

    h is the prior, narrower than q. 20,000 draws, five standard errors: failure rate below 1e-6.
    """
    guide = random_guide(nested, normal(3, 4, seed=1), kind=kind, sd=0.05, init_scale=1.2, noncentered=())
    draws = guide.sample_posterior(20_000)
    z = torch.cat([draws["mu"][:, None], draws["tau"].log().flatten(1), draws["x"].flatten(1)], dim=1)
    loc = z.mean(0)
    narrow = dist.Normal(loc, 0.9 * z.std(0)).to_event(1)
    ratio = (narrow.log_prob(z) - draws["tau"].log().flatten(1).sum(1) - guide.log_prob(draws)).detach().exp()
    error = ratio.std() / len(ratio) ** 0.5
    assert error < 0.1
    assert abs(ratio.mean() - 1.0) < 5 * error


# medians and quantiles -----------------------------------------------------------------------------------------------


def log_normal(shift=0.7, sd=0.5):
    """A guide that is exactly LogNormal(shift, sd) over a vector of two."""
    guide = pf.AutoRealNVP(
        lambda: pyro.sample("s", dist.LogNormal(real(0.0), 1.0).expand([2]).to_event(1)), layers=2, base="normal"
    ).initialize()
    guide.start_at(real(shift, -shift), real(sd, 2 * sd))
    return guide


def test_median_and_quantiles_of_a_known_distribution():
    """Over 4000 draws: 6 standard errors of a median (0.02 sd) and of 5 % and 95 % quantiles (0.033 sd)."""
    guide = log_normal()
    logs = guide.median()["s"].log()
    assert ((logs - real(0.7, -0.7)).abs() < 6 * 0.02 * real(0.5, 1.0)).all()
    levels = [0.05, 0.5, 0.95]
    quantiles = guide.quantiles(levels)["s"]
    assert quantiles.shape == (3, 2)
    expected = real(0.7, -0.7) + real(0.5, 1.0) * torch.special.ndtri(real(levels))[:, None]
    assert ((quantiles.log() - expected).abs() < 6 * 0.033 * real(0.5, 1.0)).all()
    close(guide.quantiles(torch.tensor(levels))["s"], quantiles, 1e-12)  # the same draws each time


def test_summaries_use_no_global_randomness():
    guide = log_normal()
    state = torch.random.get_rng_state()
    first = guide.median()["s"]
    guide.quantiles([0.5])
    assert torch.equal(torch.random.get_rng_state(), state)
    close(guide.median()["s"], first, 0.0)
    assert not torch.equal(guide.sample_posterior(2)["s"], guide.sample_posterior(2)["s"])


def test_shapes():
    y = normal(3, 4, seed=1)
    guide = KINDS["realnvp"](nested)
    median = guide.median(y)  # initializes the guide
    assert {name: tuple(value.shape) for name, value in median.items()} == {"mu": (), "tau": (3, 1), "x": (3, 4)}
    quantiles = guide.quantiles([0.1, 0.9], y)
    assert {name: tuple(value.shape) for name, value in quantiles.items()} == {
        "mu": (2,),
        "tau": (2, 3, 1),
        "x": (2, 3, 4),
    }
    draws = guide.sample_posterior(5)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"mu": (5,), "tau": (5, 3, 1), "x": (5, 3, 4)}
    with pytest.raises(ValueError, match="quantiles: expected a list of numbers between 0 and 1"):
        guide.quantiles([1.5])
    with pytest.raises(ValueError, match="n: expected an integer >= 1"):
        guide.sample_posterior(0)


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_draws_lie_in_their_supports(name):
    case = next(case for case in CASES if case.name == name)
    draws = random_guide(case.model, *case.args, sd=0.1).sample_posterior(50)
    density = pf.LogDensity(case.model, case.args)
    assert set(draws) == set(density.names)
    values = density.constrain(density.unconstrain(draws))
    for site in density.structure.latents:
        assert draws[site.name].shape == (50, *site.shape)
        if site.mask is None:
            close(values[site.name], draws[site.name], 1e-9)
    assert torch.isfinite(density(density.unconstrain(draws))).all()


# posteriors in closed form -------------------------------------------------------------------------------------------

X = normal(12, 2, seed=62) @ real([[1.0, 0.9], [0.0, 0.4]])
TARGET = X @ real(1.0, -0.5) + 0.3 * normal(12, seed=63)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.3), obs=y)


def exact():
    """Posterior mean, covariance and log evidence of the regression."""
    precision = torch.eye(2, dtype=torch.float64) + X.T @ X / 0.09
    covariance = torch.linalg.inv(precision)
    marginal = dist.MultivariateNormal(real(0.0).expand(12), 0.09 * torch.eye(12).double() + X @ X.T)
    return covariance @ (X.T @ TARGET) / 0.09, covariance, marginal.log_prob(TARGET)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(partial(pf.AutoRealNVP, layers=2, hidden=(8,), base="normal"), id="realnvp"),
        pytest.param(partial(pf.AutoNICE, layers=2, hidden=(8,), base="normal"), id="nice", marks=pytest.mark.slow),
        pytest.param(partial(pf.AutoPlanar, layers=2, base="normal"), id="planar", marks=pytest.mark.slow),
        pytest.param(
            partial(pf.AutoRealNVP, layers=4, hidden=(8,), affine="none", base="normal"),
            id="without affine",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_finds_a_normal_posterior(make):
    """All of these can be exact. Adam in Pyro's SVI, 8 particles, 600 steps at three step sizes.

    Means to 0.15 sd, sds to 15 %, correlation to 0.05, ELBO to 0.1 nats below the evidence: twice the worst of several
    seeds, and far above the noise of 20,000 draws (0.007 sd).
    """
    torch.manual_seed(3)
    guide = make(regression, init_scale=0.3, cautious=False).initialize(X, TARGET)  # eight particles bear larger steps
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    for rate, steps in ((0.03, 300), (0.01, 150), (0.003, 150)):
        svi = SVI(regression, guide, pyro.optim.Adam({"lr": rate}), elbo)
        for _ in range(steps):
            svi.step(X, TARGET)
    mean, covariance, evidence = exact()
    sd = covariance.diagonal().sqrt()
    w = guide.sample_posterior(20_000)["w"]
    assert ((w.mean(0) - mean).abs() < 0.15 * sd).all()
    assert ((w.std(0) / sd).log().abs() < 0.15).all()
    assert abs(torch.corrcoef(w.T)[0, 1] - covariance[0, 1] / sd.prod()) < 0.05
    assert ((guide.median()["w"] - mean).abs() < 0.2 * sd).all()
    with torch.no_grad():
        log_weights = pf.LogDensity(regression, (X, TARGET))(w) - guide.log_prob({"w": w})
    assert evidence - 0.1 < log_weights.mean() < evidence + 0.02
