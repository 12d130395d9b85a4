"""Flows in lockstep are trained as each would be by itself."""

from __future__ import annotations

import copy

import pytest
import torch

from pyro_flows import LogDensity
from pyro_flows.flows.recipe import latent_recipe
from pyro_flows.inference.training.lockstep import Lockstep, train_together
from pyro_flows.inference.training.step_graph import Moments, Step
from pyro_flows.model.stack import NotStackable, Stack
from pyro_flows.support.process.seeding import seeded
from pyro_flows.transforms import Compose, DiagonalAffine, Permutation
from tests.calibration.models import data_sets, exact, regression

BATCH = 16


def flows_for(dim, count, builder="realnvp", **options):
    with seeded(3):
        recipe = latent_recipe(builder, {"layers": 2, **options}, affine="auto", base="student_t", df=15.0)
        return [recipe.build_for_latents(dim) for _ in range(count)]


def lockstep(count=3, builder="realnvp", *, data=None, rate=1e-2):
    data = data_sets(count) if data is None else data
    stack = Stack([LogDensity(regression, args) for args in data])
    return Lockstep(stack, flows_for(stack.dim, count, builder), learning_rate=rate, batch=BATCH)


@pytest.mark.parametrize("builder", ["realnvp", "nice", "planar", "spline"])
def test_a_step_is_that_of_each_flow_by_itself(builder):
    flows = lockstep(builder=builder)
    alone = [copy.deepcopy(flow) for flow in flows.flows]
    with seeded(0):
        flows._draw()
    x, thinning = flows._drawn[-1]
    flows.step()
    for number, flow in enumerate(alone):
        density = LogDensity(regression, data_sets(3)[number])
        trained = [part for part in flow.parameters() if part.requires_grad]
        weights = torch.cat([part.detach().reshape(-1) for part in trained])
        ends = weights.split([part.numel() for part in trained])
        views = [part.view(own.shape) for part, own in zip(ends, trained, strict=True)]
        step = Step(flow, density, weights.new_zeros(BATCH, flow.dim), weights, views)
        loss, _, after = step(weights, Moments.fresh(weights), x[number], thinning[number], 1e-2, 0.0)
        torch.testing.assert_close(flows.losses[0][number], loss, rtol=1e-4, atol=1e-4)
        size = after.mean.abs().max()
        torch.testing.assert_close(flows.moments.mean[number] / size, after.mean / size, rtol=0.0, atol=1e-5)


def test_no_data_set_sees_another_one():
    others = data_sets(3)
    others[1] = (others[1][0], others[1][1] + 5.0)
    found = []
    for data in (data_sets(3), others):
        flows = lockstep(data=data)
        with seeded(0):
            for _ in range(15):
                flows.step()
        found.append(flows.weights)
    one, other = found
    torch.testing.assert_close(one[[0, 2]], other[[0, 2]], rtol=0.0, atol=1e-6)
    assert not torch.allclose(one[1], other[1], atol=1e-2)


def test_each_flow_comes_to_its_own_posterior():
    flows = lockstep(4)
    with seeded(0):
        trainings = train_together(flows, report=lambda *_: None)
    for number, (flow, training) in enumerate(zip(flows.flows, trainings, strict=True)):
        mean, covariance = exact(*data_sets(4)[number])
        with seeded(1):
            draws = flow().sample((20_000,))
        sds = covariance.diagonal().sqrt()
        assert ((draws.mean(0) - mean).abs() / sds).max() < 0.06
        torch.testing.assert_close(torch.cov(draws.T), covariance, rtol=0.1, atol=0.01)
        assert training.converged or not training.moving
        assert len(training.losses) == len(flows.losses)
        assert training.skipped == training.falls == 0


def test_looks_are_at_the_present_weights():
    flows = lockstep()
    with seeded(0):
        for _ in range(12):
            flows.step()
    flows.write()
    z, log_weights = flows.look()
    for number, flow in enumerate(flows.flows):
        expected = flow.bijection.forward_and_ladj(flows._noise)[0]
        torch.testing.assert_close(z[number], expected, rtol=1e-3, atol=1e-3)
        density = LogDensity(regression, data_sets(3)[number])
        torch.testing.assert_close(
            log_weights[number], density(expected) - flow.log_prob(expected), rtol=1e-3, atol=1e-2
        )


def test_a_flow_that_falls_goes_back_and_the_others_go_on():
    flows = lockstep()
    with seeded(0):
        trainings = train_together(_Thrown(flows, number=1, at=60), report=lambda *_: None)
    assert [training.falls for training in trainings] == [0, 1, 0]
    assert flows.rates.tolist() == pytest.approx([1e-2, 5e-3, 1e-2])
    assert all(abs(training.elbo - other.elbo) < 30.0 for training in trainings for other in trainings)


class _Thrown:
    """A lockstep in which one flow is thrown off at one step."""

    def __init__(self, flows, *, number, at):
        self.__dict__.update(flows=flows, number=number, at=at)

    def __getattr__(self, name):
        return getattr(self.flows, name)

    def __setattr__(self, name, value):
        setattr(self.flows, name, value)

    def __len__(self):
        return len(self.flows)

    def step(self, share=1.0):
        self.flows.step(share)
        if len(self.flows.losses) == self.at:
            self.flows.weights[self.number] += 3.0


def test_flows_that_arrange_coordinates_differently_are_refused():
    stack = Stack([LogDensity(regression, args) for args in data_sets(2)])
    built = []
    for order in ([1, 0], [0, 1]):
        made = Compose([Permutation(order), DiagonalAffine(2)])
        built.append(latent_recipe(made, {}, affine="auto", base="student_t", df=15.0).build_for_latents(2))
    with pytest.raises(NotStackable, match="differently"):
        Lockstep(stack, built, learning_rate=1e-2, batch=BATCH)
