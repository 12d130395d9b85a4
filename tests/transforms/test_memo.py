"""The one-shot memo of ``Bound``: one pass where one is enough, never an answer for something else."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from tests.invariants import close
from tests.registry import BARE, FLOWS, SMALL, TYPICAL, each, make_flow, normal
from tests.state_invariants import (
    EDITS,
    check_evaluations,
    check_memo_has_gradients,
    check_memo_is_fresh,
    check_memo_is_spent,
    check_memo_saves_a_pass,
)

NAMES = list(FLOWS)
MIXED = next(case for case in SMALL if case.name == "Compose-3-context")


def mixed_bound():
    x, context = MIXED.inputs(4)
    return MIXED.make().condition(context), x


@each(case for case in TYPICAL if not case.name.startswith(BARE))
def test_memo_saves_a_pass_and_is_spent(case):
    x, context = case.inputs(4)
    bound = case.make().condition(context)
    check_memo_saves_a_pass(bound, x)
    check_memo_is_spent(bound, x)


@each(case for case in TYPICAL if not case.name.startswith(("AdditiveCoupling", *BARE)))
def test_memo_has_gradients(case):
    """Of every map whose log-determinant has a gradient."""
    x, context = case.inputs(4)
    check_memo_has_gradients(case.make().condition(context), x)


@pytest.mark.parametrize("edit", EDITS)
def test_memo_is_not_used_after_an_edit(edit):
    check_memo_is_fresh(*mixed_bound(), edit)


def test_memo_serves_the_same_objects_only():
    """An equal copy is another tensor: it may need another gradient."""
    bound, x = mixed_bound()
    y = bound(x)
    check_evaluations(bound.bijection, lambda: bound.inv(y.clone()))
    y = bound(x)
    check_evaluations(bound.bijection, lambda: bound.log_abs_det_jacobian(x.clone(), y))
    y = bound(x)
    other = bound(x + 1.0)
    ladj = bound.log_abs_det_jacobian(x, y)
    close(ladj, bound.bijection.forward_and_ladj(x, bound.context)[1], 0.0)
    close(bound.log_abs_det_jacobian(x + 1.0, other), bound.bijection.forward_and_ladj(x + 1.0, bound.context)[1], 0.0)


def test_memo_is_left_out_in_inference_mode():
    """Tensors of inference mode have no version to compare, inside of it or later."""
    bound, x = mixed_bound()
    with torch.inference_mode():
        y = bound(x)
        assert bound._memo is None
        close(bound.inv(y), x, 1e-7)
    point = y.clone()
    expected = bound.bijection.forward_and_ladj(x, bound.context)[1]
    close(bound.log_abs_det_jacobian(bound.inv(point), point), expected, 1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_one_evaluation_of_each_layer(name, context_dim):
    """Sampling and scoring a flow costs one evaluation a layer; so does each of the two alone."""
    flow = make_flow(name, 3, context_dim=context_dim)
    context = (normal(4, 3, seed=1),) if context_dim else ()
    data = normal(5, *(4,) * bool(context_dim), 3, seed=2)

    def sample_and_score():
        distribution = flow(*context)
        return distribution.log_prob(distribution.rsample((5,)))

    check_evaluations(flow, sample_and_score)
    check_evaluations(flow, lambda: flow(*context).log_prob(data))
    check_evaluations(flow, lambda: flow.log_prob(data, *context))
    check_evaluations(flow, lambda: flow(*context).sample((5,)))
    check_evaluations(flow, lambda: flow.rsample_and_log_prob((5,), *context))
    if not context:
        check_evaluations(flow, lambda: flow.sample_with_score((5,)))


@pytest.mark.parametrize("name", NAMES)
def test_one_evaluation_in_a_step_of_svi(name):
    """A flow as the guide, and one as the likelihood: one evaluation a layer and step."""
    guide_flow, data_flow = make_flow(name, 2), make_flow(name, 2)
    data = normal(6, 2, seed=1)

    def model():
        pyro.module("data_flow", data_flow)
        z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            pyro.sample("y", data_flow(), obs=data - z)

    def guide():
        pyro.module("guide_flow", guide_flow)
        pyro.sample("z", guide_flow())

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    both = torch.nn.ModuleList([guide_flow, data_flow])
    before = [parameter.clone() for parameter in both.parameters()]
    check_evaluations(both, svi.step)
    assert all(not torch.equal(old, new) for old, new in zip(before, both.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("move", [True, False], ids=["stepping", "accumulating"])
def test_one_distribution_kept_over_steps(name, context_dim, move):
    """A distribution that is made once and scores one data tensor twice: right values, right gradients, no crash."""
    flow = make_flow(name, 2, context_dim=context_dim)
    context = normal(20, 3, seed=2) if context_dim else None
    data = normal(20, 2, seed=1)
    distribution = flow(context)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = -distribution.log_prob(data).sum()
        loss.backward()
        got = [parameter.grad.clone() for parameter in flow.parameters()]
        x, ladj = flow.bijection.inverse_and_ladj(data, context)
        expected = -(flow.base_distribution().log_prob(x) + ladj).sum()
        close(loss, expected, 1e-12)
        for gradient, other in zip(got, torch.autograd.grad(expected, list(flow.parameters())), strict=True):
            close(gradient, other, 1e-10)
        if move:
            optimizer.step()
