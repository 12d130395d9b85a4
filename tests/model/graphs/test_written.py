"""Tensors that are written entry by entry: recorded, they have the same values, and no step copies the whole."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import LogDensity
from pyro_flows.model.graphs.graph import is_pure
from tests.models import real
from tests.registry import normal

STEPS = 12


def steps(x: Tensor) -> Tensor:
    held = torch.zeros(STEPS, dtype=x.dtype)
    held[0] = x[0]
    for t in range(1, STEPS):
        held[t] = torch.sin(held[t - 1]) + x[t % len(x)]
    return held


def two_axes(x: Tensor) -> Tensor:
    held = torch.ones(STEPS, 2, dtype=x.dtype)
    for t in range(1, STEPS):
        held[t, 0] = held[t - 1, 1] * x[0]
        held[t, 1] = held[t - 1, 0] + x[1]
    return held.reshape(-1)


def rows(x: Tensor) -> Tensor:
    held = torch.zeros(3, STEPS, dtype=x.dtype)
    for t in range(1, STEPS):
        held[:, t] = 0.5 * held[:, t - 1].roll(1) + x[:3]
    return held.view(-1)


def from_the_end(x: Tensor) -> Tensor:
    held = torch.zeros(STEPS, dtype=x.dtype)
    held[-1] = x[0]
    for t in range(STEPS - 2, -1, -1):
        held[t] = held[t + 1] * x[1] + held[t]
    return held[2:]


def written_twice(x: Tensor) -> Tensor:
    held = torch.zeros(4, dtype=x.dtype)
    held[1] = x[0]
    before = held * 1.0
    held[1] = x[1] * held[1]
    held[2:] = held[:2]
    return torch.cat([before, held])


def added_to(x: Tensor) -> Tensor:
    held = x[:4] * 2.0
    held[1] += x[0]
    held[1:3] *= x[1]
    held[2] -= held[1].exp()
    return held


def one_number_in_many_places(x: Tensor) -> Tensor:
    held = torch.zeros(6, dtype=x.dtype)
    held[2:5] = x[0]
    held[3] = 7.0
    held[::2] = held[1::2] + 1.0
    return held


def of_another_dtype(x: Tensor) -> Tensor:
    held = torch.zeros(4, dtype=torch.float32)
    for t in range(1, 4):
        held[t] = held[t - 1] + x[t]
    return held.to(x.dtype)


def whole_at_each_step(x: Tensor) -> Tensor:
    held = torch.zeros(STEPS, dtype=x.dtype)
    for t in range(1, STEPS):
        held[t] = x[0] + held.tanh().sum()
    return held


def so_far(x: Tensor) -> Tensor:
    held = torch.zeros(STEPS, dtype=x.dtype)
    held[0] = x[0]
    for t in range(1, STEPS):
        held[t] = held[:t].sum() * x[1]
    return held


def by_two_names(x: Tensor) -> Tensor:
    held = torch.zeros(5, dtype=x.dtype)
    part = held[1:]
    held[2] = x[0]
    part[2] = part[1] * x[1]
    return held + part.sum()


def reshaped(x: Tensor) -> Tensor:
    held = torch.zeros(2, 3, dtype=x.dtype)
    held[0] = x[:3]
    held[1] = x[3].expand(3)
    return torch.cat([held[1].view(3), held[0].view(3), held.mT.reshape(-1)])


CASES = [
    steps, two_axes, rows, from_the_end, written_twice, added_to, one_number_in_many_places, of_another_dtype,
    whole_at_each_step, so_far, by_two_names, reshaped,
]  # fmt: skip


def density_of(function) -> LogDensity:
    def model():
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0).expand([4]).to_event(1))
        values = function(x)
        pyro.factor("written", (values * torch.arange(1.0, len(values) + 1.0).to(x)).sin().sum())

    return LogDensity(model)


@pytest.mark.parametrize("function", CASES, ids=lambda case: case.__name__)
def test_values_and_gradients_are_those_of_the_model_itself(function):
    density = density_of(function)
    density.value_and_grad(normal(6, 4, seed=1))
    z = normal(6, 4, seed=2)
    tolerance = 1e-5 if function is of_another_dtype else 1e-10
    for found, expected in zip(density.value_and_grad(z), density.unrecorded(z), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert density.batched
    assert density.reason is None
    leaf = z[0].clone().requires_grad_()
    single = density.single(leaf)
    torch.testing.assert_close(single.detach(), density(z[:1])[0], rtol=1e-6, atol=1e-6)
    assert all(is_pure(runner.module) for runner in density._with_gradients.runners.values())


@pytest.mark.parametrize("function", [steps, two_axes, rows, from_the_end], ids=lambda case: case.__name__)
def test_no_step_copies_the_whole(function):
    density = density_of(function)
    for seed in (1, 2):
        density.value_and_grad(normal(6, 4, seed=seed))
    (runner,) = density._with_gradients.runners.values()
    names = [str(node.target) for node in runner.module.graph.nodes]
    assert not [name for name in names if "scatter" in name or "select_backward" in name]
