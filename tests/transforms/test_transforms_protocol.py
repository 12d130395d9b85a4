"""Torch's and Pyro's protocols: a bijection, and a bijection bound to a context, wherever a Transform is expected."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.infer.reparam import TransformReparam
from torch.distributions import ComposeTransform, Transform, constraints

import pyro_flows as pf
from tests.invariants import close
from tests.registry import FLOWS, HIDDEN, IMAGE, SMALL, each, make_flow, normal

PLAIN = [case for case in SMALL if not case.context_dim and case.shape in ((1,), (3,), IMAGE)]
CONDITIONAL = [case for case in SMALL if case.context_dim and case.shape in ((1,), (3,), IMAGE)]


def base(shape):
    zero = torch.zeros(shape, dtype=torch.float64)
    return dist.Normal(zero, zero + 1.0).to_event(len(shape))


@each(PLAIN)
def test_torch_protocol(case):
    t = case.make()
    x, _ = case.inputs(5)
    y, ladj = t.forward_and_ladj(x)
    assert isinstance(t, Transform)
    assert isinstance(t, dist.TransformModule)
    assert t.bijective
    assert t.event_dim == t.domain.event_dim == t.codomain.event_dim == len(case.shape)
    assert t.event_shape == case.shape
    assert isinstance(t.domain.base_constraint, type(constraints.real))
    close(t(x), y, 0.0)
    close(t.log_abs_det_jacobian(x, y), ladj, 0.0)
    close(t.inv(y), x, case.tolerance)
    close(t.inv.log_abs_det_jacobian(y, x), -ladj, case.tolerance)
    assert t.forward_shape(x.shape) == t.inverse_shape(x.shape) == x.shape
    assert t.with_cache(0) is t
    assert isinstance(hash(t), int)
    assert t == t
    assert t != case.make()


@each(PLAIN)
def test_inverse_of_the_inverse(case):
    """The very same object for a map; an equal view of the same map for a view."""
    t = case.make()
    assert t.inv.inv == t
    assert hash(t.inv) == hash(t.inv)
    assert t.inv != case.make().inv
    if not isinstance(t, pf.transforms.Inverse):
        assert t.inv.inv is t
    assert {id(p) for p in t.inv.parameters()} == {id(p) for p in t.parameters()}
    bound = t.condition(None)
    assert bound.inv.inv is bound


@each(PLAIN)
def test_with_cache_gives_the_same_map(case):
    t = case.make()
    x, _ = case.inputs(5)
    cached = t.with_cache()
    assert isinstance(cached, pf.transforms.Bound)
    assert cached.with_cache() is cached
    close(cached(x), t(x), 0.0)
    assert cached.inv(cached(x)).shape == x.shape


@each(PLAIN)
def test_transformed_distribution(case):
    """Change of variables, with the map itself, with a bound one, backwards, and inside a ComposeTransform."""
    t = case.make()
    y, _ = case.inputs(6)
    x, ladj = t.inverse_and_ladj(y)
    expected = base(case.shape).log_prob(x) + ladj
    for parts in ([t], [t.condition(None)], [t.with_cache()], [ComposeTransform([t])], [t.inv.inv]):
        for kind in (dist.TransformedDistribution, torch.distributions.TransformedDistribution):
            distribution = kind(base(case.shape), parts)
            assert (distribution.batch_shape, distribution.event_shape) == ((), case.shape)
            close(distribution.log_prob(y), expected, 1e-10)
            assert distribution.rsample((4, 2)).shape == (4, 2, *case.shape)
            assert distribution.expand((3,)).rsample().shape == (3, *case.shape)
    backwards = dist.TransformedDistribution(base(case.shape), [t.inv])
    z, ladj = t.forward_and_ladj(y)
    close(backwards.log_prob(y), base(case.shape).log_prob(z) + ladj, 1e-10)


@each(PLAIN)
def test_compose_transform(case):
    """Next to torch's own transforms, forwards and backwards."""
    t = case.make()
    x, _ = case.inputs(5)
    shift = torch.distributions.AffineTransform(2.0, 3.0, event_dim=len(case.shape))
    both = ComposeTransform([t, shift])
    y = both(x)
    close(y, 2.0 + 3.0 * t(x), 1e-12)
    close(both.inv(y), x, case.tolerance)
    expected = t.forward_and_ladj(x)[1] + x[0].numel() * torch.log(torch.tensor(3.0, dtype=torch.float64))
    close(both.log_abs_det_jacobian(x, y), expected, 1e-12)
    close(both.inv.log_abs_det_jacobian(y, x), -expected, case.tolerance)


@each(CONDITIONAL)
def test_conditional_transformed_distribution(case):
    t = case.make()
    _, context = case.inputs(4)
    y = normal(6, 4, *case.shape, seed=1)
    x, ladj = t.inverse_and_ladj(y, context)
    conditional = dist.ConditionalTransformedDistribution(base(case.shape), [t])
    distribution = conditional.condition(context)
    assert (distribution.batch_shape, distribution.event_shape) == ((4,), case.shape)
    close(distribution.log_prob(y), base(case.shape).log_prob(x) + ladj, 1e-10)
    assert distribution.rsample((6,)).shape == (6, 4, *case.shape)
    assert distribution.expand((2, 4)).rsample((6,)).shape == (6, 2, 4, *case.shape)
    assert not torch.allclose(conditional.condition(context + 1.0).log_prob(y), distribution.log_prob(y))


@each(CONDITIONAL)
def test_bound_is_a_torch_transform(case):
    t = case.make()
    x, context = case.inputs(4)
    bound = t.condition(context)
    y, ladj = t.forward_and_ladj(x, context)
    close(bound(x), y, 0.0)
    close(bound.log_abs_det_jacobian(x, y), ladj, 0.0)
    close(bound.inv.log_abs_det_jacobian(y, x), -ladj, 0.0)
    assert bound.forward_shape((7, 1, *case.shape)) == bound.inverse_shape((7, 1, *case.shape)) == (7, 4, *case.shape)
    assert bound.domain.event_dim == bound.codomain.event_dim == bound.event_dim == len(case.shape)
    assert repr(bound) == f"Bound({type(t).__name__}, context (4, 3))"


def test_pyro_conditional_compose():
    """Pyro's own composition of conditional transforms, and its caching, take these maps as parts."""
    parts = [next(case for case in SMALL if case.name == "Planar-2-context").make(seed=seed) for seed in (1, 2)]
    stack = dist.conditional.ConditionalComposeTransformModule(parts, cache_size=1)
    context, x = normal(4, 3, seed=1), normal(4, 2, seed=2)
    close(stack.condition(context)(x), pf.transforms.Compose(parts).forward_and_ladj(x, context)[0], 1e-12)
    assert len(list(stack.parameters())) == sum(len(list(part.parameters())) for part in parts)


def test_pyro_iterated():
    stack = pyro_transforms.iterated(3, pf.transforms.AffineCoupling, 2, hidden=HIDDEN)
    assert len({id(p) for p in stack.parameters()}) == 3 * len(
        list(pf.transforms.AffineCoupling(2, hidden=HIDDEN).parameters())
    )
    distribution = dist.TransformedDistribution(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), [stack])
    assert distribution.log_prob(distribution.rsample((5,))).shape == (5,)


@pytest.mark.parametrize("name", FLOWS)
def test_transform_reparam(name):
    """The noise becomes the latent site, with the base density; the flow's own site becomes its image."""
    flow = make_flow(name, 3)

    def model():
        return pyro.sample("z", flow())

    trace = pyro.poutine.trace(pyro.poutine.reparam(model, {"z": TransformReparam()})).get_trace()
    noise = trace.nodes["z_base"]["value"]
    close(trace.nodes["z"]["value"], flow.bijection(noise), 1e-12)
    close(trace.log_prob_sum(), flow.base_distribution().log_prob(noise).sum(), 1e-12)
    given = pyro.poutine.condition(pyro.poutine.reparam(model, {"z": TransformReparam()}), {"z_base": noise + 1.0})
    close(given(), flow.bijection(noise + 1.0), 1e-12)


def test_flow_in_a_plate():
    """A conditional flow under a plate: one log density a row."""
    flow = make_flow("realnvp", 2, context_dim=3)
    context = normal(5, 3, seed=1)

    def model():
        with pyro.plate("rows", 5):
            return pyro.sample("y", flow(context))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (5,)
    close(trace.nodes["y"]["log_prob"], flow.log_prob(trace.nodes["y"]["value"].detach(), context), 1e-10)
