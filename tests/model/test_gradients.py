"""Gradients and Hessians by autograd around ``vmap``, against those of ``torch.func``."""

import pytest
import torch
from torch import Tensor

from pyro_flows.model.batching import hessians, values_and_grads
from pyro_flows.model.graphs import record
from tests.invariants import close
from tests.registry import normal


def curved(point: Tensor) -> Tensor:
    written = torch.stack([point[0] * point[1], point.prod().exp(), point[2].sin()])
    return torch.distributions.MultivariateNormal(
        written, torch.eye(3, dtype=point.dtype), validate_args=False
    ).log_prob(point.tanh())


FUNCTIONS = {
    "curved": curved,
    "linear": lambda point: 2.0 * point.sum(),
    "one coordinate": lambda point: point[1] ** 3,
    "constant": lambda point: torch.ones((), dtype=point.dtype),
    "piecewise": lambda point: torch.where(point > 0.0, point.square(), point.exp()).sum(),
    "factorized": lambda point: torch.linalg.cholesky(
        torch.outer(point, point) + torch.eye(3, dtype=point.dtype)
    ).sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_torch_func(name):
    points, function = normal(5, 3, seed=0), FUNCTIONS[name]
    expected, value = torch.func.vmap(torch.func.grad_and_value(function))(points)
    for _ in range(2):
        got = values_and_grads(function, points)
        close(got[0], value, 1e-12)
        close(got[1], expected, 1e-12)
        assert not any(part.requires_grad for part in got)
    with torch.no_grad():
        close(values_and_grads(function, points)[1], expected, 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessians_are_those_of_torch_func(name):
    points, function = normal(5, 3, seed=1), FUNCTIONS[name]
    expected = torch.func.vmap(torch.func.jacrev(torch.func.grad(function)))(points)
    with torch.no_grad():
        close(hessians(function, points), expected, 1e-12)


def test_a_transform_around_them_does_not_lose_the_gradient():
    """As functionalization does, by which graphs without changes in place are recorded."""
    points = normal(4, 3, seed=2)
    whole = torch.func.functionalize(lambda z: values_and_grads(curved, z))
    close(whole(points)[1], values_and_grads(curved, points)[1], 1e-12)
    close(record(whole, points)(points)[1], values_and_grads(curved, points)[1], 1e-12)


def test_one_number_for_each_point():
    with pytest.raises(RuntimeError, match="one number for each point"):
        values_and_grads(lambda point: point, normal(4, 3, seed=3))
