"""Gradients of parts of a tensor are put side by side: no sums of tensors of zeros, and the same results."""

from __future__ import annotations

import pytest
import torch

from pyro_flows.model.batching import values_and_grads
from pyro_flows.model.graphs.recording import record
from tests.invariants import close

ROUNDS = 60
aten = torch.ops.aten


def autoregression(x):
    """A loop of which only the state waits for the round before."""
    phi, sigma, h, heights = x[..., 0].tanh(), x[..., 1].exp(), x[..., 2], []
    for t in range(3, ROUNDS):
        h = phi * h + sigma * x[..., t]
        heights.append(h)
    return torch.stack(heights, -1).exp().sum(-1)


def scored(x):
    """Each round adds a log density, of data that are numbers of the model."""
    data, total = torch.linspace(-1.0, 1.0, ROUNDS, dtype=x.dtype), 0.0
    for t in range(1, ROUNDS):
        total = total - 0.5 * ((x[..., t] - x[..., 0] * x[..., t - 1] - data[t]) / 0.7) ** 2
    return total


def backwards(x):
    """Rows are read from the last one to the first, and each second one only."""
    return sum((x[..., t].sin() * x[..., 0] for t in range(ROUNDS - 1, 0, -2)), x[..., 1])


def rows_and_slices(x):
    """Two rows, one of them counted from the end, slices that overlap, and all of it."""
    return x[..., 3].exp() * x[..., -2] - (x[..., 1:] * x[..., :-1].sin()).sum(-1) + x.square().sum(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", [autoregression, scored, backwards, rows_and_slices], ids=lambda one: one.__name__)
def test_gradients_of_rows_are_joined(function, dtype):
    def points(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 0.5 * torch.randn(4, ROUNDS, generator=generator, dtype=torch.float64).to(dtype)

    def both(x):
        return values_and_grads(function, x)

    module = record(both, points(0))
    assert all(node.target is not aten.select_backward.default for node in module.graph.nodes)
    for seed in range(3):
        for got, expected in zip(module(points(seed)), both(points(seed)), strict=True):
            close(got, expected, 1e-10 if dtype == torch.float64 else 2e-4)


SPANS = {
    "in order": [(0, 1), (1, 2), (2, 70)],
    "in another order, with gaps": [(65, 69), (3, 60)],
    "twice": [(3, 60), (60, 70), (3, 60)],
    "from the end": [(0, -3), (-3, 70)],
    "that overlap": [(0, 40), (30, 70)],
}


@pytest.mark.parametrize("name", SPANS)
def test_gradients_of_slices_are_joined(name):
    def gradient(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            total = sum((leaf[:, begin:end].exp() * (begin + 1.0)).sum() for begin, end in SPANS[name])
            return (torch.autograd.grad(total, leaf)[0],)

    module = record(gradient, torch.zeros(4, 70, dtype=torch.float64))
    x = torch.rand(4, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), gradient(x))
    left = [node for node in module.graph.nodes if node.target is aten.slice_backward.default]
    assert bool(left) == (name == "that overlap")


def test_what_is_taken_away_is_joined_too():
    def gradient(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (first,) = torch.autograd.grad((leaf[1].exp() * leaf[2]).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad((leaf[0] * leaf[2].sin()).sum(), leaf)
            return x - first.detach() - second, -first.detach() - second

    module = record(gradient, torch.zeros(3, 2))
    x = torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), gradient(x))
    assert all(node.target is not aten.select_backward.default for node in module.graph.nodes)
