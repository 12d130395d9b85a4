"""Special functions of a loop are called once, with the same results, and in an order that serves all."""

from __future__ import annotations

import torch

from pyro_flows.model.batching import values_and_grads
from pyro_flows.model.graphs.recording import record
from pyro_flows.model.graphs.sums import FEWEST
from tests.invariants import close

aten = torch.ops.aten


def points(*shape: int) -> torch.Tensor:
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def called(module, name):
    return sum(name in str(node.target) for node in module.graph.nodes)


def checked(function, x):
    module = record(lambda x: values_and_grads(function, x), x)
    for scale in (1.0, 1.5):
        for got, expected in zip(module(scale * x), values_and_grads(function, scale * x), strict=True):
            close(got, expected, 1e-12)
    return module


def test_functions_of_a_loop_are_called_once_whatever_their_shapes():
    """Numbers and rows, of one function and of its derivative, each with terms around it."""

    def function(x):
        alone = [(x[..., t] * x[..., 0]).lgamma().cos() for t in range(20)]
        rows = [(x[..., t : t + 3] + x[..., :1] * x[..., 1:2]).lgamma().sum(-1) for t in range(12)]
        return sum(alone) + sum(rows)

    module = checked(function, points(4, 20))
    assert called(module, "lgamma") <= 2
    assert called(module, "digamma") <= 4


def test_options_tell_functions_apart():
    """Each second one is a second derivative."""

    def function(x):
        return sum(torch.polygamma(t % 2 + 1, x[..., t]) for t in range(2 * FEWEST))

    module = record(lambda x: (function(x),), points(3, 2 * FEWEST))
    assert called(module, "polygamma") == 2
    close(module(points(3, 2 * FEWEST))[0], function(points(3, 2 * FEWEST)), 1e-12)
