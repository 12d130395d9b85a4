"""Whether results are equal but for rounding: numbers, masks and counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_flows.model.graphs.recording import record
from pyro_flows.model.graphs.rounding import agree, rounds_alike, tame, within_rounding
from pyro_flows.model.graphs.runner import Runner
from tests.registry import needs_interpreter, normal


def masked(x: Tensor) -> tuple[Tensor, ...]:
    """Numbers, which of them are positive, and how many there are."""
    return x.exp().sin(), x.cos() > 0.0, (x > 0.0).sum(1)


@needs_interpreter
def test_graphs_with_masks_and_counts_among_their_results_run_in_blocks():
    """Those of splines have: which interval a number lies in is kept for the gradient."""
    x = normal(20, 3, seed=0)
    runner = Runner(record(masked, x))
    for seed in range(3):
        x = normal(20, 3, seed=seed)
        found, expected = runner(x), masked(x)
        assert [part.dtype for part in found] == [part.dtype for part in expected]
        assert agree(found, expected)
    assert runner.in_blocks


@pytest.mark.parametrize("place", range(3))
def test_other_results_do_not_agree(place):
    expected = masked(normal(20, 3, seed=0))
    found = [part.clone() for part in expected]
    assert agree(found, expected)
    flat = found[place].view(-1)
    flat[4] = ~flat[4] if flat.dtype == torch.bool else flat[4] + 1
    assert not agree(found, expected)


def test_a_mask_may_hang_on_the_last_digit():
    x = normal(5, 3, seed=0)
    module = record(lambda x: (x >= x.clone(), x > 0.0), x)
    there = torch.where(torch.arange(15).reshape(5, 3) == 4, 0.0, x)
    expected = module(there)
    on_an_edge = (expected[0], expected[1] ^ (there == 0.0))
    assert within_rounding(module, (there,), on_an_edge, expected)
    away_from_it = (expected[0], expected[1] ^ (there == there.max()))
    assert not within_rounding(module, (there,), away_from_it, expected)


@pytest.mark.parametrize("far", [0.0, 1e8])
def test_single_precision_may_lose_all_digits_of_a_sum(far):
    """Small numbers of a result have the errors of its large ones then, and only then."""
    x = torch.cat([normal(20, 1, seed=0).float() + far, normal(20, 1, seed=1).float() - far], 1)
    module = record(lambda x: (x.sum(1, keepdim=True) * torch.tensor([1.0, 1e-6]),), x)
    (expected,) = module(x)
    found = expected + torch.tensor([0.0, 1.0])
    assert within_rounding(module, (x,), (expected,), (expected,))
    assert within_rounding(module, (x,), (found,), (expected,)) is (far > 0.0)
    assert not within_rounding(module, (x,), (expected + torch.tensor([0.0, 1e12]),), (expected,))


def test_a_point_without_digits_excuses_no_other_point():
    x = torch.tensor([[1e8, -1e8]] + 19 * [[0.3, 0.4]])
    module = record(lambda x: (x.sum(1),), x)
    (expected,) = module(x)
    lost, other = torch.zeros(20), torch.zeros(20)
    lost[0], other[3] = 20.0, 1.0
    assert within_rounding(module, (x,), (expected + lost,), (expected,))
    assert not within_rounding(module, (x,), (expected + lost + other,), (expected,))


def test_points_where_single_precision_fails_do_not_tell():
    """A number is lost beside one that is 10^8 times as large: whoever never adds them up has it."""
    x = torch.cat([torch.tensor([[1e8], [-1e8], [1e8]]), normal(3, 1, seed=0).float()], 1)
    module = record(lambda x: (x.sum(1) - x[:, 0],), x)
    assert not rounds_alike(module, (x,), (x[:, 1],), module(x))
    (there,) = tame((x,))
    assert rounds_alike(module, (there,), (there[:, 1],), module(there))
    assert not rounds_alike(module, (there,), (there[:, 1] + 1.0,), module(there))
    assert tame((x.double(),)) is None


@needs_interpreter
def test_a_graph_runs_in_blocks_though_single_precision_fails_at_points():
    """In the neck of a funnel, a sum forgets its smaller term, in one way to run it and not in the other."""
    x = torch.cat([torch.tensor([[5.0, -19.7]] * 14), normal(14, 30, seed=0).float()], 1)

    def density(x):
        scale = x[:, 1:2].exp()
        effects = x[:, :1] + scale * x[:, 2:]
        return (-0.5 * ((effects - x[:, :1]) / scale).square().sum(1),)

    runner = Runner(record(density, x))
    for _ in range(3):
        runner(x)
    assert runner.in_blocks


def test_a_number_that_may_be_none_excuses_no_other_one():
    x = torch.tensor([1.0, 0.3, 0.4, 0.5])
    module = record(lambda x: ((1.0 - x.square()).sqrt(),), x)
    (expected,) = module(x)
    assert not within_rounding(module, (x,), (expected + torch.tensor([0.0, 5.0, 5.0, 5.0]),), (expected,))


def test_a_number_that_is_added_to_a_large_one_loses_its_last_digits():
    """Squares of 5e4 that cancel: any order of them has other last digits; steps of those of x show none of that."""
    x, far = normal(200, 5, seed=0).double(), 51234.5

    def cancelling(x: Tensor) -> tuple[Tensor, ...]:
        return (((x + far) ** 2).sum(1) - (x**2 + 2.0 * far * x + far**2).sum(1) - x.square().sum(1),)

    module = record(cancelling, x)
    expected = module(x)
    found = (((x + far) ** 2 - (x**2 + 2.0 * far * x + far**2)).sum(1) - x.square().sum(1),)
    assert float((found[0] - expected[0]).abs().max()) > 1e-7
    assert rounds_alike(module, (x,), found, expected)
    assert not rounds_alike(module, (x,), (found[0] + 1e-3,), expected)


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
