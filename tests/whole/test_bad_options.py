"""Mistakes in options are met before any work, by name, with a suggestion where there is one."""

import numpy as np
import pytest

import pyro_flows as pf
from tests.guides.test_guides import each_kind
from tests.whole.test_bad_input import Y, good


def test_unknown_flow_names_are_met_with_a_suggestion():
    for door in (pf.AutoFlow, lambda model, flow: pf.fit(model, Y, flow=flow)):
        with pytest.raises(ValueError, match=r"flow: expected one of .*, got 'realnpv'. Did you mean 'realnvp'"):
            door(good, "realnpv")


def test_a_function_that_takes_no_dimension_and_a_series_are_named():
    with pytest.raises(TypeError, match=r"^flow: expected a function of one number, the dimension"):
        pf.fit(good, Y, flow=lambda: None, progress=False)
    with pytest.raises(ValueError, match=r"^refine: expected"):
        pf.fit(good, Y, refine=np.array([1.0, 2.0]), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affine": "full"}, "affine: expected one of 'auto', 'diagonal', 'none', 'tril', got 'full'"),
        ({"base": "student"}, "base: expected one of .*Did you mean 'student_t'"),
        ({"hidden": (0,)}, "hidden: expected an integer >= 1"),
        ({"activation": "sillu"}, "activation: expected one of .*Did you mean 'silu'"),
    ],
)
def test_bad_options_of_a_guide(options, message):
    with pytest.raises(ValueError, match=message):
        pf.AutoRealNVP(good, **options)


@each_kind
def test_misspelt_options(kind):
    build = {"realnvp": pf.AutoRealNVP, "nice": pf.AutoNICE, "planar": pf.AutoPlanar}[kind]
    with pytest.raises(TypeError, match="layer_count"):
        build(good, layer_count=3)
    with pytest.raises(TypeError, match="layer_count"):
        pf.AutoFlow(good, kind, layer_count=3)


def test_options_go_with_names_only():
    with pytest.raises(TypeError, match="layers go with a flow's name; this flow is already built"):
        pf.AutoFlow(good, pf.planar(1), layers=3)
    with pytest.raises(ValueError, match="layers: goes with a flow given by name"):
        pf.fit(good, Y, flow=pf.planar(1), layers=3)


@pytest.mark.parametrize(
    "form", [pf.realnvp(3), pf.transforms.Planar(2), lambda dim: pf.nice(dim + 1), pf.spline(1, context_dim=2)]
)
def test_flows_of_the_wrong_dimension(form):
    message = r"flow: expected one of dim 1 \(the model's unconstrained latents\) without context, got dim"
    with pytest.raises(ValueError, match=message):
        pf.AutoFlow(good, form).initialize(Y)
    with pytest.raises(ValueError, match=message):
        pf.fit(good, Y, flow=form, progress=False, max_steps=10)


@pytest.mark.parametrize("model", [None, "good", 3])
def test_models_that_cannot_be_called(model):
    message = "model: expected a callable Pyro model, got "
    for door in (lambda: pf.LogDensity(model), lambda: pf.AutoRealNVP(model), lambda: pf.fit(model, Y)):
        with pytest.raises(ValueError, match=message):
            door()


def test_a_guide_in_the_place_of_the_model():
    guide = pf.AutoRealNVP(good)
    message = r"model: expected a Pyro model, got the guide AutoRealNVP\. Give its model first\."
    for door in (lambda: pf.diagnose(guide, good, Y), lambda: pf.fit(guide, Y), lambda: pf.LogDensity(guide, (Y,))):
        with pytest.raises(ValueError, match=message):
            door()
