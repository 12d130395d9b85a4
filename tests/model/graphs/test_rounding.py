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
