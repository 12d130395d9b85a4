"""A training step by autograd, by recorded graphs and compiled: the same numbers, on each of the ported posteriors."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from benchmarks.posteriors.models import NAMES, load
from benchmarks.posteriors.reference import find_posteriordb
from pyro_flows import LogDensity
from pyro_flows.inference.training.flow_graphs import gradient_of
from pyro_flows.inference.training.objectives import pulled
from pyro_flows.inference.training.step_graph import Moments, Step, advance
from tests.invariants import close
from tests.registry import randomize
from tests.slow import rest_slow

ROOT = find_posteriordb()
needs_posteriordb = pytest.mark.skipif(ROOT is None, reason="posteriordb not found: set POSTERIORDB to a checkout")
DRAWS, RATE, BLEND = 8, 1e-2, 0.5

Made = tuple[pf.Flow, LogDensity, torch.Tensor, list[torch.Tensor]]


def made(name: str) -> Made:
    """A guide for a posterior, a little off its start, with two layers; its weights, and their views."""
    problem = load(name, ROOT)
    torch.manual_seed(0)
    guide = pf.AutoRealNVP(problem.model, layers=2, df=15.0).initialize(*problem.args)
    return with_views(guide.flow, LogDensity(problem.model, problem.args))


def with_views(flow: pf.Flow, density: LogDensity) -> Made:
    flow = randomize(flow, sd=0.05)
    weights = torch.cat([part.detach().reshape(-1) for part in flow.parameters()])
    parts = weights.split([part.numel() for part in flow.parameters()])
    views = [part.view(whole.shape) for part, whole in zip(parts, flow.parameters(), strict=True)]
    return flow, density, weights, views


def base_points(flow: pf.Flow) -> torch.Tensor:
    torch.manual_seed(1)
    return flow.base_distribution().sample((DRAWS,))


def by_autograd(flow: pf.Flow, density: LogDensity, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a first step, and the first moment, which is a tenth of the gradient."""
    x = base_points(flow)
    z, log_q, score_q = flow.sample_with_score(at=x)
    log_p, score_p = density.value_and_grad(z)
    pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, torch.zeros_like(log_q), forward=BLEND)
    gradient = gradient_of((pull * z).sum(), list(flow.parameters()))
    loss, _, moments = advance(weights, Moments.fresh(weights), gradient, terms, log_weights, RATE)
    return loss, moments.mean


def by_graphs(step: Step, flow: pf.Flow, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = base_points(flow)
    loss, _, moments = step(weights, Moments.fresh(weights), x, torch.zeros_like(x[:, 0]), RATE, BLEND)
    return loss, moments.mean


def same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], size: float) -> None:
    """Both are finite, and equal relative to the largest component of each."""
    for got, wanted in zip(found, expected, strict=True):
        assert torch.isfinite(wanted).all()
        scale = wanted.abs().max().clamp_min(1e-300)
        close(got / scale, wanted / scale, size)


LONG = ("diamonds-diamonds", "low_dim_gauss_mix-low_dim_gauss_mix", "bball_drive_event_0-hmm_drive_0")


@needs_posteriordb
@pytest.mark.parametrize("name", rest_slow(NAMES, lambda name: name not in LONG))
def test_recorded_steps_are_those_of_autograd(name):
    flow, density, weights, views = made(name)
    expected = by_autograd(flow, density, weights)
    step = Step(flow, density, base_points(flow), weights, views)
    same(by_graphs(step, flow, weights), expected, 1e-9)
    step._whole = None  # the passes and the density one after the other
    same(by_graphs(step, flow, weights), expected, 1e-9)


def correlated() -> None:
    rho = pyro.sample("rho", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
    covariance = torch.eye(2, dtype=torch.float64) + 0.5 * rho * torch.eye(2, dtype=torch.float64).flip(0)
    root = torch.linalg.cholesky(covariance)
    y = torch.ones(2, dtype=torch.float64)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=root), obs=y)


def test_a_step_goes_around_points_without_a_factorization():
    """A batch in which a Cholesky decomposition fails is evaluated in parts, and its good draws count."""
    guide = pf.AutoPlanar(correlated, layers=2).initialize()
    flow, density, weights, views = with_views(guide.flow, LogDensity(correlated))
    x = torch.linspace(-1.0, 1.0, DRAWS, dtype=torch.float64)[:, None]
    step = Step(flow, density, x, weights, views)
    assert step._whole is not None
    far = torch.cat([x[:-1], torch.full((1, 1), 50.0, dtype=torch.float64)])
    before = density.evaluations
    loss, moved, moments = step(weights, Moments.fresh(weights), far, torch.zeros(DRAWS).double(), RATE, 0.0)
    assert torch.isfinite(loss)
    assert int(moments.skipped) == 0
    assert not torch.equal(moved, weights)
    assert density.evaluations == before + DRAWS


def writing() -> None:
    """A model that fills tensors in place, so that reads before and after are not the same."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    first[0] = z[0]
    second[0] = z[1]
    pyro.factor("joint", -(first - 2.0 * second).square().sum())


def test_a_density_that_writes_into_tensors_stays_outside_of_the_graph():
    flow, density, weights, views = with_views(pf.realnvp(2, layers=2).double(), LogDensity(writing))
    expected = by_autograd(flow, density, weights)
    step = Step(flow, density, base_points(flow), weights, views)
    same(by_graphs(step, flow, weights), expected, 1e-9)


def test_where_the_flow_is_the_posterior_the_step_is_still_one_graph():
    """There is no gradient to compare then, but for rounding."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    flow = pf.realnvp(3, layers=2).double()
    weights = torch.cat([part.detach().reshape(-1) for part in flow.parameters()])
    views = [part.detach() for part in flow.parameters()]
    step = Step(flow, LogDensity(model), base_points(flow), weights, views)
    assert step._whole is not None


def test_left_out_draws_are_in_no_mean():
    """Of ten draws with log ratio -1000, three are left out."""
    log_p, zeros = torch.full((10,), -1000.0), torch.zeros(10)
    thinning = torch.where(torch.arange(10) < 3, -torch.inf, 0.0)
    pull, terms, log_weights = pulled(log_p, torch.ones(10, 2), zeros, torch.zeros(10, 2), thinning)
    moments = Moments.fresh(torch.zeros(1))
    loss, *_ = advance(torch.zeros(1), moments, torch.ones(1), terms, log_weights, RATE)
    assert float(loss) == 1000.0
    assert bool((pull[:3] == 0.0).all())
    assert bool((pull[3:] != 0.0).all())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("forward", [0.0, 0.5])
def test_a_draw_that_the_flow_cannot_score_spoils_no_other(bad, forward):
    log_q = torch.zeros(6)
    log_q[0] = bad
    given = torch.zeros(6), torch.ones(6, 2), log_q, torch.zeros(6, 2), torch.zeros(6)
    for share in (forward, torch.tensor(forward)):
        pull, *_ = pulled(*given, forward=share)
        assert torch.isfinite(pull).all()
        assert bool((pull[0] == 0.0).all())
        assert bool((pull[1:] != 0.0).all())
