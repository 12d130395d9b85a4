"""Flows of guides in steps of SVI by graphs: the numbers of the layers, whatever the loss, and the layers elsewhere."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_flows as pf
from pyro_flows.guides import recorded
from tests.invariants import close
from tests.registry import randomize

LOSSES = {
    "vectorized": lambda: Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "one by one": lambda: Trace_ELBO(num_particles=3),
    "mean field": lambda: TraceMeanField_ELBO(num_particles=3),
    "graph": lambda: TraceGraph_ELBO(num_particles=2),
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
}
OPTIONS = {"realnvp": {"hidden": (8,)}, "nice": {"hidden": (8,)}, "spline": {"hidden": (8,)}, "planar": {}}


def model():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Gamma(torch.exp(mu), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3).double())


def guide_of(flow="realnvp", **options):
    pyro.set_rng_seed(0)
    guide = pf.AutoFlow(model, flow, layers=2, init="prior", **{**OPTIONS[flow], **options}).initialize()
    randomize(guide.flow, sd=0.1, seed=1)
    return guide


def trained(guide, loss, steps=3):
    """Return losses, and the guide's parameters after some steps."""
    pyro.set_rng_seed(2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=LOSSES[loss]())
    losses = [svi.step() for _ in range(steps)]
    return torch.tensor(losses), torch.cat([part.detach().reshape(-1) for part in guide.flow.parameters()])


def by_layers(monkeypatch):
    monkeypatch.setattr(recorded, "_recorded", lambda *_: None)


@pytest.mark.parametrize(
    ("flow", "loss"), [*((flow, "vectorized") for flow in OPTIONS), *(("realnvp", loss) for loss in LOSSES)][1:]
)
def test_steps_are_those_of_the_layers(monkeypatch, flow, loss):
    guide = guide_of(flow)
    found = trained(guide, loss)
    assert [type(kept) for kept in guide._maps.values()] == [recorded.RecordedMap]
    by_layers(monkeypatch)
    for one, other in zip(found, trained(guide_of(flow), loss), strict=True):
        close(one, other, 1e-9)


def test_what_is_no_parameter_may_change(monkeypatch):
    """A new start, small steps, and parameters that are no more trained: graphs have such tensors as constants."""

    def run():
        guide = guide_of(cautious=False)
        found = [*trained(guide, "vectorized")]
        guide.start_at(torch.ones(4).double(), 0.5 * torch.ones(4).double())
        found += trained(guide, "vectorized")
        guide.flow.slow()
        found += trained(guide, "vectorized")
        next(guide.flow.parameters()).requires_grad_(False)
        return [*found, *trained(guide, "vectorized")], len(guide._maps)

    found, maps = run()
    assert maps == 4
    by_layers(monkeypatch)
    for one, other in zip(found, run()[0], strict=True):
        close(one, other, 1e-9)


class Shift(pf.transforms.Bijection):
    """A user's own bijection, whose attribute changes from step to step."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(4).double())
        self.calls = 0

    def forward_and_ladj(self, x, context=None):
        self.calls += 1
        return x + self.calls * self.loc, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        return y - self.calls * self.loc, y.new_zeros(y.shape[:-1])


class Counted(pf.Flow):
    """A user's own flow."""

    calls = 0

    def forward(self, context=None):
        self.calls += 1
        return super().forward(context)


def test_flows_of_others_are_called_at_each_step():
    flow = Counted(pf.transforms.AffineCoupling(4).double(), dim=4)
    trained(pf.AutoFlow(model, flow, affine="none").initialize(), "vectorized")
    assert flow.calls >= 3


def test_layers_of_others_and_hooks_are_called_at_each_step():
    own = Shift()
    trained(pf.AutoFlow(model, pf.Flow(own), affine="none").initialize(), "one by one")
    assert own.calls >= 9
    guide, seen = guide_of(), []
    layer = next(part for part in guide.flow.modules() if isinstance(part, torch.nn.Linear))
    layer.register_forward_hook(lambda *_: seen.append(1))
    trained(guide, "vectorized")
    assert len(seen) == 3
    guide, seen = guide_of(), []
    guide.flow.register_forward_hook(lambda *_: seen.append(1))
    trained(guide, "vectorized")
    assert len(seen) == 3


def test_layers_that_cannot_be_recorded_are_called(monkeypatch):
    def refused(*_):
        raise RuntimeError("no graph")

    monkeypatch.setattr(recorded, "record", refused)
    guide = guide_of()
    assert trained(guide, "vectorized")[0].isfinite().all()
    assert [*guide._maps.values()] == [None]


def test_layers_of_large_flows_are_called(monkeypatch):
    guide = guide_of()
    monkeypatch.setattr(recorded, "MOST_PRODUCTS", 4 * sum(part.numel() for part in guide.flow.parameters()) - 1)
    trained(guide, "vectorized")
    assert [*guide._maps.values()] == [None]
    trained(guide, "one by one")
    assert [type(kept) for kept in guide._maps.values()][1:] == [recorded.RecordedMap]


def test_numbers_of_points_that_change_often_are_not_recorded(monkeypatch):
    made = []
    real = recorded._recorded
    monkeypatch.setattr(recorded, "_recorded", lambda *parts: made.append(1) or real(*parts))
    guide = guide_of()
    for count in range(2, 9):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(count, vectorize_particles=True)).step()
    assert len(made) == recorded.MOST_RECORDED


def test_outside_of_steps_gradients_are_those_of_each_parameter():
    """There, a loop may take them by parameter, and twice."""
    guide = guide_of()
    trained(guide, "vectorized")
    loss = Trace_ELBO().differentiable_loss(model, guide)
    (slope,) = torch.autograd.grad(loss, next(guide.flow.parameters()), create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), next(guide.flow.parameters()))[0].isfinite().all()


def test_a_parameter_that_is_frozen_in_training_leaves_no_gradient_behind():
    """The others had the gradient of the step before added to theirs."""
    guide, other = guide_of(), guide_of()
    trained(guide, "vectorized")
    other.load_state_dict(copy.deepcopy(guide.state_dict()))
    next(guide.flow.parameters()).requires_grad_(False)
    next(other.flow.parameters()).requires_grad_(False)
    for one, own in zip(trained(guide, "vectorized"), trained(other, "vectorized"), strict=True):
        close(one, own, 1e-9)


def test_copies_and_pickles_in_training_go_on_alike():
    guide = guide_of()
    trained(guide, "vectorized")
    others = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)).attach(model)
    expected = trained(guide, "vectorized")
    for other in others:
        for one, own in zip(expected, trained(other, "vectorized"), strict=True):
            close(one, own, 1e-9)
