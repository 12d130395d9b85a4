"""The checks themselves: each deliberate bug is caught by the function that the tests use."""

import pytest
import torch
from torch.distributions import Transform

import pyro_flows as pf
from pyro_flows import transforms
from pyro_flows.flows import recipe
from tests.invariants import check_batching, check_gradients
from tests.registry import HIDDEN, built, normal, unregistered
from tests.state_invariants import check_follows_parameters, check_pure, copies

X = normal(5, 3, seed=1)


class ClampedStraightThrough(pf.transforms.DiagonalAffine):
    def forward_and_ladj(self, x, context=None):
        shift, log_scale, _ = self._affine(x, context)
        log_scale = log_scale + (log_scale.clamp(-0.1, 0.1) - log_scale).detach()
        y = torch.addcmul(shift, x, log_scale.exp())
        return y, log_scale.sum(-1).expand(y.shape[:-1])


class StoresItsPass(pf.transforms.AffineCoupling):
    def forward_and_ladj(self, x, context=None):
        self.last = super().forward_and_ladj(x, context)
        return self.last


class EditsItsBuffer(pf.transforms.DiagonalAffine):
    def forward_and_ladj(self, x, context=None):
        self.loc.copy_(x.detach().flatten(0, -2).mean(0))
        return super().forward_and_ladj(x, context)


class Remembers(pf.transforms.AffineCoupling):
    """Answers for a point that it has seen before, as Pyro's caches do."""

    seen: dict = {}  # noqa: RUF012

    def forward_and_ladj(self, x, context=None):
        if id(x) not in self.seen:
            self.seen[id(x)] = super().forward_and_ladj(x, context)
        return self.seen[id(x)]


class MixesRows(pf.transforms.AffineCoupling):
    def forward_and_ladj(self, x, context=None):
        y, ladj = super().forward_and_ladj(x, context)
        return y, ladj.mean().expand(ladj.shape)


class KeepsALambda(pf.transforms.AffineCoupling):
    def __init__(self, dim, **more):
        super().__init__(dim, **more)
        self.register_load_state_dict_post_hook(lambda module, _: None)


def layer(kind):
    return built(lambda: kind(3, hidden=HIDDEN), dtype=torch.float64, sd=0.3, seed=0)


# The check, a correct layer that passes it, and broken ones that do not. Mistakes in the mathematics are among those of
# ``tests/mutations.py``.
BUGS = [
    (lambda t: check_gradients(t, X, None), pf.transforms.DiagonalAffine, [ClampedStraightThrough]),
    (lambda t: check_batching(t, X, None), pf.transforms.AffineCoupling, [MixesRows]),
    (lambda t: check_pure(t, X, None), pf.transforms.AffineCoupling, [StoresItsPass, EditsItsBuffer]),
    (lambda t: check_follows_parameters(t, X, None), pf.transforms.AffineCoupling, [Remembers]),
]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        pytest.param(check, right, bug, id=f"{number}-{bug.__name__}")
        for number, (check, right, bugs) in enumerate(BUGS)
        for bug in bugs
    ],
)
def test_a_bug_in_a_layer_is_caught(check, right, wrong):
    check(layer(right))
    with pytest.raises(AssertionError):
        check(layer(wrong))


def test_a_module_that_does_not_pickle_is_caught():
    list(copies(layer(pf.transforms.AffineCoupling), layer(pf.transforms.AffineCoupling)))
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        list(copies(layer(KeepsALambda), layer(KeepsALambda)))


def test_a_transform_without_a_case_is_caught(monkeypatch):
    class New(pf.transforms.Bijection):
        pass

    assert issubclass(New, Transform)
    assert unregistered() == set()
    monkeypatch.setattr(transforms, "New", New, raising=False)
    monkeypatch.setattr(transforms, "__all__", [*transforms.__all__, "New"])
    monkeypatch.setitem(recipe.BUILDERS, "new", pf.nice)
    assert unregistered() == {"New", "new"}
