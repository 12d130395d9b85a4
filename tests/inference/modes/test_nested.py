"""A few coordinates held, all others normal given these: which ones, their functions, marginals, and the flow."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows.flows.gaussian_conditionals import marginal_flow, with_tails
from pyro_flows.flows.recipe_json import from_json, not_rebuilt, to_json
from pyro_flows.inference.modes.conditionals import can_have_conditionals, conditional, hyperparameters_of
from pyro_flows.inference.modes.hyperparameter_marginal import fit_flow, sampled
from pyro_flows.transforms import DiagonalAffine
from pyro_flows.transforms.nested import Nested, Terms

SIZE, NOISE = 6, 0.5
GENERATOR = torch.Generator().manual_seed(5)
X = 1.0 + torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
Y = 2.0 * X + 0.4 * torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
X = X + NOISE * torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)


def errors(x: Tensor, y: Tensor) -> None:
    """A line through points whose places were measured with errors."""
    zero = x.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    b = pyro.sample("b", dist.Normal(zero, 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 1.0))
    with pyro.plate("n", len(x)):
        at = pyro.sample("at", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(at, NOISE), obs=x)
        pyro.sample("y", dist.Normal(b * at, s), obs=y)


def exact(theta: Tensor) -> Tensor:
    """The marginal density of log tau, b and log s: pairs of data are normal given these and mu."""
    tau, b, s = theta[:, 0].exp(), theta[:, 1], theta[:, 2].exp()
    one, eye = torch.ones(SIZE).double(), torch.eye(SIZE).double()
    design = torch.cat([one.expand(len(b), SIZE), b[:, None] * one], 1)
    tall = torch.cat([eye.expand(len(b), SIZE, SIZE), b[:, None, None] * eye], 1)
    noise = torch.cat([(NOISE**2 * one).expand(len(b), SIZE), s.square()[:, None] * one], 1).diag_embed()
    covariance = noise + tau.square()[:, None, None] * tall @ tall.mT + 4.0 * design[:, :, None] * design[:, None]
    found = dist.MultivariateNormal(torch.zeros(2 * SIZE).double(), covariance).log_prob(torch.cat([X, Y]))
    scales = dist.HalfNormal(torch.tensor(2.0).double()).log_prob(tau) + dist.HalfNormal(
        torch.tensor(1.0).double()
    ).log_prob(s)
    return found + scales + dist.Normal(0.0, 2.0).log_prob(b) + theta[:, 0] + theta[:, 2]


@pytest.fixture(scope="module")
def density():
    return pf.LogDensity(errors, (X, Y))


def about(density: pf.LogDensity) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.5 * torch.randn(2, density.dim, generator=generator, dtype=torch.float64).to(density.dtype)


def held_of(density: pf.LogDensity) -> list[int]:
    torch.manual_seed(0)
    return hyperparameters_of(density, about(density))


def given_of(density: pf.LogDensity, held: list[int]):
    center, spread = torch.zeros(len(held)).double(), torch.ones(len(held)).double()
    return conditional(density, held, center, spread)


def test_scales_and_slopes_are_held(density):
    assert can_have_conditionals(density)
    assert held_of(density) == [1, 2, 3]  # tau, b and s, and not mu
    single = pf.LogDensity(errors, (X.float(), Y.float()))
    assert held_of(single) == [1, 2, 3]


def test_others_that_are_not_normal_hold_nothing():
    def logistic() -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(8).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=w).to_event(1), obs=torch.ones(8).double())

    assert held_of(pf.LogDensity(logistic)) == []


@pytest.mark.parametrize("noncentered", [False, True])
def test_the_marginal_is_exact(density, noncentered):
    density = density.elsewhere(noncentered)
    given = given_of(density, [1, 2, 3])
    theta = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(given.marginal(theta), exact(theta), rtol=1e-8, atol=1e-8)
    assert given.holds(theta)
    assert len(given.entries[0]) < 3 * (density.dim - 3)  # of a matrix that has none outside of an arrow


def test_unknown_functions_are_not_taken_for_known_ones():
    def odd() -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(5).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x * torch.log1p(a.square()), 1.0).to_event(1), obs=torch.ones(5).double())

    density = pf.LogDensity(odd)
    assert held_of(density) == [0]
    assert given_of(density, [0]) is None


def test_an_autoregression_needs_powers_of_a_logistic_function():
    def series() -> None:
        phi = pyro.sample("phi", dist.Uniform(torch.zeros(()).double(), 1.0))
        x = pyro.sample("x_0", dist.Normal(torch.zeros(()).double(), 1.0))
        for t in range(1, 4):
            x = pyro.sample(f"x_{t}", dist.Normal(phi * x, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=torch.tensor(0.3 * t).double())

    density = pf.LogDensity(series)
    given = given_of(density, held_of(density))
    assert sorted(given.terms.shares[:, 0].tolist()) == [0.0, 1.0, 2.0]
    assert given.holds(torch.tensor([[-3.0], [2.5]]).double())


@pytest.mark.slow
def test_the_flow_is_the_posterior(density):
    given = given_of(density, [1, 2, 3])
    torch.manual_seed(3)
    sample = sampled(given.marginal, torch.zeros(3).double(), torch.eye(3).double())
    flow = with_tails(given.flow(4), 6.0)
    share, k_hat = fit_flow(*marginal_flow(flow, sample.loc, sample.root), given.marginal, sample)
    z, log_q = flow.draw(4000)
    ratios = (density(z) - log_q).detach()
    weights = torch.softmax(ratios, 0)
    assert share > 0.9
    assert k_hat < 0.7
    assert float(1.0 / weights.square().sum()) > 0.9 * len(z)
    assert float(torch.logsumexp(ratios, 0)) - math.log(len(z)) == pytest.approx(_evidence(), abs=0.05)
    torch.testing.assert_close(flow.log_prob(z), log_q)
    assert not_rebuilt(flow) is None
    again = from_json(to_json(flow)).double()
    again.load_state_dict(flow.state_dict())
    torch.testing.assert_close(again.log_prob(z), flow.log_prob(z))


def _evidence() -> float:
    """By a grid over the marginal."""
    sides = [torch.linspace(low, high, 81).double() for low, high in ((-5.0, 3.0), (-3.0, 7.0), (-9.0, 2.0))]
    grid = torch.cartesian_prod(*sides)
    heights = torch.cat([exact(part) for part in grid.split(20_000)])
    return float(torch.logsumexp(heights, 0) + sum((side[1] - side[0]).log() for side in sides))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [3, 700])
def test_the_map_is_a_bijection_with_its_jacobian(rows, dtype):
    map_ = Nested(4, held=(1, 2), outer=DiagonalAffine(2, scale=torch.tensor([2.0, 0.5])), terms=2, entries=3)
    one, zero = torch.ones(2), torch.zeros(2, 2)
    rates = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    powers = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    coefficients = torch.tensor([[2.0, 0.3, 1.5, 0.4, -1.0], [0.1, 0.1, 0.2, 0.5, 0.3]])
    entries = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    map_.set(Terms(0.0 * one, one, rates, powers, zero), coefficients, entries, torch.tensor([3, 0]), torch.ones(2))
    map_ = map_.to(dtype)
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)
    y, ladj = map_.forward_and_ladj(x)
    back, back_ladj = map_.inverse_and_ladj(y)
    assert y.dtype == ladj.dtype == back.dtype == back_ladj.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(back, x, **tolerance)
    torch.testing.assert_close(back_ladj, -ladj, **tolerance)
    slope = torch.autograd.functional.jacobian(lambda point: map_(point[None])[0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(slope).logabsdet, ladj[0], **tolerance)
    torch.testing.assert_close(map_(x.view(rows, 1, 4))[:, 0], y, **tolerance)
    torch.testing.assert_close(map_.forward_and_ladj(x[0])[1], ladj[0], **tolerance)
    torch.testing.assert_close(map_.inverse_and_ladj(y[0])[1], -ladj[0], **tolerance)
    step = 1e-5 * torch.eye(4, dtype=torch.float64)
    map_, point = map_.double(), y[0].double()
    for way in (lambda at: map_.inverse_and_ladj(at)[0], lambda at: map_.forward_and_ladj(at)[0]):
        slope = torch.autograd.functional.jacobian(way, point)
        torch.testing.assert_close(slope, (way(point + step) - way(point - step)).mT / 2e-5, rtol=1e-6, atol=1e-6)


def test_a_precision_that_is_none_stays_a_bijection():
    map_ = Nested(3, held=(0,), outer=DiagonalAffine(1), terms=1, entries=2).double()
    map_.coefficients[0, :2] = -1.0
    x = torch.tensor([[0.5, 1.0, -2.0]]).double()
    y, ladj = map_.forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(1).double())


@pytest.mark.filterwarnings("error")
def test_gradients_go_through_transforms_of_functions():
    """A tensor within ``vmap`` does not say that it needs a gradient."""
    map_ = Nested(3, held=(1,), outer=DiagonalAffine(1), terms=1, entries=2).double()
    map_.rates.fill_(0.3)
    x = torch.tensor([[0.1, 0.2, 0.3], [1.0, -1.0, 0.5]]).double()

    def ladj(x):
        return map_.forward_and_ladj(x)[1]

    over = torch.func.grad(lambda x: torch.func.vmap(ladj)(x).sum())(x)
    within = torch.func.vmap(torch.func.grad(ladj))(x)
    exact = torch.tensor([0.0, -0.3, 0.0]).double().expand(2, 3)  # half the rate for each of two others
    torch.testing.assert_close(over, exact)
    torch.testing.assert_close(within, exact)
