"""Many data sets side by side give what each gives by itself."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import LogDensity
from pyro_flows.inference.starts import pathfinder as pathfinder_module
from pyro_flows.model.stack import NotStackable, Stack
from tests.calibration.models import branching, counts, data_sets, regression

INTEGERS = [torch.tensor([1, 0, 4]), torch.tensor([2, 2, 0]), torch.tensor([9, 7, 8])]
CASES = {
    "regression": [LogDensity(regression, args) for args in data_sets(3)],
    "whole numbers": [LogDensity(counts, (y,)) for y in INTEGERS],
}


def by_themselves(name: str) -> list[LogDensity]:
    """Densities that share nothing."""
    return [LogDensity(density.model, density.args) for density in CASES[name]]


def points(stack: Stack, each: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(stack) * each, stack.dim, generator=generator, dtype=stack.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("calls", [1, 3])
def test_values_and_gradients_are_those_of_each_density(name, calls):
    own, stack = by_themselves(name), Stack(by_themselves(name))
    z = points(stack, 7)
    for _ in range(calls):
        value, grad = stack.value_and_grad(z)
    assert torch.equal(stack(z), stack(z))
    for number, density in enumerate(own):
        rows = slice(7 * number, 7 * number + 7)
        expected = density.unrecorded(z[rows])
        torch.testing.assert_close(value[rows], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad[rows], expected[1], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(stack(z)[rows], expected[0], rtol=1e-4, atol=1e-4)


def test_hessians_are_those_of_each_density():
    own, stack = by_themselves("regression"), Stack(by_themselves("regression"))
    z = points(stack, 2)
    found = stack.hessians(z)
    for number, density in enumerate(own):
        for row in (2 * number, 2 * number + 1):
            expected = torch.autograd.functional.hessian(lambda x, density=density: density(x[None])[0], z[row])
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_densities_that_share_graphs_keep_their_own_data():
    own, stack = by_themselves("regression"), Stack(by_themselves("regression"))
    z = points(stack, 30)[:30]
    for _ in range(6):  # so that they are recorded
        for alone, shared in zip(own, stack.densities, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(shared(z), alone(z), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(shared.value_and_grad(z)[1], alone.value_and_grad(z)[1], rtol=1e-4, atol=1e-3)


def test_large_batches_go_through_in_pieces(monkeypatch):
    stack = Stack(by_themselves("regression"))
    z = points(stack, 50)
    whole = stack(z)
    monkeypatch.setattr("pyro_flows.model.stack.CHUNK", 3 * 5 * 8)
    torch.testing.assert_close(stack(z), whole)


def test_some_of_the_data_sets_make_a_stack_too():
    stack = Stack(by_themselves("regression"))
    z = points(stack, 4)
    some = stack.select([2, 0])
    rows = torch.cat([z[8:12], z[:4]])
    torch.testing.assert_close(some(rows), stack(z)[[8, 9, 10, 11, 0, 1, 2, 3]])


def test_gradients_are_counted():
    stack = Stack(by_themselves("regression"))
    assert [density.evaluations for density in stack.densities] == [0, 0, 0]
    stack.value_and_grad(points(stack, 4))
    stack.select([0, 2]).hessians(points(stack, 1)[:2])
    assert [density.evaluations for density in stack.densities] == [4 + stack.dim, 4, 4 + stack.dim]


def no_tensor(y, sd):
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), sd), obs=y)


def with_a_parameter(y):
    shift = pyro.param("shift", torch.tensor(0.0))
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(shift, 1.0)), 1.0), obs=y)


def draw_by_draw(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0 if mu.item() > 0 else 2.0), obs=y)


PAIR = [(torch.tensor(0.3),), (torch.tensor(0.4),)]


@pytest.mark.parametrize(
    ("model", "sets", "message"),
    [
        (
            branching,
            [(torch.linspace(-1.0, 1.0, 3),), (torch.linspace(-2.0, 1.0, 3),)],
            "cannot take its data as inputs",
        ),
        (counts, [(torch.tensor([1.0, 2.0]),), (torch.tensor([1.0, 2.0, 3.0]),)], "differ in shapes"),
        (no_tensor, [(torch.tensor(0.3), 1.0), (torch.tensor(0.3), 2.0)], "no tensors"),
        (with_a_parameter, PAIR, "parameters"),
        pytest.param(draw_by_draw, PAIR, "draw by draw", marks=pytest.mark.falls_back),
    ],
)
def test_what_makes_no_stack_is_refused(model, sets, message):
    densities = [LogDensity(model, args) for args in sets]
    with pytest.raises(NotStackable, match=message):
        Stack(densities)


@pytest.mark.parametrize("alike", [True, False])
def test_missing_values_have_to_be_in_the_same_places(alike):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.nan_to_num(y), obs_mask=~y.isnan())

    sets = [torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([-1.0, torch.nan, 0.0])]
    sets = sets if alike else [sets[0], sets[1].flip(0)[[1, 0, 2]]]
    own = [LogDensity(model, (y,)) for y in sets]
    if not alike:
        with pytest.raises(NotStackable, match="masks leave other entries"):
            Stack(own)
        return
    stack = Stack([LogDensity(model, (y,)) for y in sets])
    z = torch.linspace(-1.0, 1.0, 4 * stack.dim).reshape(4, -1)
    torch.testing.assert_close(stack(z), torch.cat([own[0](z[:2]), own[1](z[2:])]))


def test_paths_of_many_data_sets_keep_to_their_own(monkeypatch):
    """A piece of the paths would not stand in groups of one data set each."""
    monkeypatch.setattr("pyro_flows.inference.starts.climb.rows_for", lambda numbers: 4)
    own, stack = by_themselves("regression"), Stack(by_themselves("regression"))
    points = torch.cat([torch.zeros(1, stack.dim), 3.0 * torch.randn(2, stack.dim)]).to(stack.dtype).repeat(len(own), 1)
    ends = pathfinder_module.pathfinder(stack, points, torch.ones_like(points), seed=0).ends.reshape(len(own), 3, -1)
    for density, found in zip(own, ends, strict=True):
        alone = pathfinder_module.pathfinder(density, points[:3], torch.ones_like(points[:3]), seed=0).ends
        torch.testing.assert_close(density(found), density(alone), atol=1e-3, rtol=0.0)


def test_a_density_beside_another_has_its_own_data():
    first, *others = by_themselves("regression")
    for density in others:
        beside = first.beside(density.args, density.kwargs)
        z = torch.linspace(-1.0, 1.0, 6).view(3, 2)
        torch.testing.assert_close(beside(z), density(z))
        assert beside.batched
        assert torch.equal(beside.structure.observed["y"], density.structure.observed["y"])
    torch.testing.assert_close(first(z), by_themselves("regression")[0](z))


def test_data_of_a_density_beside_another_are_checked():
    first = LogDensity(counts, (torch.tensor([1, 0, 4]),))
    with pytest.raises(ValueError, match="'y'"):
        first.beside((torch.tensor([1, -2, 4]),), {})


def stubborn(y):
    """Where data are large, runs branch on a latent, and cannot be batched."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    sd = 2.0 if bool((y > 50.0).any()) and float(mu) > -1.0 else 1.0
    pyro.sample("y", dist.Normal(mu, sd), obs=y)


def noisy_for_some(y):
    """Where data are large, the density is random."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(mu + (y > 50.0) * torch.rand(()), 1.0), obs=y)


@pytest.mark.parametrize("model", [stubborn, noisy_for_some])
def test_a_density_beside_another_that_is_of_another_kind_is_not_stacked(model):
    first = LogDensity(model, (torch.tensor(1.0),))
    others = [first.beside((torch.tensor(y),), {}) for y in (2.0, 60.0)]
    with pytest.raises(NotStackable):
        Stack([first, *others])


def test_constrained_values_that_share_a_graph_are_those_of_each_density():
    """One is of the data, one has a support that moves, and one is whole."""

    def model(y):
        top = pyro.sample("top", dist.HalfNormal(2.0))
        pyro.sample("below", dist.Uniform(0.0, top))
        pyro.deterministic("shifted", top + y.mean())
        pyro.deterministic("above", (top > 1.0).long())
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    data = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    stack = Stack([LogDensity(model, (y,)) for y in data])
    z = points(stack, 40)[:40]
    for y, density in zip(data, stack.densities, strict=True):
        expected = LogDensity(model, (y,)).constrain(z)
        for _ in range(3):  # it is recorded at the second call
            found = density.constrain(z)
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert density._constrained.reason is None


def test_densities_in_double_precision_that_share_a_graph_are_those_of_each_density():
    """Single precision has a few digits of the data, and double precision has the others."""
    data = [(args[0], args[1] + 1e4 * number) for number, args in enumerate(data_sets(3))]
    stack = Stack([LogDensity(regression, args) for args in data])
    z = points(stack, 10)[:10]
    for args, density in zip(data, stack.densities, strict=True):
        expected = LogDensity(regression, args)._doubly(z)
        for _ in range(3):  # it is recorded at the second call
            found = density._doubly(z)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
        assert density._doubles.reason is None
        assert density.elsewhere(())._doubles is None
