"""A model's own parameters (``pyro.param``, modules): held fixed, differentiable, independent of Pyro's store."""

import pyro
import pyro.distributions as dist
import torch

import pyro_flows as pf
from tests.invariants import close
from tests.models import Regression, each_model, gauss, normal, real, with_params
from tests.registry import RECORDED_FROM


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


def test_what_a_model_reads_elsewhere_is_held_until_told_to_forget():
    """Recorded graphs hold what they read outside of the model; the first call of a batch size is not recorded."""
    outside = {"shift": 1.0}

    def model():
        x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
        pyro.factor("tilt", outside["shift"] * x)

    density = pf.LogDensity(model)
    z = normal(3, 1, seed=30)
    for _ in range(RECORDED_FROM):
        before = density.value_and_grad(z)[0]
    outside["shift"] = 2.0
    close(density.value_and_grad(z)[0], before, 0.0)
    density.forget()
    close(density.value_and_grad(z)[0], before + z[:, 0], 1e-12)


def test_parameters_may_be_trained():
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
