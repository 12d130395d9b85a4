"""Operations that are alike are done at once: fewer of them, and the same results."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from torch import fx

from pyro_flows.graphs.partitioning import partition
from pyro_flows.graphs.recording import record
from pyro_flows.graphs.rounding import agree
from pyro_flows.graphs.sums import FEWEST
from pyro_flows.model.batching import values_and_grads
from tests.invariants import close

ROUNDS = 60


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


def apart(x):
    """Two rows of each of many tensors, put together again."""
    state = x[..., :2]
    for _ in range(20):
        state = state + 0.1 * torch.stack([state[..., 1] * x[..., 3], -state[..., 0]], -1)
    return state.square().sum(-1)


def with_whole_numbers(x):
    """Comparisons and whole numbers among the operations."""
    parts = [torch.where(part > 0.2 * t, part, part * t) for t, part in enumerate(x.unbind(-1))]
    return sum(parts)


FUNCTIONS = (autoregression, scored, backwards, apart, with_whole_numbers)


def points(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(rows, ROUNDS, generator=generator, dtype=torch.float64).to(dtype)


def counts(module: fx.GraphModule) -> Counter:
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_values_and_gradients_are_the_same(function, dtype):
    def both(x):
        return values_and_grads(function, x)

    module = record(both, points(4, dtype))
    for seed in range(3):
        x = points(4, dtype, seed)
        for got, expected in zip(module(x), both(x), strict=True):
            close(got, expected, 1e-10 if dtype == torch.float64 else 2e-4)


def test_what_does_not_wait_is_done_at_once_and_the_state_stays_a_loop():
    found = counts(record(lambda x: values_and_grads(autoregression, x), points(4, torch.float64)))
    aten = torch.ops.aten
    assert found[aten.exp.default] <= 2
    assert found[aten.select.int] <= 3  # of phi, sigma and the first state
    assert found[aten.select_backward.default] <= 3
    assert found[aten.mul.Tensor] < 2.5 * ROUNDS  # there and back, and once for all sums over rounds
    assert found[aten.add.Tensor] < 2.5 * ROUNDS


def test_the_terms_of_a_sum_are_done_at_once():
    module = record(lambda x: values_and_grads(scored, x), points(4, torch.float64))
    assert sum(number for target, number in counts(module).items() if target is not operator.getitem) < 60


def test_large_results_are_left_alone():
    def large(x):
        return (sum(part.exp() for part in x.unbind()),)

    module = record(large, torch.ones(20, 5000, dtype=torch.float64))
    assert counts(module)[torch.ops.aten.exp.default] == 20


def test_random_numbers_keep_their_order():
    def noisy(x):
        return (torch.stack([part + torch.randn_like(part) for part in x.unbind()]),)

    x = torch.zeros(20, 3, dtype=torch.float64)
    module = record(noisy, x)
    torch.manual_seed(1)
    expected = noisy(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], expected)


def test_rounding_of_huge_results_is_no_other_value():
    """Seen at a scale of 1e-8: gradients of 1.2e8 that differed in the eighth digit were taken for a wrong graph."""
    some = torch.tensor([1.0, 1.24e8], dtype=torch.float64)
    assert agree([some], [some * torch.tensor([1.0, 1.0 + 1e-7], dtype=torch.float64)])
    assert not agree([some], [some * torch.tensor([1.0, 1.0 + 1e-4], dtype=torch.float64)])
    assert not agree([some], [some * torch.tensor([1.0 + 1e-7, 1.0], dtype=torch.float64)])


def test_rounding_of_small_numbers_beside_huge_ones_is_no_other_value():
    """Seen on a climb that leapt to scales of e^24000: 1408.20995 beside 3.4e7 in one gradient, and 1408.20978."""
    rows = torch.tensor([[1408.2, 3.4e7], [1408.2, 1.0]], dtype=torch.float64)
    rounding = torch.tensor([[1.2e-7, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert agree([rows], [rows * (1.0 + rounding)])
    assert not agree([rows], [rows * (1.0 + 1e4 * rounding)])
    assert not agree([rows], [rows * (1.0 + rounding.flip(0))])  # the other row has no huge number
    assert not agree([rows[:, 0]], [(rows * (1.0 + rounding))[:, 0]])  # numbers of points are no rows


def test_operations_of_two_passes_are_not_done_at_once():
    """A layer with operations alike in both passes could not be partitioned, and was trained by autograd."""
    rows = FEWEST

    def passes(x, pull):
        value, slope = ([row.exp().sin() for row in part.unbind()] for part in (x, pull))
        return torch.stack(value), torch.stack(slope)

    x, pull = torch.randn(rows, 3), torch.randn(rows, 3)
    forward, backward = partition(record(passes, x, pull, joint=True), 1)
    for part in (forward, backward):
        assert sum(node.target is torch.ops.aten.exp.default for node in part.graph.nodes) == 1
    torch.testing.assert_close(forward(x)[0], x.exp().sin())
    torch.testing.assert_close(backward(x, pull)[0], pull.exp().sin())
