"""Flows that can only shift and scale a coordinate say so."""

import warnings

import pytest
import torch

import pyro_flows as pf
from pyro_flows.amortization.networks import BASE, FLOW, WIDTH, Conditional, perceptron
from pyro_flows.flows.recipe import BUILDERS, VECTOR_BUILDERS, Recipe
from pyro_flows.flows.unbent import unbent


@pytest.mark.parametrize("context_dim", [0, 2])
def test_coordinates_that_nothing_bends_are_found(context_dim):
    more = {"context_dim": context_dim, "hidden": (8,)}
    assert unbent(BUILDERS["realnvp"](1, **more)) == [0]
    assert unbent(BUILDERS["nice"](1, **more)) == [0]
    assert unbent(BUILDERS["realnvp"](3, layers=1, **more)) == [0]
    assert unbent(BUILDERS["nice"](4, layers=1, mask="alternating", **more)) == [1, 3]
    for name in ("planar", "spline"):
        assert unbent(BUILDERS[name](1, layers=1, **more)) == []
    for name in VECTOR_BUILDERS:
        assert unbent(BUILDERS[name](3, layers=2, **more)) == []


def test_a_builder_that_is_called_says_what_it_cannot_do():
    with pytest.warns(UserWarning, match=r"realnvp: coordinate 0 is only shifted and scaled in each context.* normal "):
        pf.realnvp(1, context_dim=2)
    with pytest.warns(UserWarning, match=r"nice: coordinate 0 is only shifted.* logistic .*spline bends every"):
        pf.nice(1, base="logistic")
    with pytest.warns(UserWarning, match=r"realnvp: 2 of 4 coordinates .* More layers"):
        pf.realnvp(4, layers=1)
    with pytest.warns(UserWarning, match=r"fit_density: coordinate 0"):
        pf.fit_density("realnvp", torch.randn(50, 1), max_epochs=1, learning_rate=0.01, progress=False)
    linear = pf.Flow(pf.transforms.LowerTriangularAffine(2))
    with pytest.warns(UserWarning, match=r"fit_density: 2 of 2 coordinates"):
        pf.fit_density(linear, torch.randn(50, 2), max_epochs=1, learning_rate=0.01, progress=False)


def test_others_and_guides_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pf.spline(1, layers=1, context_dim=3)
        pf.planar(1)
        pf.realnvp(2, layers=2)
        Recipe("realnvp", around=(("affine", "tril"),)).build(1)  # tails bend it


def test_an_encoder_of_the_context_makes_no_coordinate_straight():
    """With large random parameters its context is so large that points lie outside of the splines' interval."""
    inner = pf.spline(2, layers=4, context_dim=WIDTH, **FLOW, **BASE)
    assert unbent(Conditional(inner, perceptron(12), 12).flow) == []
