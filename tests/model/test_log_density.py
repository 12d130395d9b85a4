"""The log density of a model: by hand, by Pyro, its Jacobians, its gradients, its sites.

Tolerances in float64: 1e-9 relative to sums of some dozens of terms, each rounded at 1e-16.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to, constraints

import pyro_flows as pf
from tests.invariants import close
from tests.models import CASES, each_model, normal, real
from tests.registry import RECORDED_FROM


@functools.cache
def built(case):
    """The density of a case, made once for all tests, and four points."""
    density = pf.LogDensity(case.model, case.args)
    return density, 0.7 * normal(4, density.dim, seed=21)


def rows_of(values):
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@each_model()
def test_value_is_the_density_by_hand(case):
    density, z = built(case)
    assert density.dim == case.dim
    assert density.dtype == torch.float64
    by_hand = torch.stack([case.joint(v, *case.args) + case.ladj(v) for v in rows_of(density.constrain(z))])
    close(density(z), by_hand, 1e-9)
    assert (density(z) - density(z[:1])).abs().max() > 0.1, "the density does not move"


@each_model(where=lambda case: case.pyro)
def test_value_is_pyros_potential(case):
    """Discrete sites summed out by Pyro's own elimination among them."""
    density, z = built(case)
    nesting = density.structure.plate_nesting
    _, potential, _, _ = initialize_model(
        case.model, case.args, max_plate_nesting=nesting, init_strategy=init_to_sample
    )
    for row, value in zip(z, density(z).detach(), strict=True):
        sites = {latent.name: latent.unconstrained(row) for latent in density.structure.latents}
        close(value, -potential(sites).detach(), 1e-9)


@each_model()
def test_models_of_the_registry_are_batched_and_recorded(case):
    """Otherwise the tests of fallbacks would not show that these are the exception."""
    density, z = built(case)
    for _ in range(RECORDED_FROM):
        value, _ = density.value_and_grad(z)
        with torch.no_grad():
            close(density(z), value, 1e-9)
    assert density.batched
    assert density.reason is None
    assert len(density._with_gradients.runners) == 1
    assert len(density._values.runners) == (0 if density.parameters() else 1)


@each_model()
def test_gradient_is_that_of_the_value(case):
    """At the recorded batch size, at new points, and at other batch sizes; no graph is left."""
    density, z = built(case)
    for points in (z, -0.5 * z, z[:1], torch.cat([z, z + 0.1])):
        leaf = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(density(leaf).sum(), leaf)
        value, ours = density.value_and_grad(points)
        assert not value.requires_grad
        assert not ours.requires_grad
        close(value, density(points).detach(), 1e-9)
        close(ours, gradient, 1e-9)
        assert torch.isfinite(ours).all()


@each_model()
def test_no_rows_give_no_values(case):
    density, z = built(case)
    value, grad = density.value_and_grad(z[:0])
    assert value.shape == density(z[:0]).shape == (0,)
    assert grad.shape == (0, density.dim)


def test_gradient_is_a_difference_quotient():
    """So that value and gradient cannot be wrong together."""
    for case in CASES:
        density, z = built(case)
        step = 1e-5 * torch.eye(density.dim, dtype=torch.float64)
        quotient = torch.stack([(density(row + step) - density(row - step)) / 2e-5 for row in z]).detach()
        close(
            density.value_and_grad(z)[1],
            quotient,
            1e-6,
            f"{case.name}: central differences are good to h^2 and 1e-11/h",
        )


@each_model()
def test_there_and_back_again(case):
    density, z = built(case)
    values = density.constrain(z)
    assert set(density.names) <= set(values)
    for latent in density.structure.latents:
        assert values[latent.name].shape == (len(z), *latent.shape)
    close(density.unconstrain({name: values[name] for name in density.names}), z, 1e-9)


@each_model(where=lambda case: case.sites)
def test_sites_add_up_to_the_joint(case):
    density, z = built(case)
    parts = {**density.log_prior(z), **density.log_likelihood(z)}
    assert set(parts) == set(density.names) | set(density.structure.observed)
    total = sum(part.reshape(len(z), -1).sum(1) for part in parts.values())
    close(total, torch.stack([case.joint(v, *case.args) for v in rows_of(density.constrain(z))]), 1e-9)


def test_pointwise_likelihood_has_the_shape_of_the_data_and_zeros_where_masked():
    for case in CASES:
        density, z = built(case)
        for name, part in density.log_likelihood(z).items():
            observed = density.structure.observed[name]
            assert part.shape == (len(z), *observed.shape), case.name
            if case.name == "missing":
                assert ((part == 0.0) == observed.isnan()).all()


@each_model(where=lambda case: case.sites)
def test_recorded_site_densities_are_those_of_the_model(case):
    """From the fourth call of a size on; `forget` makes the next calls run the model again."""
    density, z = built(case)
    first = density.log_likelihood(z)
    for call in range(5):
        moved = z + 0.01 * call
        with torch.no_grad():
            plain = density.strictly(functools.partial(density._densities_at, tuple(first)), moved)
        recorded = density.log_likelihood(moved)
        for name, expected in plain.items():
            torch.testing.assert_close(recorded[name], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    recorder = density._densities.get(tuple(first))
    assert recorder is None or len(recorder.runners) == 1 or not density.batched
    density.forget()
    assert recorder is None or len(recorder.runners) == 0


def test_enumerated_models_have_no_pointwise_likelihood():
    """Their terms are not independent given the continuous latents alone."""
    density, z = built(next(case for case in CASES if case.name == "hidden_markov"))
    assert density.log_likelihood(z) == {}
    assert set(density.log_prior(z)) == {"rows", "loc"}


# Jacobians -----------------------------------------------------------------------------------------------------------

# Support, shape of an event, and which entries of an event are free coordinates.
SUPPORTS = {
    "real": (constraints.real, (), lambda x: x),
    "positive": (constraints.positive, (), lambda x: x),
    "greater_than": (constraints.greater_than(2.0), (), lambda x: x),
    "less_than": (constraints.less_than(-1.0), (), lambda x: x),
    "interval": (constraints.interval(-1.0, 3.0), (), lambda x: x),
    "unit_interval": (constraints.unit_interval, (), lambda x: x),
    "vector": (constraints.independent(constraints.positive, 1), (3,), lambda x: x),
    "simplex": (constraints.simplex, (4,), lambda x: x[..., :-1]),
    "ordered": (dist.constraints.ordered_vector, (3,), lambda x: x),
    "positive_ordered": (dist.constraints.positive_ordered_vector, (3,), lambda x: x),
    "corr_cholesky": (
        constraints.corr_cholesky,
        (3, 3),
        lambda x: x[..., torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])],
    ),
}


@pytest.mark.falls_back
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("name", SUPPORTS)
def test_log_jacobian_of_a_support(name, batch):
    """A flat prior leaves the log Jacobian alone; it is the log determinant of the derivative of the free entries."""
    support, event, free = SUPPORTS[name]

    def model():
        x = pyro.sample("x", dist.ImproperUniform(support, batch, event).to_event(len(batch)))
        assert support.check(x).all()  # the model sees values inside of the support
        pyro.factor("none", x.new_zeros(()))

    with torch.no_grad(), pyro.validation_enabled(True):
        density = pf.LogDensity(lambda like: model(), (real(0.0),))
    transform = biject_to(support)
    for z in 0.8 * normal(3, density.dim, seed=22):
        site = density.structure.latents[0]

        def entries(z, site=site):
            return free(transform(site.unconstrained(z))).flatten()

        jacobian = torch.autograd.functional.jacobian(entries, z)
        close(density.single(z), torch.linalg.slogdet(jacobian).logabsdet, 1e-9)


@pytest.mark.parametrize("steps", [1, 40])
def test_supports_follow_parameters(steps):
    """A bound that was trained after the model was read; a model of many operations runs only where it has to."""

    def model(y):
        upper = pyro.param("upper", torch.tensor(2.0).double(), constraint=constraints.positive)
        x = pyro.sample("x", dist.Uniform(0.0, upper))
        for _ in range(steps):
            x = (x + 1.0).log().exp() - 1.0
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    pyro.clear_param_store()
    density = pf.LogDensity(model, (torch.tensor(0.5).double(),))
    with torch.no_grad():
        density.parameters()["upper"].fill_(math.log(6.0))
    z = torch.tensor([[-1.0], [3.0]]).double()
    expected = torch.stack([density.trace_at(point).nodes["x"]["value"] for point in z]).detach()
    assert float(expected[1]) > 5.0
    torch.testing.assert_close(density.constrain(z)["x"], expected)
    torch.testing.assert_close(density.unconstrain({"x": expected}), z)
    slope = torch.sigmoid(z[:, 0]) * torch.sigmoid(-z[:, 0]) * 6.0
    torch.testing.assert_close(density.log_jacobian(z), slope.log())


@pytest.mark.parametrize("kind", ["fixed", "deterministic", "dependent"])
def test_long_models_run_for_their_values_only_where_they_have_to(kind):
    def model(y):
        runs.append(1)
        a = pyro.sample("a", dist.LogNormal(torch.zeros(2).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Uniform(0.0, a[0] if kind == "dependent" else 2.0))
        state = a
        for _ in range(400):
            state = state + 0.001 * torch.sin(state * b)
        if kind == "deterministic":
            pyro.deterministic("end", state)
        pyro.sample("y", dist.Normal(state, 1.0).to_event(1), obs=y)

    runs: list[int] = []
    density = pf.LogDensity(model, (torch.zeros(2).double(),))
    assert density.long
    z = normal(5, 3, seed=0)
    expected = [density.trace_at(point).nodes for point in z]
    runs.clear()
    found = density.constrain(z)
    assert bool(runs) is (kind != "fixed")
    assert list(found) == ["a", "b", *(["end"] if kind == "deterministic" else [])]
    for name, values in found.items():
        torch.testing.assert_close(values, torch.stack([nodes[name]["value"] for nodes in expected]))
