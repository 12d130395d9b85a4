"""A mixture of Gaussians as the base of a flow: its density, draws, quantiles, files."""

import math

import pyro
import pytest
import torch
from scipy.stats import multivariate_t

import pyro_flows as pf
from pyro_flows.densities.standardizing import knots_of
from pyro_flows.flows.mixture_base import MixtureBase
from pyro_flows.flows.recipe import with_fixed, with_mixture, with_preprocess
from pyro_flows.flows.recipe_json import from_json, not_rebuilt, to_json
from pyro_flows.transforms.fixed import Preprocess
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
    with pytest.raises(NotImplementedError, match="a mixture have no gradient in its parameters; take sample"):
        base.rsample()


def test_quantiles_of_parts_of_very_different_widths():
    made = MixtureBase(1, 3).double().requires_grad_(False)
    factor = torch.tensor([10.0, 1e4, 1e-2])[:, None, None]
    made.assign(torch.tensor([0.3, 0.3, 0.4]).log(), torch.tensor([[-1e3], [0.0], [1e3]]), factor)
    base, u = made(), torch.tensor([1e-6, 0.1, 0.29, 0.31, 0.5, 0.59, 0.61, 0.9, 1.0 - 1e-6]).double()
    x = base.icdf(u)
    assert torch.allclose(base.cdf(x), u, atol=1e-7)
    assert bool((x.diff(dim=0) > 0.0).all())


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


@pytest.mark.parametrize("dim", [1, 2])
def test_a_share_of_the_mass_is_moved_by_no_context(dim):
    flow = with_mixture(
        pf.spline(dim, layers=2, context_dim=2, hidden=(8,)), components=3, context_dim=2, hidden=(8,)
    ).double()
    flow.bijection.context_scale = flow.mixture.context_scale = torch.tensor([[1.0, 0.0], [2.0, 0.5]]).double()
    flow = with_preprocess(flow, Preprocess(torch.ones(dim), 2 * torch.ones(dim), torch.ones(2, dim)).double())
    flow = randomize(flow, sd=0.3).requires_grad_(False)
    context, y, fixed = normal(6, 2, seed=4), 2 * normal(6, dim, seed=3), mixture(dim, components=2)
    u = flow.bijection.layers[-1].inverse_and_ladj(
        y, (context - flow.bijection.context_scale[0]) * torch.tensor([0.5, 2])
    )
    terms = torch.stack([flow.log_prob(y, context) + math.log(0.7), fixed().log_prob(u[0]) + u[1] + math.log(0.3)])
    with_fixed(flow, fixed, 0.3)
    assert torch.allclose(flow.log_prob(y, context), terms.logsumexp(0).detach())
    assert torch.allclose(flow(context).log_prob(y), flow.log_prob(y, context))
    assert flow(context).log_prob(y[:, None]).shape == (6, 6)
    again = from_json(to_json(flow)).double()
    again.load_state_dict(flow.state_dict())
    assert not_rebuilt(flow) is None
    assert torch.equal(again.log_prob(y, context), flow.log_prob(y, context))
    assert not any("fixed" in name for name, _ in again.named_parameters())
    pyro.module("density", again)  # it warned of each parameter that is not trained
    assert any(name.endswith("mixture.mixture.logits") for name in pyro.get_param_store())
    # E[h / q] of a narrow normal density h is 1, whatever q
    torch.manual_seed(0)
    x = flow(context[0]).sample((100_000,))
    inner = torch.distributions.MultivariateNormal(x.mean(0), 0.5 * torch.eye(dim).double())
    ratio = (inner.log_prob(x) - flow.log_prob(x, context[0].expand(len(x), -1))).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=5 * float(ratio.std()) / math.sqrt(len(x)))
    if dim == 1:
        base = flow.base_distribution(context[:, None])
        level = torch.linspace(0.001, 0.999, 7).double().expand(6, 7)
        at = base.icdf(level)
        assert torch.allclose(base.cdf(at), level, atol=1e-9)
        slope = (base.cdf(at + 1e-7) - base.cdf(at - 1e-7)) / 2e-7
        assert torch.allclose(slope.log(), base.log_prob(at), atol=1e-4)


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
