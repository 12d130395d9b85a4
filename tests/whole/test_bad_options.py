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


@pytest.mark.parametrize("layers", [0, -1, 2.0, True, "8"])
def test_layers_below_one(layers):
    message = "layers: expected an integer >= 1"
    for door in (pf.AutoRealNVP, pf.AutoNICE, pf.AutoPlanar):
        with pytest.raises(ValueError, match=message):
            door(good, layers=layers)
    with pytest.raises(ValueError, match=message):
        pf.fit(good, Y, layers=layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"affine": "full"}, "affine: expected one of 'auto', 'diagonal', 'none', 'tril', got 'full'"),
        ({"base": "student"}, "base: expected one of .*Did you mean 'student_t'"),
        ({"init_scale": 0.0}, "init_scale: expected a finite number > 0"),
        ({"df": -1.0}, "df: expected a finite number > 0"),
        ({"hidden": (0,)}, "hidden: expected an integer >= 1"),
        ({"hidden": "32"}, "hidden: expected a sequence of layer widths"),
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


def test_misspelt_options_of_a_fit():
    with pytest.raises(TypeError, match="max_step"):
        pf.fit(good, Y, max_step=10)


def test_options_go_with_names_only():
    with pytest.raises(TypeError, match="layers go with a flow's name; this flow is already built"):
        pf.AutoFlow(good, pf.planar(1), layers=3)
    with pytest.raises(ValueError, match="layers: goes with a flow given by name"):
        pf.fit(good, Y, flow=pf.planar(1), layers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 10}, "draws: expected an integer >= 100"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
        ({"seed": 1.5}, "seed: expected an integer >= 0"),
        ({"runs": 0}, "runs: expected an integer >= 1"),
        ({"train_model": True}, "train_model: expected a model with parameters of its own"),
    ],
)
def test_bad_options_of_a_fit(options, message):
    with pytest.raises(ValueError, match=message):
        pf.fit(good, Y, **options)


@pytest.mark.parametrize(
    "form", [pf.realnvp(3), pf.transforms.Planar(2), lambda dim: pf.nice(dim + 1), pf.spline(1, context_dim=2)]
)
def test_flows_of_the_wrong_dimension(form):
    message = r"flow: expected one of dim 1 \(the model's unconstrained latents\) without context, got dim"
    with pytest.raises(ValueError, match=message):
        pf.AutoFlow(good, form).initialize(Y)
    with pytest.raises(ValueError, match=message):
        pf.fit(good, Y, flow=form, progress=False, max_steps=10)


@pytest.mark.parametrize("flow", [None, 3, ["realnvp"]])
def test_flows_that_are_none(flow):
    with pytest.raises(ValueError, match="flow: expected a name, a Flow, a Bijection or a function, got "):
        pf.AutoFlow(good, flow)


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
