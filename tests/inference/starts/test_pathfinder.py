"""L-BFGS paths and their Gaussians: exact algebra, known targets, and places where a path must not go."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.inference.starts import pathfinder as module
from pyro_flows.inference.starts.climb import Climb, climb
from pyro_flows.inference.starts.curvature import inverse_roots, lower_triangular, scales
from pyro_flows.inference.starts.gaussians import Gaussians
from pyro_flows.inference.starts.pathfinder import DRAWS, pathfinder, pool
from tests.invariants import close
from tests.registry import normal

WIDE = 10.0 ** torch.linspace(-6.0, 6.0, 13, dtype=torch.float64)  # scales side by side


def density_of(log_prob, dim):
    """A model with this log density: its prior draws z, but has no density."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=torch.float64), 1.0).to_event(1).mask(False))
        pyro.factor("log_prob", log_prob(z))

    return pf.LogDensity(model)


def gaussian(scales_, *, seed=100, correlated=0.5):
    """A correlated Gaussian with these scales, its mean 30 sds from zero; with its log normalizer left in."""
    dim = len(scales_)
    mix = torch.eye(dim, dtype=torch.float64) + correlated * normal(dim, dim, seed=seed) / dim**0.5
    factor = scales_[:, None] * torch.linalg.cholesky(mix @ mix.mT)
    loc = 30.0 * scales_ * normal(dim, seed=seed + 1).sign()
    log_norm = -factor.diagonal().log().sum() - 0.5 * dim * math.log(2.0 * math.pi)

    def log_prob(z):
        away = torch.linalg.solve_triangular(factor, (z - loc)[:, None], upper=False)
        return log_norm - 0.5 * away.square().sum()

    return density_of(log_prob, dim), loc, factor


def starts(density, count=4, *, seed=3):
    return normal(count, density.dim, seed=seed)


# paths on known targets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", ["diagonal", "full"])
def test_a_gaussian_is_recovered(frames):
    """Scales of 1e-6 to 1e6: the ends are the mean to 1e-3 sd, the ELBO is 0 (the density is normalized).

    With frames of the full Hessian the covariance is exact to 1e-6; built up by L-BFGS, it costs less than a nat.
    """
    density, loc, factor = gaussian(WIDE)
    points = starts(density)
    units = scales(density, points) if frames == "diagonal" else lower_triangular(inverse_roots(density, points)[0])
    found = pathfinder(density, points, units, seed=0)
    assert found.settled.all()
    away = torch.linalg.solve_triangular(factor, (found.ends - loc).mT, upper=False)
    assert away.abs().max() < 1e-3
    assert (found.elbo.abs() < (1.0 if frames == "diagonal" else 1e-6)).all()
    if frames == "full":
        whitened = torch.linalg.solve_triangular(factor, lower_triangular(found.best.scale()), upper=False)
        close(whitened, torch.eye(len(WIDE), dtype=torch.float64).expand_as(whitened), 1e-6)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_paths_that_are_over_are_left_out(full, drawn, monkeypatch):
    """They end at ticks that differ by dozens, one at once; what comes of each is what comes of all side by side."""
    density, loc, _ = gaussian(10.0 ** torch.linspace(-2.0, 2.0, 5, dtype=torch.float64))
    points = 10.0 ** torch.linspace(-3.0, 4.0, 12, dtype=torch.float64)[:, None] * normal(12, 5, seed=3)
    points[3], points[5] = loc, math.inf
    units = scales(density, points.nan_to_num(posinf=1.0))
    frames = torch.diag_embed(units) if full and drawn else units
    kept = []

    def run():
        if not drawn:
            return climb(density, points, units)
        found = pathfinder(density, points, frames, seed=0)
        return found.ends, found.elbo, found.settled, *found.best

    leave_out = Climb._leave_out

    def left_out(self):
        leave_out(self)
        kept.append(len(self.under_way))

    monkeypatch.setattr(Climb, "_leave_out", left_out)
    found = run()
    assert kept[0] == len(points)
    assert kept[-1] <= len(points) // 2
    monkeypatch.setattr(Climb, "_leave_out", lambda self: None)
    for got, expected in zip(found, run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def funnel(z):
    """Neal's, in ten dimensions: the density grows without bound where z[0] falls and the others go to zero."""
    return (
        dist.Normal(z.new_tensor(0.0), 3.0).log_prob(z[0])
        + dist.Normal(z.new_zeros(9), (0.5 * z[0]).exp()).log_prob(z[1:]).sum()
    )


def test_two_modes():
    """Paths end in both, and the pool has the moments of the mixture: 0.75 of the mass at 4, sd of the whole 3.6."""

    def log_prob(z):
        left = dist.Normal(z.new_full((2,), -4.0), 1.0).log_prob(z).sum() + math.log(0.25)
        return torch.logaddexp(left, dist.Normal(z.new_full((2,), 4.0), 1.0).log_prob(z).sum() + math.log(0.75))

    density = density_of(log_prob, 2)
    points = torch.tensor([[-5.0, -3.0], [5.0, 3.0], [2.0, 5.0], [-3.0, -4.0]], dtype=torch.float64)
    found = pathfinder(density, points, scales(density, points), seed=0)
    close(found.ends, 4.0 * points.sign(), 1e-3)
    pooled = pool(density, found.best, seed=1)
    assert pooled.k_hat < 0.5
    close(pooled.mean, torch.full((2,), 2.0, dtype=torch.float64), 0.1)
    close(pooled.covariance, 12.0 + torch.eye(2, dtype=torch.float64), 0.1)


def test_the_pool_corrects_gaussians_that_are_off():
    """Weighted draws of three Gaussians, all of them shifted or too wide, have the target's moments to 0.15 sd."""
    density, loc, factor = gaussian(torch.tensor([0.01, 1.0, 100.0], dtype=torch.float64))
    shift = torch.tensor([[0.3, 0.0, 0.0], [0.0, -0.3, 0.0], [0.0, 0.0, 0.3]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    off = Gaussians(loc + shift @ factor.mT, factor.expand(3, 3, 3), 1.2 * torch.ones_like(shift), eye, eye)
    pooled = pool(density, off, seed=0)
    away = torch.linalg.solve_triangular(factor, (pooled.mean - loc)[:, None], upper=False)
    assert away.abs().max() < 0.15
    whitened = torch.linalg.solve_triangular(factor, pooled.covariance, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.mT, upper=False)
    close(whitened, torch.eye(3, dtype=torch.float64), 0.2)
    assert 150 < pooled.ess <= 300
    exact = 0.5 * 0.3**2 + 3 * (0.5 * (1.2**2 - 1.0) - math.log(1.2))
    assert float(pooled.elbo.mean()) == pytest.approx(-exact, abs=0.1)


def test_the_pool_leaves_out_hopeless_paths():
    """A Gaussian that is 50 sds off takes no part, so that weights stay even."""
    density, loc, factor = gaussian(torch.tensor([1.0, 2.0], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    locs = torch.stack([loc, loc + 50.0])
    pooled = pool(density, Gaussians(locs, factor.expand(2, 2, 2), torch.ones_like(locs), eye, eye), seed=0)
    assert pooled.elbo[1] < -100.0
    assert pooled.ess == pytest.approx(10 * DRAWS, rel=1e-3)


# where a path must not go --------------------------------------------------------------------------------------------


class _Watched:
    """A density that remembers where gradients were taken."""

    def __init__(self, density):
        self.density, self.dim, self.dtype, self.device = density, density.dim, density.dtype, density.device
        self.numbers, self.written = density.numbers, density.written
        self.heights = []

    def __call__(self, z):
        return self.density(z)

    def value_and_grad(self, z):
        self.heights.append(self.density.value_and_grad(z)[0])
        return self.density.value_and_grad(z)


@pytest.mark.parametrize("edge", [-torch.inf, math.nan, torch.inf])
def test_paths_stay_where_the_density_is_finite(edge):
    """Its peak is at 2.5, but beyond 2 it is -inf, NaN or +inf: paths go up to the edge and not beyond, never down."""

    def log_prob(z):
        inside = dist.Normal(z.new_full((2,), 2.5), 1.0).log_prob(z).sum()
        return torch.where(z[0] < 2.0, inside, edge)

    density = density_of(log_prob, 2)
    points = starts(density, 5) - 1.0
    watched = _Watched(density)
    found = pathfinder(watched, points, scales(density, points), seed=0)
    assert any(not torch.isfinite(height).all() for height in watched.heights), "the edge was never tried"
    assert torch.isfinite(found.ends).all()
    assert torch.isfinite(density(found.ends)).all()
    assert (density(found.ends) >= density(points)).all()
    assert (found.ends[:, 0] < 2.0).all()
    assert (found.ends[:, 0] > 1.9).all()
    assert torch.isfinite(found.elbo).all()


def test_a_path_that_begins_nowhere_is_left_where_it_is():
    """Where the height or the gradient is not finite, there is no Gaussian; other paths are not disturbed."""

    def log_prob(z):
        root = (z[0] - 1.0).abs().sqrt()
        return dist.Normal(z.new_zeros(2), 1.0).log_prob(z).sum() - 0.0 * root

    density = density_of(log_prob, 2)
    points = torch.tensor([[1.0, 0.5], [0.5, 0.5], [torch.inf, 0.0]], dtype=torch.float64)
    units = torch.ones_like(points)
    found = pathfinder(density, points, units, seed=0)
    assert found.settled.tolist() == [False, True, False]
    close(found.ends[0], points[0], 0.0)
    close(found.ends[1], torch.zeros(2, dtype=torch.float64), 1e-4)
    assert found.elbo[1] > -0.01
    assert found.elbo[2] == -torch.inf


def test_an_elbo_with_draws_outside_is_that_of_the_cut_gaussian():
    terms = torch.tensor([[1.0, -torch.inf, 3.0, math.nan], [-torch.inf] * 4, [2.0] * 4])
    close(module.cut_elbo(terms), torch.tensor([2.0 + math.log(0.5), -torch.inf, 2.0]), 1e-6)


# the conduct of the function -----------------------------------------------------------------------------------------


def test_cost():
    """At most 100 gradients a path; a Gaussian in its own frame takes one step and one look."""
    density, _, _ = gaussian(WIDE)
    points = starts(density)
    units = lower_triangular(inverse_roots(density, points)[0])
    before = density.evaluations
    pathfinder(density, points, units, seed=0)
    assert density.evaluations - before <= 4 * len(points)
    unbounded = density_of(lambda z: z.sum() + z.square().sum(), 3)
    pathfinder(unbounded, starts(unbounded), torch.ones(4, 3, dtype=torch.float64), seed=0)
    assert 4 * 50 < unbounded.evaluations <= 4 * (1 + module.TICKS)


def test_fewer_densities_are_taken_where_each_writes_many_numbers(monkeypatch):
    density, _, _ = gaussian(WIDE)
    points, drawn = starts(density), set()
    units = lower_triangular(inverse_roots(density, points)[0])
    best = module._best

    def counted(density, noise, *rest):
        drawn.add(len(noise))
        return best(density, noise, *rest)

    monkeypatch.setattr(module, "_best", counted)
    pathfinder(density, points, units, seed=0)
    monkeypatch.setattr(type(density), "affordable", lambda self, draws: draws // 4)
    pathfinder(density, points, units, seed=0)
    assert drawn == {module.DRAWS, module.DRAWS // 4}
