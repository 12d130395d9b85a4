"""The score that comes along with a pass, and the path gradient that is made of it."""

import pytest
import torch

import pyro_flows as pf
from tests.invariants import check_path_gradient, check_score, close
from tests.registry import FLOWS, LARGE, SMALL, TYPICAL, each, make_flow, normal


@each(SMALL + LARGE)
def test_score(case):
    """Against autograd through the inverse, and against the Jacobian of the forward map."""
    check_score(case.make(), *case.inputs(4), case.tolerance)


@each(SMALL)
def test_score_pass_has_the_gradients_of_a_plain_pass(case):
    """Value and log-determinant carry the graph that they carry elsewhere, to parameters, input and context."""
    t = case.make()
    x, context = case.inputs(3)
    inputs = [x.requires_grad_()] + ([context.requires_grad_()] if case.context_dim else [])
    inputs += list(t.parameters())

    def gradients(y, ladj):
        return torch.autograd.grad(y.square().sum() + (2.0 * ladj).sin().sum(), inputs, materialize_grads=True)

    expected = gradients(*t.forward_and_ladj(x, context))
    got = gradients(*t.forward_and_score(x, torch.ones_like(x), context)[:2])
    for one, other in zip(got, expected, strict=True):
        close(one, other, 1e-10)


@each(TYPICAL)
def test_score_without_gradients(case):
    """Under no_grad, and with frozen parameters, the same numbers."""
    t = case.make()
    x, context = case.inputs(4)
    score = normal(*x.shape, seed=1)
    expected = [tensor.detach() for tensor in t.forward_and_score(x, score, context)]
    with torch.no_grad():
        plain = t.forward_and_score(x, score, context)
    frozen = t.requires_grad_(False).forward_and_score(x, score, context)
    for one, other, value in zip(plain, frozen, expected, strict=True):
        close(one, value, 1e-12)
        close(other, value, 1e-12)
        assert not one.requires_grad
    assert not frozen[2].requires_grad


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dim", [1, 2, 3, 7])
@pytest.mark.parametrize("base", ["normal", "student_t", "logistic"])
def test_path_gradient_vanishes_at_the_target(name, dim, base):
    check_path_gradient(make_flow(name, dim, base=base))


def test_path_gradient_vanishes_for_a_mixed_chain():
    case = next(case for case in SMALL if case.name == "Compose-3")
    check_path_gradient(pf.Flow(case.make(), base="student_t"))


def test_path_gradient_does_not_vanish_elsewhere():
    """With another target the very same check fails: it can tell."""
    flow, other = make_flow("realnvp", 2), make_flow("realnvp", 2, sd=0.16)
    flow.log_prob = other.log_prob
    with pytest.raises(AssertionError):
        check_path_gradient(flow)


@pytest.mark.parametrize("base", ["normal", "student_t", "logistic"])
def test_sample_with_score_is_the_density_of_the_flow(base):
    flow = make_flow("planar", 3, base=base)
    y, log_q, score = flow.sample_with_score((5, 2))
    assert (y.shape, log_q.shape, score.shape) == ((5, 2, 3), (5, 2), (5, 2, 3))
    leaf = y.detach().requires_grad_()
    log_p = flow.log_prob(leaf)
    close(log_q, log_p.detach(), 1e-9)
    close(score, torch.autograd.grad(log_p.sum(), leaf)[0], 1e-9)
    assert y.requires_grad
    assert not log_q.requires_grad
    assert not score.requires_grad


def test_the_uniform_base_has_no_path_gradient():
    """Its edges move with the parameters, which the score cannot see: refused rather than wrong."""
    with pytest.raises(ValueError, match="base"):
        make_flow("realnvp", 2, base="uniform").sample_with_score((3,))
