"""The log density of a model: by hand, by Pyro, its Jacobians, its gradients, its sites.

Tolerances in float64: 1e-9 relative to sums of some dozens of terms, each rounded at 1e-16.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to, constraints

import pyro_flows as pf
from tests.invariants import close
from tests.models import CASES, Regression, each_model, gauss, normal, real, with_params


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
    density.value_and_grad(z)
    assert density.batched
    assert density.reason is None


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


def test_correlated_model_of_many_supports():
    """Simplex, correlation, ordered and interval sites side by side, in one vector."""

    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.full((3,), 2.0, dtype=torch.float64)))
        factor = pyro.sample("factor", dist.LKJCholesky(3, real(2.0)))
        scale = pyro.sample("scale", dist.LogNormal(real(0.0), 1.0).expand([3]).to_event(1))
        centre = pyro.sample("centre", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
        width = pyro.sample("width", dist.Uniform(real(-1.0), 3.0))
        pyro.sample("y", dist.MultivariateNormal(centre + width * p, scale_tril=scale[:, None] * factor), obs=y)

    y = normal(3, seed=23)
    density = pf.LogDensity(model, (y,))
    z = 0.5 * normal(4, density.dim, seed=24)
    assert density.dim == 2 + 3 + 3 + 3 + 1
    for row, value in zip(z, density(z), strict=True):
        total = real(0.0)
        values = {}
        for latent in density.structure.latents:
            transform = biject_to(density.structure.trace.nodes[latent.name]["fn"].support)
            values[latent.name] = transform(latent.unconstrained(row))
            total = total + transform.log_abs_det_jacobian(latent.unconstrained(row), values[latent.name]).sum()
        p, factor, scale, centre, width = values.values()
        total = total + dist.Dirichlet(torch.full((3,), 2.0, dtype=torch.float64)).log_prob(p)
        total = total + dist.LKJCholesky(3, real(2.0)).log_prob(factor)
        total = total + gauss(scale.log(), 0.0, 1.0) - scale.log().sum() - real(4.0).log()
        covariance = (scale[:, None] * factor) @ (scale[:, None] * factor).T
        close(value, total + dist.MultivariateNormal(centre + width * p, covariance).log_prob(y), 1e-9)


# a model's own parameters --------------------------------------------------------------------------------------------


def test_gradients_reach_the_parameters_of_a_module_when_asked():
    model = Regression()
    x, y = normal(5, 2, seed=7), normal(5, seed=8)
    density = pf.LogDensity(model, (x, y))
    assert sorted(density.parameters()) == ["linear.bias", "noise", "offset"]
    z = normal(3, 2, seed=25)
    leaves = list(density.parameters().values())
    found = torch.autograd.grad(density(z).sum(), leaves)
    bias, offset, log_noise = (
        leaf.detach().clone().requires_grad_() for leaf in (real([0.3]), real(0.5), real(2.0).log())
    )
    total = sum(gauss(y, x @ row + bias + offset, log_noise.exp()) for row in z)
    expected = dict(
        zip(["linear.bias", "offset", "noise"], torch.autograd.grad(total, [bias, offset, log_noise]), strict=True)
    )
    for name, gradient in zip(density.parameters(), found, strict=True):
        close(gradient, expected[name], 1e-9, name)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_are_held_until_told_to_forget():
    density = pf.LogDensity(with_params, (real(1.1),))
    z = normal(3, 1, seed=26)
    before = density.value_and_grad(z)[0]
    with torch.no_grad():
        density.parameters()["spread"].fill_(1.0)
    density.forget()
    after = density.value_and_grad(z)[0]
    close(after, density(z).detach(), 1e-12)
    by_hand = torch.stack([gauss(x, 0.4, real(1.0).exp()) + gauss(1.1, x, 1.0) for x in z[:, 0]])
    close(after, by_hand, 1e-9)
    assert (after - before).abs().max() > 0.1


@each_model("regression", "params")
def test_parameters_outlive_the_store(case):
    """A store that is cleared, or filled by another model, does not make this another model."""
    density = pf.LogDensity(case.model, case.args)
    leaves = density.parameters()
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(0.5)
    z = normal(3, density.dim, seed=28)
    before = density(z).detach()
    pyro.clear_param_store()
    for other in (None, 7.0):
        if other is not None:
            for name in leaves:
                pyro.param(name, real(other))
        close(density(z).detach(), before, 1e-12)
        close(density.value_and_grad(z)[0], before, 1e-12)
        assert set(density.predictive(z)) == {"y"}
        assert density.prior(2) is not None
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.sub_(0.5)  # the module is shared


def test_parameters_of_modules_without_a_store():
    """Pyro's setting ``module_local_params``."""
    x, y = normal(5, 2, seed=7), normal(5, seed=8)
    with pyro.settings.context(module_local_params=True):
        density = pf.LogDensity(Regression(), (x, y))
        z = normal(3, 2, seed=29)
        leaves = density.parameters()
        assert sorted(leaves) == ["linear.bias", "noise", "offset"]
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(density(z).sum(), leaves.values()))
    close(density(z).detach(), pf.LogDensity(Regression(), (x, y))(z).detach(), 1e-12)


@each_model("nested", "regression", "params")
def test_nothing_outside_sees_the_runs(case):
    """No trace, no gradient and no change of the model's parameters comes from evaluating it."""
    if isinstance(case.model, torch.nn.Module):
        before = {name: value.clone() for name, value in case.model.state_dict().items()}
    with pyro.poutine.trace() as outer:
        density = pf.LogDensity(case.model, case.args)
        z = normal(2, density.dim, seed=27)
        density.value_and_grad(z)
        density.constrain(z)
    assert not outer.trace.nodes
    if isinstance(case.model, torch.nn.Module):
        for name, value in case.model.state_dict().items():
            close(value, before[name], 0.0, name)
