"""A mixture of Gaussians as the base of a flow: its density, draws, quantiles, files."""

import math

import pytest
import torch
from scipy.stats import multivariate_t

import pyro_flows as pf
from pyro_flows.density_estimation.standardizing import knots_of
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.recipe import with_fixed, with_mixture
from pyro_flows.flows.recipe_json import from_json, not_rebuilt, to_json
from tests.registry import normal, randomize

IN_CONTEXTS = ("log_weights", "df", "shift", "log_scale")


def mixture(dim, components=3, context_dim=0):
    made = MixtureBase(dim, components, context_dim=context_dim, hidden=(8,)).double()
    return randomize(made, sd=0.6, seed=1)


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_log_density_is_that_of_torch(dim, context_dim):
    made = mixture(dim, context_dim=context_dim).requires_grad_(False)
    context = normal(5, context_dim, seed=2) if context_dim else None
    x = normal(5, dim, seed=3)
    found = made(context).log_prob(x)
    base = made(context).parts
    for row in range(5):
        total = []
        parts = base if context is None else base._replace(**{n: getattr(base, n)[row] for n in IN_CONTEXTS})
        for k in range(3):
            scale = torch.ones(dim).double() if context is None else parts.log_scale[k].exp()
            shift = torch.zeros(dim).double() if context is None else parts.shift[k]
            root = torch.linalg.inv(parts.factor[k]) @ scale.diag()
            student = multivariate_t(
                (parts.loc[k] + root @ shift).numpy(), (root @ root.T).numpy(), df=float(parts.df[k])
            )
            total.append(parts.log_weights[k] + student.logpdf(x[row].numpy()))
        assert torch.allclose(found[row], torch.stack(total).logsumexp(0))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_draws_follow_the_density(context_dim):
    torch.manual_seed(0)
    made = mixture(2, context_dim=context_dim).requires_grad_(False)
    context = normal(1, context_dim, seed=2) if context_dim else None
    base = made(context)
    x = base.sample((200_000,)).reshape(-1, 2)
    assert torch.allclose(x.mean(0), base.mean.reshape(2), atol=0.05)
    # E[h / q] of a narrow normal density h is 1, whatever q
    inner = torch.distributions.MultivariateNormal(base.mean.reshape(2), 0.3 * torch.eye(2).double())
    ratio = (inner.log_prob(x) - base.log_prob(x)).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / math.sqrt(len(x)))
    with pytest.raises(NotImplementedError):
        base.rsample()


def test_quantiles_of_one_coordinate_undo_the_distribution_function():
    made = mixture(1, context_dim=2).requires_grad_(False)
    base = made(normal(6, 2, seed=4)[:, None])
    u = torch.linspace(0.001, 0.999, 7).double()
    x = base.icdf(u.expand(6, 7))
    assert x.shape == (6, 7, 1)
    assert torch.allclose(base.cdf(x), u.expand(6, 7), atol=1e-9)
    step = 1e-5
    slope = (base.cdf(x + step) - base.cdf(x - step)) / (2 * step)
    assert torch.allclose(slope.log(), base.log_prob(x), atol=1e-4)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_flow_with_a_mixture_is_a_distribution_and_is_rebuilt(context_dim):
    flow = with_mixture(
        pf.spline(2, layers=2, context_dim=context_dim, hidden=(8,)), components=3, context_dim=context_dim
    )
    randomize(flow, sd=0.3)
    context = normal(4, context_dim, seed=5, dtype=torch.float32) if context_dim else None
    y = normal(4, 2, seed=6, dtype=torch.float32)
    assert flow.base == "mixture"
    assert torch.allclose(flow.log_prob(y, context), flow(context).log_prob(y), atol=1e-5)
    assert flow(context).sample().shape == ((4, 2) if context_dim else (2,))
    assert flow(context).sample((7,)).shape == ((7, 4, 2) if context_dim else (7, 2))
    assert not_rebuilt(flow) is None
    again = from_json(to_json(flow))
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.log_prob(y, context), flow.log_prob(y, context))
    with pytest.raises(ValueError, match="no path gradient"):
        flow.sample_with_score((3,))
    with pytest.raises(ValueError, match="base of vectors"):
        with_mixture(pf.glow((1, 4, 4), levels=1, layers=1), components=2)


def test_a_share_of_the_mass_is_moved_by_no_context():
    made, fixed = mixture(1, context_dim=2).requires_grad_(False), mixture(1, components=2)
    context, x = normal(6, 2, seed=4), normal(6, 1, seed=3)
    plain, still = made(context), fixed()
    terms = torch.stack([plain.log_prob(x) + math.log(0.7), still.log_prob(x) + math.log(0.3)]).detach()
    made.defend(fixed, 0.3)
    found = made(context)
    assert torch.allclose(found.log_prob(x), terms.logsumexp(0))
    assert torch.allclose(found.cdf(x), 0.7 * plain.cdf(x) + 0.3 * still.cdf(x))
    assert torch.allclose(found.cdf(found.icdf(found.cdf(x))), found.cdf(x), atol=1e-9)
    assert torch.allclose(found.mean, 0.7 * plain.mean + 0.3 * still.mean)
    torch.manual_seed(0)
    below = (found.sample((20_000,)) < x).double().mean(0)[:, 0]
    assert torch.allclose(below, found.cdf(x), atol=0.02)
    flow = with_mixture(pf.spline(1, layers=1, context_dim=2, hidden=(8,)), components=3, context_dim=2)
    with_fixed(flow, fixed.float(), 0.3)
    again = from_json(to_json(flow))
    again.load_state_dict(flow.state_dict())
    y, about = x.float(), context.float()
    assert torch.equal(again.log_prob(y, about), flow.log_prob(y, about))
    assert not any(parameter.requires_grad for parameter in again.mixture.fixed.parameters())


def test_the_scale_of_a_context_goes_with_the_state():
    flow = with_mixture(pf.spline(1, layers=1, context_dim=2, hidden=(8,)), components=2, context_dim=2)
    scale = torch.tensor([[100.0, -5.0], [20.0, 0.1]])
    flow.bijection.context_scale = flow.mixture.context_scale = scale
    randomize(flow, sd=0.3)
    again = from_json(to_json(flow))
    again.load_state_dict(flow.state_dict())
    context = scale[0] + scale[1] * normal(4, 2, seed=1, dtype=torch.float32)
    y = normal(4, 1, seed=2, dtype=torch.float32)
    assert torch.equal(again.log_prob(y, context), flow.log_prob(y, context))
    assert not torch.allclose(again.log_prob(y, context), again.log_prob(y, context.flip(0)))
    for wrong in (torch.ones(2, 3), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="positive scales"):
            again.load_state_dict({**flow.state_dict(), "bijection.context_scale": wrong})
    far = 1e3 * normal(50, 2, seed=7, dtype=torch.float32).pow(9)
    flow.bijection.context_knots = flow.mixture.context_knots = knots_of(far)
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.log_prob(y, context), flow.log_prob(y, context))
    moved = knots_of(far + 1.0)
    again.load_state_dict({**flow.state_dict(), "bijection.context_knots": moved, "mixture.context_knots": moved})
    assert not torch.allclose(again.log_prob(y, context), flow.log_prob(y, context))
    for wrong in (torch.ones(2, 3, 4), torch.arange(8.0).flip(0).reshape(2, 2, 2)):
        with pytest.raises(ValueError, match="numbers that do not fall"):
            again.load_state_dict({**flow.state_dict(), "bijection.context_knots": wrong})
