"""Triangular maps that are trained no more: the same maps, by one matrix product."""

import copy

import pytest
import torch

import pyro_flows as pf
from tests.registry import normal


def moved(dim, **options):
    """A map that is not where it starts."""
    scale = torch.eye(dim).double() + 0.3 * normal(dim, dim, seed=0).tril(-1)
    layer = pf.transforms.LowerTriangularAffine(dim, loc=normal(dim, seed=1), scale_tril=scale, **options)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.add_(0.2 * normal(*parameter.shape, seed=2 + number))
    return layer


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("units", ["of the start", "of the row"])
@pytest.mark.parametrize("dim", [1, 5])
def test_the_same_map(dim, units, rows):
    layer = moved(dim)
    if units == "of the row":
        layer.slow(1.0)
    settled = copy.deepcopy(layer)
    settled.settle()
    settled.settle()
    assert len(settled._maps(normal(rows, dim, seed=9), None)[1]) == 1
    x, score = normal(rows, dim, seed=9), normal(rows, dim, seed=10)
    for found, expected in (
        (settled.forward_and_ladj(x), layer.forward_and_ladj(x)),
        (settled.inverse_and_ladj(x), layer.inverse_and_ladj(x)),
        (settled.forward_and_score(x, score), layer.forward_and_score(x, score)),
    ):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    loc, matrix, ladj = settled._affine(x, None)
    torch.testing.assert_close(loc + x @ matrix.mT, layer.forward_and_ladj(x)[0])
    torch.testing.assert_close(ladj, layer._affine(x, None)[2])


def test_parameters_that_are_loaded_count_again():
    layer = moved(3)
    settled = copy.deepcopy(layer)
    settled.settle()
    settled.load_state_dict(layer.state_dict())
    x = normal(2, 3, seed=9)
    torch.testing.assert_close(settled.forward_and_ladj(x), layer.forward_and_ladj(x))


def test_a_map_with_a_context_stays_as_it_is():
    layer = moved(3, context_dim=2)
    x, context = normal(4, 3, seed=9), normal(4, 2, seed=10)
    expected = layer.forward_and_ladj(x, context)
    layer.settle()
    assert not layer.settled
    torch.testing.assert_close(layer.forward_and_ladj(x, context), expected)
