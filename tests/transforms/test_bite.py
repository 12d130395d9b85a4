"""The checks themselves: each deliberate bug is caught by the function that the tests use."""

import pytest
import torch
from torch.distributions import Transform

import pyro_flows as pf
from pyro_flows import transforms
from pyro_flows.flows import recipe
from pyro_flows.transforms import masks
from tests.invariants import (
    check_batching,
    check_every_coordinate_moves,
    check_gradients,
    check_identity,
    check_ladj,
    check_mass,
    check_path_gradient,
    check_round_trip,
    check_score,
)
from tests.registry import HIDDEN, built, make_flow, normal, unregistered
from tests.state_invariants import (
    check_follows_parameters,
    check_pure,
    copies,
)

X = normal(5, 3, seed=1)


class LadjDoubled(pf.transforms.AffineCoupling):
    def forward_and_ladj(self, x, context=None):
        y, ladj = super().forward_and_ladj(x, context)
        return y, 2.0 * ladj

    def inverse_and_ladj(self, y, context=None):
        x, ladj = super().inverse_and_ladj(y, context)
        return x, 2.0 * ladj


class SignFlippedInInverse(pf.transforms.AffineCoupling):
    def inverse_and_ladj(self, y, context=None):
        x, ladj = super().inverse_and_ladj(y, context)
        return x, -ladj


class ShiftFlippedInInverse(pf.transforms.AdditiveCoupling):
    def inverse_and_ladj(self, y, context=None):
        return super().forward_and_ladj(y, context)


class SignFlippedInScore(pf.transforms.AffineCoupling):
    def forward_and_score(self, x, score, context=None):
        y, ladj, carried = super().forward_and_score(x, score, context)
        return y, ladj, carried - 2.0 * super().forward_and_score(x, torch.zeros_like(score), context)[2]


class ForgetsLadjInScore(pf.transforms.AffineCoupling):
    def forward_and_score(self, x, score, context=None):
        y, ladj, carried = super().forward_and_score(x, score, context)
        return y, ladj, carried - super().forward_and_score(x, torch.zeros_like(score), context)[2]


class ForgetsTheBend(pf.transforms.SplineCoupling):
    """As if the slope of a spline were the same everywhere, which it is for the affine map alone."""

    def _carry(self, moved, parameters, score):
        carried, weights = super()._carry(moved, parameters, score)
        bend = super()._carry(moved.detach(), tuple(p.detach() for p in parameters), torch.zeros_like(score))[0]
        return carried - bend, weights


class InverseWithoutGradient(pf.transforms.Planar):
    def inverse_and_ladj(self, y, context=None):
        with torch.no_grad():
            x, _ = super().inverse_and_ladj(y, context)
        return x + (y - y.detach()), super().inverse_and_ladj(y, context)[1]


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


def followed(t):
    """A flow of a layer and of another that keeps what the first one moves."""
    last = built(
        lambda: pf.transforms.AffineCoupling(3, mask=masks.half(3, flip=True)), dtype=torch.float64, sd=0.3, seed=1
    )
    return pf.Flow(pf.transforms.Compose([t, last]))


# The check, a correct layer that passes it, and broken ones that do not.
BUGS = [
    (
        lambda t: check_round_trip(t, X, None, 1e-9),
        pf.transforms.AffineCoupling,
        [SignFlippedInInverse, ShiftFlippedInInverse],
    ),
    (
        lambda t: check_ladj(t, X, None, 1e-9),
        pf.transforms.AffineCoupling,
        [LadjDoubled, SignFlippedInInverse, MixesRows],
    ),
    (lambda t: check_gradients(t, X, None), pf.transforms.Planar, [InverseWithoutGradient, ClampedStraightThrough]),
    (
        lambda t: check_score(t, X, None, 1e-9),
        pf.transforms.AffineCoupling,
        [SignFlippedInScore, ForgetsLadjInScore, LadjDoubled],
    ),
    (lambda t: check_score(t, X, None, 1e-9), pf.transforms.SplineCoupling, [ForgetsTheBend]),
    (lambda t: check_batching(t, X, None), pf.transforms.AffineCoupling, [MixesRows]),
    (lambda t: check_pure(t, X, None), pf.transforms.AffineCoupling, [StoresItsPass, EditsItsBuffer]),
    (lambda t: check_follows_parameters(t, X, None), pf.transforms.AffineCoupling, [Remembers]),
    (
        lambda t: check_path_gradient(followed(t)),
        pf.transforms.AffineCoupling,
        [SignFlippedInScore, ForgetsLadjInScore],
    ),
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


@pytest.mark.parametrize("kind", [pf.transforms.AffineCoupling, pf.transforms.Planar, pf.transforms.Rescale])
def test_a_start_that_is_not_the_identity_is_caught(kind):
    check_identity(kind(3).double(), X, None, 1e-14)
    with pytest.raises(AssertionError):
        check_identity(layer(kind), X, None, 1e-14)


@pytest.mark.parametrize("wrong", [LadjDoubled, SignFlippedInInverse])
def test_a_wrong_ladj_is_caught_by_the_mass(wrong):
    def flow(kind):
        return pf.Flow(built(lambda: kind(2, hidden=HIDDEN), dtype=torch.float64, sd=0.3, seed=0))

    check_mass(flow(pf.transforms.AffineCoupling), None, 1e-5, half_width=25.0, points=151)
    with pytest.raises(AssertionError, match="mass"):
        check_mass(flow(wrong), None, 1e-5, half_width=25.0, points=151)


def test_a_module_that_does_not_pickle_is_caught():
    list(copies(layer(pf.transforms.AffineCoupling), layer(pf.transforms.AffineCoupling)))
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        list(copies(layer(KeepsALambda), layer(KeepsALambda)))


@pytest.mark.parametrize("name", ["nice", "realnvp"])
def test_masks_that_do_not_alternate_are_caught(name, monkeypatch):
    def couplings():
        flow = make_flow(name, 3)
        return pf.transforms.Compose(
            [part for part in flow.bijection.layers if not isinstance(part, pf.transforms.Rescale)]
        )

    check_every_coordinate_moves(couplings(), 3)
    monkeypatch.setattr(masks, "sequence", lambda dim, layers, kind="mixed", seed=0: [masks.half(dim)] * layers)
    with pytest.raises(AssertionError, match="never move"):
        check_every_coordinate_moves(couplings(), 3)


def test_a_transform_without_a_case_is_caught(monkeypatch):
    class New(pf.transforms.Bijection):
        pass

    assert issubclass(New, Transform)
    assert unregistered() == set()
    monkeypatch.setattr(transforms, "New", New, raising=False)
    monkeypatch.setattr(transforms, "__all__", [*transforms.__all__, "New"])
    monkeypatch.setitem(recipe.BUILDERS, "new", pf.nice)
    assert unregistered() == {"New", "new"}
