"""Traps of copies: ``state_dict``, deepcopy, pickle and files. Shown in Pyro, absent here."""

import copy
import io
import itertools
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows as pf
from tests.guides.test_guides import KINDS, each_kind
from tests.guides.test_traps_state import Y, density, model, pyros_guide, pyros_steps, train, trains
from tests.invariants import close


@each_kind
def test_state_dict_reaches_a_new_guide(kind):
    first = KINDS[kind](model)
    train(first, steps=8)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = KINDS[kind](model).initialize(Y)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    close(density(second), density(first), 0.0)
    second(Y)
    close(density(second), density(first), 0.0)  # the first one's tensors, in the store, are left alone
    assert trains(second)


ASK = {
    "parameters": lambda guide: list(guide.parameters()),
    "state_dict": lambda guide: guide.state_dict(),
    "load_state_dict": lambda guide: guide.load_state_dict({}),
    "get_posterior": lambda guide: guide.get_posterior(),
    "sample_posterior": lambda guide: guide.sample_posterior(2),
    "log_prob": lambda guide: guide.log_prob({}),
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_there_are_no_parameters_before_the_first_call(ask):
    guide = KINDS["realnvp"](model)
    with pytest.raises(RuntimeError, match=r"AutoRealNVP has no parameters yet.*guide\.initialize\(\*args\)"):
        ask(guide)
    guide.initialize(Y)
    assert list(guide.parameters())


# copies ---------------------------------------------------------------------------------------------------------------


def test_pyros_copies_harm_the_original():
    guide = pyros_guide()
    copy.deepcopy(guide)
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        _ = guide.model
    guide = pyros_guide()
    pyros_steps(guide)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(guide)


def by_pickle(guide):
    return pickle.loads(pickle.dumps(guide)).attach(model, Y)


def by_torch_save(guide):
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False).attach(model, Y)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, by_pickle, by_torch_save])
@each_kind
def test_copies_are_equal_independent_and_train(kind, make_copy):
    guide = KINDS[kind](model)
    train(guide)
    before = density(guide)
    other = make_copy(guide)
    assert guide.model is model
    assert other.model is model
    close(density(guide), before, 0.0)
    close(density(other), before, 0.0)
    assert set(other.sample_posterior(3)) == {"mu", "sd"}
    assert trains(other)
    close(density(guide), before, 0.0)
    assert trains(guide)
    assert torch.isfinite(density(copy.deepcopy(other))).all()


def shared_rows(y):
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 3.0)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Held(nn.Module):
    """A module with a guide of its own method, or of a module that it gets before or after the guide."""

    def __init__(self, kind, holds):
        super().__init__()
        self.net = nn.Linear(1, 1)
        inner = nn.Sequential(nn.Linear(1, 1)) if holds == "method" else Inner()
        own = {"guide": kind(self.model if holds == "method" else inner), "inner": inner}
        for name in own if holds == "guide first" else reversed(own):
            setattr(self, name, own[name])

    def model(self, y):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 3.0)), 1.0))
            pyro.sample("y", dist.Normal(z, self.net.weight.square().sum() + 1.0), obs=y)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)

    def forward(self, y):
        return Held.model(self, y)


def owner(model):
    """The object whose method, or call, a model is; a handler may be around it."""
    while hasattr(model, "func"):
        model = model.args[1]
    return getattr(model, "__self__", model)


@pytest.mark.parametrize("holds", ["method", "model first", "guide first"])
@pytest.mark.parametrize("kind", [pf.AutoRealNVP, pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_a_copy_of_a_module_has_a_guide_of_its_own_model(kind, holds):
    """A guide that is copied alone keeps its model, and so does one of a posterior."""
    first = Held(partial(kind, layers=2), holds)
    y = torch.linspace(0.0, 1.0, 4)
    first.guide(y)
    second = copy.deepcopy(first)
    models = [guide.model for guide in (second.guide, getattr(second.guide, "top", second.guide))]
    assert all(owner(found) is (second if holds == "method" else second.inner) for found in models)
    assert set(second.guide.sample_posterior(3, y)) == {"mu", "z"}
    alone = copy.deepcopy(first.guide)
    models = [guide.model for guide in (alone, getattr(alone, "top", alone))]
    assert all(owner(found) is (first if holds == "method" else first.inner) for found in models)


@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_copies_of_guides_with_plates_can_be_copied_and_stored(kind):
    guide, y = kind(shared_rows, layers=2), torch.linspace(0.0, 1.0, 4)
    guide(y)
    ways = copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))
    for make_copy, again in itertools.product(ways, ways):
        assert set(again(make_copy(guide)).sample_posterior(3, y)) == {"mu", "z"}


def test_copies_before_the_first_call():
    for make_copy in (copy.deepcopy, by_pickle):
        other = make_copy(KINDS["realnvp"](model))
        assert trains(other)


def test_a_loaded_guide_asks_for_its_model():
    guide = KINDS["realnvp"](model).initialize(Y)
    loaded = pickle.loads(pickle.dumps(guide))
    assert set(loaded.sample_posterior(3)) == {"mu", "sd"}  # needs no model
    with pytest.raises(RuntimeError, match=r"loaded without its model.*guide\.attach\(model, \*args\)"):
        _ = loaded.model


def test_copies_carry_no_data():
    """Neither the arguments nor the model go into a file."""
    guide = KINDS["realnvp"](model)
    train(guide)
    assert len(pickle.dumps(guide)) < len(pickle.dumps(guide.flow)) + 20_000
    big = torch.zeros(100_000, dtype=torch.float64)
    guide = pf.AutoPlanar(lambda y: model(Y) or pyro.factor("all", y.sum()), layers=1).initialize(big)
    assert len(pickle.dumps(guide)) < 100_000
