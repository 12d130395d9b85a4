"""Flows: densities of mass 1, the base at the start, draws and scores that agree, every coordinate moved."""

import inspect
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformedDistribution

import pyro_flows as pf
from pyro_flows.flows.recipe import BUILDERS, VECTOR_BUILDERS
from pyro_flows.flows.recipe_json import to_json
from tests.invariants import check_every_coordinate_moves, check_mass, close
from tests.registry import BASES, FLOWS, SMALL, make_flow, normal
from tests.slow import rest_slow

# Half width of the square, points an axis, tolerance. Smooth densities: 1e-5, the tails outside of the square and steps
# from 0.1 on. The uniform one jumps at its edge: half a step of 0.02 around an edge of length 8 at density 1/4.
GRIDS = {
    "normal": (25.0, 151, 1e-5),
    "student_t": (25.0, 151, 1e-5),
    "logistic": (40.0, 701, 1e-5),  # it goes farther out, where the kinks of a network are
    "uniform": (5.0, 351, 2e-2),
}


def with_a_base():
    """Each flow with each base; a spline's kinks on the wide grid of the logistic one take long, and are slow."""
    pairs = [(name, base) for name in FLOWS for base in BASES]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair == ("spline", "logistic") else ()) for pair in pairs]


@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize(("name", "base"), with_a_base())
def test_mass_is_one(name, context_dim, base):
    half_width, points, tolerance = GRIDS[base]
    if (
        name == "spline" and base != "uniform"
    ):  # its density has kinks at the knots, where the error falls only as the step's square
        points, tolerance = 2 * points - 1, max(tolerance, 5e-5)
    flow = make_flow(name, 2, context_dim=context_dim, base=base)
    context = normal(3, seed=1) if context_dim else None
    assert (flow.bijection.forward_and_ladj(normal(9, 2, seed=2), context)[0] - normal(9, 2, seed=2)).abs().max() > 0.1
    check_mass(flow, context, tolerance, half_width=half_width, points=points)


def test_mass_of_a_mixed_chain():
    case = next(case for case in SMALL if case.name == "Compose-2")
    check_mass(pf.Flow(case.make()), None, 1e-5, half_width=30.0, points=201)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_starts_as_its_base(name):
    """Up to the rounding of the planar layer's softplus."""
    for dim, context_dim, base in itertools.product((1, 2, 3, 7), (0, 3), BASES):
        flow = make_flow(name, dim, context_dim=context_dim, base=base, sd=0.0)
        y = 0.3 * normal(6, dim, seed=1)
        context = normal(6, 3, seed=2) if context_dim else None
        close(flow.log_prob(y, context), flow.base_distribution().log_prob(y), 1e-12, f"{dim}, {context_dim}, {base}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("name", FLOWS)
def test_draws_and_scores_agree(name, context_dim, base):
    """One pass, two passes and the distribution give one density, of the shape samples x batch."""
    flow = make_flow(name, 3, context_dim=context_dim, base=base)
    batch = (4,) if context_dim else ()
    context = normal(4, 3, seed=1) if context_dim else None
    distribution = flow(context)
    assert isinstance(distribution, TransformedDistribution)
    assert (distribution.batch_shape, distribution.event_shape) == (batch, (3,))
    y, log_q = flow.rsample_and_log_prob((5, 2), context)
    assert (y.shape, log_q.shape) == ((5, 2, *batch, 3), (5, 2, *batch))
    assert y.requires_grad
    close(log_q, flow.log_prob(y.detach(), context), 1e-8)
    close(log_q, distribution.log_prob(y.detach()), 1e-8)
    assert distribution.rsample((5, 2)).shape == y.shape
    assert not distribution.sample().requires_grad
    assert flow.context_dim == context_dim


@pytest.mark.parametrize("name", FLOWS)
def test_draws_follow_the_seed(name):
    flow = make_flow(name, 2)
    torch.manual_seed(1)
    first = flow().sample((3,))
    torch.manual_seed(1)
    close(flow().sample((3,)), first, 0.0)
    assert not torch.equal(flow().sample((3,)), first)


def test_outside_of_the_image_of_the_cube_the_density_is_zero():
    flow = make_flow("realnvp", 2, base="uniform")
    inside = flow.bijection(torch.tensor([[0.99, -0.99]], dtype=torch.float64))
    outside = flow.bijection(torch.tensor([[1.01, 0.0]], dtype=torch.float64))
    assert flow.log_prob(inside).isfinite().all()
    assert (flow.log_prob(outside) == -torch.inf).all()


@pytest.mark.parametrize("base", BASES)
def test_base_distribution(base):
    """Independent coordinates of the scale that the name promises, with the degrees of freedom that were asked for."""
    flow = pf.realnvp(2, base=base, df=4.0)
    x = torch.tensor([[0.3, -0.6], [0.0, 0.9]])
    zero, one = torch.zeros(2), torch.ones(2)
    expected = {
        "normal": dist.Normal(zero, one),
        "student_t": dist.StudentT(4.0 * one, zero, one),
        "logistic": dist.Logistic(zero, one),
        "uniform": dist.Uniform(-one, one),
    }[base]
    close(flow.base_distribution().log_prob(x), expected.log_prob(x).sum(-1), 1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dim", [3, (2, 3, 4)], ids=str)
def test_the_base_is_scored_as_its_distribution_says(dim, base):
    """By the flow itself as by Pyro's distribution, far out too."""
    kind = pf.transforms.LULinear if isinstance(dim, int) else pf.transforms.Conv1x1
    flow = pf.Flow(kind(dim).double(), base=base)
    x = torch.linspace(-80.0, 80.0, 5, dtype=torch.float64).reshape(5, *(1,) * len(flow.base_shape))
    x = x + normal(5, *flow.base_shape, seed=1)
    expected = flow.base_distribution().log_prob(x)
    close(flow.log_prob(x), expected, 1e-12)
    close(flow().log_prob(x), expected, 1e-12)


def test_values_outside_of_the_support_are_refused():
    """As Pyro's distributions do, and only while they do."""
    flow = pf.realnvp(2, layers=2)
    bad = torch.tensor([[0.0, float("nan")]])
    for score in (flow.log_prob, flow().log_prob):
        with pytest.raises(ValueError, match="support"):
            score(bad)
    with pyro.validation_enabled(False):
        assert flow.log_prob(bad).isnan().all()


@pytest.mark.parametrize("name", ["nice", "realnvp", "spline"])
@pytest.mark.parametrize("layers", [2, 4, 6, 8])
def test_couplings_move_every_coordinate(name, layers):
    """With the masks that the builders choose. NICE's scale moves all by itself, so it is left out here."""
    for dim in (1, 2, 3, 4, 5, 7, 10):
        flow = make_flow(name, dim, layers=layers)
        couplings = pf.transforms.Compose(
            [layer for layer in flow.bijection.layers if not isinstance(layer, pf.transforms.Rescale)]
        )
        assert len(couplings.layers) == layers
        check_every_coordinate_moves(couplings, dim)


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_is_used(name):
    """No parameter lies idle: each has a gradient somewhere."""
    for dim in (1, 2, 3, 7):
        flow = make_flow(name, dim)
        flow.log_prob(normal(50, dim, seed=1)).sum().backward()
        for key, parameter in flow.named_parameters():
            assert parameter.grad is not None, (dim, key)
            assert parameter.grad.abs().sum() > 0.0, (dim, key)


@pytest.mark.parametrize("name", VECTOR_BUILDERS)
def test_settings_rebuild_the_flow(name):
    """``settings`` name the builder and all that it was told; state_dict does the rest."""
    flow = make_flow(name, 3, context_dim=2, base="logistic", dtype=torch.float32)
    settings = to_json(flow)
    assert settings.keys() == inspect.signature(BUILDERS[name]).parameters.keys() | {"builder"}
    twin = BUILDERS[settings.pop("builder")](**settings)
    assert twin.recipe == flow.recipe
    twin.load_state_dict(flow.state_dict())
    y, context = normal(4, 3, seed=1, dtype=torch.float32), normal(4, 2, seed=2, dtype=torch.float32)
    close(twin.log_prob(y, context), flow.log_prob(y, context), 0.0)


@pytest.mark.parametrize("name", rest_slow(FLOWS, ("nice", "realnvp").__contains__))
def test_a_flow_learns(name):
    """Maximum likelihood of a shifted and scaled normal: the loss falls to within 0.05 of the entropy.

    The data's own entropy differs from the true one by 0.03 (one sd); a flow with hundreds of parameters and 2000
    points may go a little below. Fixed seeds: no failure by chance.
    """
    data = 0.5 * normal(2000, 2, seed=1, dtype=torch.float32) + torch.tensor([1.0, -2.0])
    flow = make_flow(name, 2, sd=0.0, dtype=torch.float32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.04)
    for _ in range(220):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    entropy = dist.Normal(data.mean(0), data.std(0)).entropy().sum()
    assert -0.1 < loss - entropy < 0.05


def test_dim_is_found_or_asked_for():
    class Plain(pf.transforms.Bijection):
        def forward_and_ladj(self, x, context=None):
            return 2.0 * x, x.new_full(x.shape[:-1], 2.0).log() * x.shape[-1]

    assert pf.Flow(pf.transforms.Inverse(pf.transforms.Compose([pf.transforms.Rescale(4)]))).dim == 4
    with pytest.raises(ValueError, match="dim"):
        pf.Flow(Plain())
    assert pf.Flow(Plain(), dim=3)().sample().shape == (3,)


def test_draws_of_the_logistic_base_are_finite():
    """The 1,280,000 uniform draws of this seed have a 0 among them, whose logit is minus infinity."""
    torch.manual_seed(12)
    assert bool((torch.empty(16000, 80).uniform_() == 0.0).any())
    torch.manual_seed(12)
    x = pf.nice(80, layers=2, base="logistic").base_distribution().sample((16000,))
    assert x.shape == (16000, 80)
    assert bool(torch.isfinite(x).all())
    assert float(x.std()) == pytest.approx(math.pi / math.sqrt(3.0), rel=0.01)


@pytest.mark.parametrize("name", ["realnvp", "nice", "spline"])
def test_values_of_another_dtype(name):
    """Those of less precision are taken; of more, the weights' products have no dtype."""
    flow = getattr(pf, name)(2)
    half = torch.full((3, 2), 0.5, dtype=torch.float16)
    close(flow().log_prob(half), flow().log_prob(half.float()), 1e-6)
    assert flow.double()().log_prob(half.float()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"weights have dtype torch.float32, and the values torch.float64"):
        flow.float()().log_prob(half.double())
