"""A training step by autograd, by recorded graphs and compiled: the same numbers, on each of the ported posteriors."""

import pytest
import torch

import pyro_flows as pf
from benchmarks.models import NAMES, load
from benchmarks.reference import find_posteriordb
from pyro_flows import LogDensity
from pyro_flows.objectives import pulled
from pyro_flows.passes import gradient_of
from pyro_flows.steps import Step
from pyro_flows.updates import Moments, update, watch
from tests.invariants import close
from tests.registry import needs_compiler, randomise

ROOT = find_posteriordb()
needs_posteriordb = pytest.mark.skipif(ROOT is None, reason="posteriordb not found: set POSTERIORDB to a checkout")
DRAWS, RATE, BLEND, BETA = 8, 1e-2, 0.5, 0.9

Made = tuple[pf.Flow, LogDensity, torch.Tensor, list[torch.Tensor]]


def made(name: str) -> Made:
    """A guide for a posterior, a little off its start, with two layers; its weights, and their views."""
    problem = load(name, ROOT)
    torch.manual_seed(0)
    guide = pf.AutoRealNVP(problem.model, layers=2, df=15.0).initialize(*problem.args)
    flow = randomise(guide.flow, sd=0.05)
    weights = torch.cat([part.detach().reshape(-1) for part in flow.parameters()])
    parts = weights.split([part.numel() for part in flow.parameters()])
    views = [part.view(whole.shape) for part, whole in zip(parts, flow.parameters(), strict=True)]
    return flow, LogDensity(problem.model, problem.args), weights, views


def base_points(flow: pf.Flow) -> torch.Tensor:
    torch.manual_seed(1)
    return flow.base_distribution().sample((DRAWS,))


def by_autograd(flow: pf.Flow, density: LogDensity, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a first step, and the first moment, which is a tenth of the gradient."""
    x = base_points(flow)
    z, log_q, score_q = flow.sample_with_score(at=x)
    log_p, score_p = density.value_and_grad(z)
    pull, terms, log_weights = pulled(log_p, score_p, log_q, score_q, torch.zeros_like(log_q), forward=BLEND, beta=BETA)
    loss, moments = watch(Moments.fresh(weights), terms, log_weights)
    _, moments = update(weights, moments, gradient_of(flow, (pull * z).sum()), RATE)
    return loss, moments.mean


def by_graphs(step: Step, flow: pf.Flow, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = base_points(flow)
    loss, _, moments = step(weights, Moments.fresh(weights), x, torch.zeros_like(x[:, 0]), RATE, BLEND, BETA)
    return loss, moments.mean


def same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], size: float) -> None:
    """Both are finite, and equal relative to the largest component of each."""
    for got, wanted in zip(found, expected, strict=True):
        assert torch.isfinite(wanted).all()
        scale = wanted.abs().max().clamp_min(1e-300)
        close(got / scale, wanted / scale, size)


@needs_posteriordb
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_are_those_of_autograd(name):
    flow, density, weights, views = made(name)
    expected = by_autograd(flow, density, weights)
    step = Step(flow, density, base_points(flow), weights, views, compile=False)
    same(by_graphs(step, flow, weights), expected, 1e-9)
    step._whole = None  # the passes and the density one after the other
    same(by_graphs(step, flow, weights), expected, 1e-9)


@needs_compiler
@needs_posteriordb
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_steps_are_those_of_autograd(name):
    flow, density, weights, views = made(name)
    expected = by_autograd(flow, density, weights)
    step = Step(flow, density, base_points(flow), weights, views, compile=True)
    same(by_graphs(step, flow, weights), expected, 1e-8)
    assert step.compiled


def test_a_step_goes_around_points_without_a_factorization():
    """A batch in which a Cholesky decomposition fails is evaluated in parts, and its good draws count."""
    import pyro
    import pyro.distributions as dist

    def model() -> None:
        rho = pyro.sample("rho", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        cross = 0.5 * rho
        covariance = torch.stack([torch.stack([cross * 0 + 1.0, cross]), torch.stack([cross, cross * 0 + 1.0])])
        root = torch.linalg.cholesky(covariance)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=root), obs=torch.ones(2).double())

    density = LogDensity(model)
    flow = randomise(pf.AutoPlanar(model, layers=2).initialize().flow, sd=0.05)
    weights = torch.cat([part.detach().reshape(-1) for part in flow.parameters()])
    parts = weights.split([part.numel() for part in flow.parameters()])
    views = [part.view(whole.shape) for part, whole in zip(parts, flow.parameters(), strict=True)]
    x = torch.linspace(-1.0, 1.0, DRAWS, dtype=torch.float64)[:, None]
    step = Step(flow, density, x, weights, views, compile=False)
    assert step._whole is not None
    far = torch.cat([x[:-1], torch.full((1, 1), 50.0, dtype=torch.float64)])
    before = density.evaluations
    loss, moved, moments = step(weights, Moments.fresh(weights), far, torch.zeros(DRAWS).double(), RATE, 0.0, 1.0)
    assert torch.isfinite(loss)
    assert int(moments.skipped) == 0
    assert not torch.equal(moved, weights)
    assert density.evaluations == before + DRAWS
