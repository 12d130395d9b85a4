"""The portfolio of starts: which there are, what they cost, and what they are worth on targets with known figures."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints, kl_divergence

import pyro_flows as pf
from pyro_flows.inference.starts import curvature
from pyro_flows.inference.starts.climb import newton
from pyro_flows.inference.starts.gaussians import Start, divergence
from pyro_flows.inference.starts.pathfinder import pathfinder, pool
from pyro_flows.inference.starts.portfolio import along_paths, portfolio
from pyro_flows.inference.starts.prior import prior_draws
from pyro_flows.model.batching import hessian_diagonals
from pyro_flows.model.runs import LONG
from tests.inference.starts.test_pathfinder import WIDE, density_of, funnel, gaussian, starts
from tests.invariants import close
from tests.models import real
from tests.registry import normal


def names(found):
    return [start.name for start in found]


def best(found, name):
    return next(start for start in found if start.name == name)


# small models --------------------------------------------------------------------------------------------------------


def test_a_gaussian_needs_no_pathfinder():
    """Laplace's start is exact there: those of Pathfinder are the same and left out."""
    density, loc, factor = gaussian(WIDE)
    found = portfolio(density, seed=0, df=1e6)
    assert names(found)[0] == "laplace"
    assert not any("pathfinder" in name for name in names(found))
    assert found[0].elbo == pytest.approx(0.0, abs=1e-4)
    whitened = torch.linalg.solve_triangular(factor, found[0].scale, upper=False)
    close(whitened, torch.eye(len(WIDE), dtype=torch.float64), 1e-6)
    assert torch.linalg.solve_triangular(factor, (found[0].loc - loc)[:, None], upper=False).abs().max() < 1e-4


def test_pathfinder_against_newton():
    """Scales of 1e-6 to 1e6: both ends are the mean, to 1e-3 sd."""
    density, loc, factor = gaussian(WIDE)
    points = starts(density)
    single = along_paths(density, points, seed=0)[0][0]
    for end in (newton(density, points), single.loc[None]):
        assert torch.linalg.solve_triangular(factor, (end - loc).mT, upper=False).abs().max() < 1e-3


def test_a_funnel_starts_in_its_mouth():
    """The mode of a funnel is of no use (Laplace's ELBO is below -100); a path has passed the mass on its way there."""
    found = portfolio(density_of(funnel, 10), seed=0)
    assert "pathfinder" in found[0].name
    assert found[0].elbo > -4.0
    assert all(start.elbo < -100.0 for start in found if start.name == "laplace")


def test_moments_of_a_skewed_target():
    """Log-gamma coordinates: the mode is 0.6 sd off the mean. Weighted draws of all paths have mean and sd, to 0.2."""

    def log_prob(z):
        return (2.0 * z - z.exp()).sum()

    density = density_of(log_prob, 3)
    found, _ = along_paths(density, starts(density, 6), seed=0)
    mean, sd = torch.digamma(real(2.0)), torch.polygamma(1, real(2.0)).sqrt()
    assert names(found) == ["pathfinder", "multi-path pathfinder"]
    close(found[1].loc, mean.expand(3), 0.2)
    close(found[1].scale, sd * torch.eye(3, dtype=torch.float64), 0.2)
    scored = portfolio(density, seed=0)
    assert best(scored, "multi-path pathfinder").elbo > best(scored, "laplace").elbo


def test_two_modes_are_bridged():
    """Two modes eight sds apart: the start of all paths covers both, and has the better ELBO of none but them both."""

    def log_prob(z):
        return torch.logaddexp(-0.5 * (z - 4.0).square().sum(), -0.5 * (z + 4.0).square().sum())

    density = density_of(log_prob, 2)
    points = torch.tensor([[-5.0, -3.0], [5.0, 3.0], [2.0, 5.0], [-3.0, -4.0]], dtype=torch.float64)
    single, several = along_paths(density, points, seed=0)[0]
    close(single.loc.abs(), torch.full((2,), 4.0, dtype=torch.float64), 0.1)
    assert (several.loc.abs() < 1.5).all()
    assert (several.scale @ several.scale.mT)[0, 1] > 10.0


def test_improper_priors_and_one_dimension():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.StudentT(4.0, mu, 1e-3), obs=y)

    found = portfolio(pf.LogDensity(model, (real(1e3),)), seed=0)
    assert found[0].elbo == pytest.approx(0.0, abs=0.1)
    assert float(found[0].loc) == pytest.approx(1e3, abs=1e-3)


@pytest.mark.parametrize("df", [15.0, 1e6])
def test_supports_with_an_edge(df):
    """The density is -inf beyond an edge near the mode; some start is usable all the same, and none is NaN."""

    def log_prob(z):
        return torch.where(z[0] < 1.0, -0.5 * z.square().sum(), -torch.inf)

    found = portfolio(density_of(log_prob, 2), seed=0, df=df)
    assert all(not math.isnan(start.elbo) for start in found)
    for start in found:
        assert torch.isfinite(start.loc).all()
        assert torch.isfinite(start.scale).all()


def test_one_seed_one_answer():
    first, again, other = (portfolio(density_of(funnel, 10), seed=seed) for seed in (3, 3, 4))
    assert names(first) == names(again)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.loc, two.loc)
        assert torch.equal(one.scale, two.scale)
        assert one.elbo == two.elbo
    assert first[0].elbo != other[0].elbo


@pytest.mark.parametrize("dim", [2, 50])
def test_cost(dim):
    """Paths take at most 3000 gradients and rows of Hessians, from ten points."""

    def log_prob(z):
        return funnel(torch.cat([z[:1], z[1:].sum(0, keepdim=True), z.new_zeros(8)])) - 0.5 * z.square().sum()

    density = density_of(log_prob, dim)
    along_paths(density, starts(density, 10), seed=0)
    assert 0 < density.evaluations <= 3000


def test_hessians_above_50_dimensions_are_taken_where_paths_ended():
    """A funnel of 60 has no mode: from ten points, Newton's method would climb its neck for sixty steps."""

    def log_prob(z):
        return funnel(torch.cat([z[:2], z.new_zeros(8)])) - 0.5 * z[2:].square().sum()

    density = density_of(log_prob, 60)
    found = portfolio(density, seed=0)
    assert "laplace" in names(found)
    assert found[0].elbo > -2.0
    assert (
        density.evaluations < 14_000
    )  # a row of a Hessian counts twice; twice as many by Newton's method from everywhere


def test_each_end_of_paths_is_one_mode():
    """Two modes of unequal height in 60 dimensions, from ten points: two places, the higher one first."""

    def log_prob(z):
        near = [-0.5 * (z - at).square().sum() for at in (4.0, -4.0)]
        return torch.logaddexp(near[0], near[1] - 1.0)

    density = density_of(log_prob, 60)
    _, ends = along_paths(density, starts(density, 10), seed=0)
    close(ends, torch.tensor([[4.0], [-4.0]]).double().expand(2, 60), 0.01)
    modes = [start.name for start in portfolio(density, seed=0) if start.evidence is not None]
    assert modes == ["laplace", "laplace 2"]


@pytest.mark.falls_back
def test_models_that_cannot_be_batched():
    """A branch on a value: run one by one, with the curvature from differences; found to 0.01 sd all the same."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 10.0))
        scale = 2.0 if mu.item() > -50.0 else 1.0
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

    density = pf.LogDensity(model, (real(5.0),))
    assert not density.batched
    found = portfolio(density, seed=0)
    precision = 0.01 + 0.25
    assert float(found[0].loc) == pytest.approx(1.25 / precision, abs=0.01)
    single = along_paths(density, prior_draws(density, 3, seed=0), seed=0)[0][0]
    assert float(single.scale) == pytest.approx(precision**-0.5, rel=1e-3)


def test_single_precision():
    """A slope on years, correlated with its intercept to 0.999997: float32 finds what float64 finds, to 0.3 nats."""
    years = 1980.0 + 5.0 * torch.rand(60, generator=torch.Generator().manual_seed(107))
    data = 8.0 + 0.02 * (years - 1980.0) + 0.5 * normal(60, seed=108, dtype=torch.float32)

    def model(x, y):
        intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(0.0), 1000.0))
        slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 10.0))
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5).to_event(1), obs=y)

    densities = [pf.LogDensity(model, (years.to(dtype), data.to(dtype))) for dtype in (torch.float32, torch.float64)]
    single, double = (portfolio(density, seed=0)[0] for density in densities)
    assert single.loc.dtype == single.scale.dtype == torch.float32
    assert single.elbo == pytest.approx(double.elbo, abs=0.3)


def test_a_model_with_factorizations_that_fail():
    """A Gaussian process without jitter: some steps end where its kernel is singular, and are not taken."""
    x = torch.linspace(-10.0, 10.0, 11, dtype=torch.float64)

    def model(y):
        length = pyro.sample("length", dist.Gamma(real(25.0), 4.0))
        size, noise = (pyro.sample(name, dist.HalfNormal(real(sd))) for name, sd in (("size", 2.0), ("noise", 1.0)))
        kernel = size**2 * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + noise * torch.eye(11).double()
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), kernel), obs=y)

    for seed in range(3):
        found = portfolio(pf.LogDensity(model, (torch.sin(0.5 * x),)), seed=seed)
        assert best(found, "laplace").elbo > best(found, "standard").elbo + 10.0


def test_moments_are_left_out_where_weights_cannot_be_trusted():
    """A Cauchy has no mean; draws of Gaussians with weights for it have a k-hat of 0.8."""
    density = density_of(lambda z: -torch.log1p(z.square()).sum(), 3)
    points = prior_draws(density, 10, seed=0)
    assert (
        pool(density, pathfinder(density, points, curvature.scales(density, points), seed=0).best, seed=0).k_hat > 0.7
    )
    assert names(along_paths(density, points, seed=0)[0]) == ["pathfinder"]


@pytest.mark.parametrize("kinds", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_divergence_of_starts(kinds):
    """Against torch's, for diagonal and triangular scales."""
    pair = []
    for seed, kind in enumerate(kinds):
        scale = 0.5 + normal(4, seed=seed).abs()
        pair.append(Start("", normal(4, seed=seed + 10), scale if kind == 1 else scale.diag() + 0.3 * below(seed)))
    exact = kl_divergence(*(MultivariateNormal(start.loc, scale_tril=full(start)) for start in pair))
    assert divergence(*pair) == pytest.approx(float(exact), rel=1e-10)
    assert divergence(pair[0], pair[0]) == pytest.approx(0.0, abs=1e-12)


def below(seed):
    return normal(4, 4, seed=seed + 20).tril(-1)


def full(start):
    return start.scale.diag() if start.scale.dim() == 1 else start.scale


# curvature -----------------------------------------------------------------------------------------------------------


def quartic(z):
    return -(z.square().square() / 12.0).sum() - 0.3 * z[0] * z[-1]


@pytest.mark.parametrize("derivatives", ["automatic", "differences", "differences, point by point"])
@pytest.mark.parametrize("dim", [3, 201])
def test_scales(dim, derivatives, monkeypatch):
    """The second derivative is -z^2 on the diagonal, on both sides of the limit for full Hessians, to 1e-5."""
    density = density_of(quartic, dim)
    if derivatives == "automatic":
        monkeypatch.setattr(curvature, "_has_digits", lambda density: False)
    if derivatives == "differences, point by point":
        monkeypatch.setattr(density, "batched", False)
    points = 1.0 + normal(2, dim, seed=1).abs()
    before = density.evaluations
    close(curvature.scales(density, points), 1.0 / points, 1e-5)
    assert density.evaluations - before == 2 * dim * (1 if derivatives == "automatic" else 2)


def test_hessians_of_a_long_model_come_from_its_recorded_gradients(monkeypatch):
    """Second derivatives of a loop of thousands of operations took 40 times as long, and half of a search."""
    density = density_of(quartic, 3)
    points = 1.0 + normal(2, 3, seed=1).abs()

    def covariances(density, points):
        roots = curvature.inverse_roots(density, points)[0]
        return roots @ roots.mT

    expected, before = covariances(density, points), density.evaluations
    monkeypatch.setattr(density.work, "operations", LONG)
    close(covariances(density, points), expected, 1e-7)
    assert density.evaluations - before == 2 * 3 * 2  # two for each coordinate of each point
    narrow = density_of(lambda z: quartic(1e6 * z), 3)  # a step would be six standard deviations
    exact = covariances(narrow, 1e-6 * points)
    monkeypatch.setattr(narrow.work, "operations", LONG)
    close(1e12 * covariances(narrow, 1e-6 * points), 1e12 * exact, 1e-12)


def test_scales_where_there_is_no_curvature():
    """Flat, or NaN: 1."""
    density = density_of(lambda z: z[0] - 0.5 * z[1].square() + (z[2] - 1.0).abs().sqrt(), 3)
    points = torch.tensor([[0.5, 0.5, 1.0]], dtype=torch.float64)
    close(curvature.scales(density, points)[0, :2], torch.ones(2, dtype=torch.float64), 1e-12)
    assert float(curvature.scales(density, points)[0, 2]) == 1.0


def test_an_infinite_second_derivative_is_no_scale():
    """|x|^1.5 at 0: the other coordinate of that point, and the other point, keep theirs."""

    def function(x):
        return -x.abs().pow(1.5).sum()

    points = torch.tensor([[0.0, 1.0], [4.0, 1.0]], dtype=torch.float64)
    found = hessian_diagonals(function, points, chunk=1)
    close(curvature._units(found)[:, 1], torch.full((2,), 0.75**-0.5, dtype=torch.float64), 1e-12)
    assert not torch.isfinite(found[0, 0])
    assert float(curvature._units(found)[0, 0]) == 1.0
