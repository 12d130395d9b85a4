"""Flow guides in Pyro's Predictive, AutoGuideList and NeuTraReparam, in torch's loop, without a parameter store."""

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.infer.mcmc import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim.multi import PyroMultiOptimizer

import pyro_flows as pf
from tests.guides.test_guides import KINDS, case_of, guide_of
from tests.invariants import close
from tests.models import each_model, nested, normal


@pytest.mark.parametrize("parallel", [False, True])
@each_model("nested", "dependent", "decentered")
def test_predictive(case, parallel):
    """Draws have the shapes that Pyro's own guide gives them, and differ."""
    guide = guide_of(case)
    draws = Predictive(case.model, guide=guide, num_samples=7, parallel=parallel)(*case.args)
    if case.name == "dependent":  # for which Pyro has no guide
        assert ((draws["beta"] > 0) & (draws["beta"] < 1 - draws["alpha"])).all()
    else:
        pyros = Predictive(case.model, guide=AutoNormal(case.model), num_samples=7, parallel=parallel)(*case.args)
        shapes, expected = ({name: value.shape for name, value in found.items()} for found in (draws, pyros))
        assert shapes.items() >= expected.items()
    if case.name == "decentered":
        close(draws["theta"], draws["tau"].reshape(7, 1) * draws["theta_decentered"], 1e-12)
    assert all(len(draws[name].reshape(7, -1).unique(dim=0)) == 7 for name in guide.prototype_trace.nodes)


def test_parts_of_a_guide_list():
    """A flow over some sites, Pyro's own guide over others, in nested plates; named after their places in the list."""
    case = case_of("nested")
    guide = AutoGuideList(nested)
    guide.append(KINDS["realnvp"](poutine.block(nested, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(nested, expose=["x"])))
    svi = SVI(nested, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*case.args)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    for _ in range(3):
        svi.step(*case.args)
    assert any(name.startswith("0.flow.") for name in before)
    assert any(name.startswith("1.locs.") for name in before)
    for name, parameter in guide.named_parameters():
        assert (parameter != before[name]).any(), f"{name} did not move"
    assert guide[0].latent_dim == 4
    draws = guide(*case.args)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"mu": (), "tau": (3, 1), "x": (3, 4)}
    assert set(guide.median(*case.args)) == {"mu", "tau", "x"}
    assert guide.quantiles([0.1, 0.9], *case.args)["tau"][1].shape == (3, 1)


def test_discrete_sites_by_another_guide():
    """With the enumeration in the guide: the flow's part does not mind the extra dimensions."""

    @config_enumerate
    def model(y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(2, dtype=torch.float64)))
        with pyro.plate("n", len(y)):
            k = pyro.sample("k", dist.Categorical(p))
            pyro.sample("y", dist.Normal(k.double(), 0.7), obs=y)

    y = normal(4, seed=52)
    guide = AutoGuideList(model)
    guide.append(KINDS["realnvp"](poutine.block(model, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
    losses = [svi.step(y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize(("kind", "name"), [*((kind, "regression") for kind in KINDS), ("realnvp", "nested")])
def test_neutra(kind, name):
    """Pyro's potential of the warped model is that of the log density pulled back, and NUTS runs on it."""
    case = case_of(name)
    guide = guide_of(case, kind, sd=0.3)
    neutra = NeuTraReparam(guide)
    warped = neutra.reparam(case.model)
    density = pf.LogDensity(case.model, case.args, noncentered=guide.structure.noncentered)
    assert bool(guide.structure.noncentered) == (name == "nested")
    _, potential, _, trace = initialize_model(warped, case.args)
    (name,) = [name for name in trace.nodes if name.endswith("_shared_latent")]
    for noise in normal(4, density.dim, seed=53):
        z, ladj = guide.flow.bijection.forward_and_ladj(noise)
        close(potential({name: noise}), -(density(z[None])[0] + ladj), 1e-9)
    mcmc = MCMC(NUTS(warped, max_tree_depth=3), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(*case.args)
    draws = mcmc.get_samples()[name]
    values = neutra.transform_sample(draws[:, None, None] if case.name == "nested" else draws)  # axes of plates
    for latent in guide.structure.latents:
        assert values[latent.name].shape in {(3, *latent.shape), (3, *(1, 1, *latent.shape)[-2:])}


def test_pyros_neutra_counts_the_determinant_once_for_each_entry_of_a_plate():
    """The limit that the guide's documentation names; if this fails, Pyro has changed and the sentence can go."""
    case = case_of("masked")
    guide, density = guide_of(case, sd=0.3), pf.LogDensity(case.model, case.args)
    _, potential, _, _ = initialize_model(NeuTraReparam(guide).reparam(case.model), case.args)
    noise = normal(3, seed=54)
    z, ladj = guide.flow.bijection.forward_and_ladj(noise)
    close(potential({"x_shared_latent": noise}), -(density(z[None])[0] + 3 * ladj), 1e-9)  # 3 of 5 are not masked


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("torch_loop", [False, True])
def test_both_ways_of_pyro_to_hold_and_train_parameters(torch_loop, local):
    """With ``SVI`` and with the ELBO as a module in torch's own loop; with and without Pyro's parameter store."""
    case = case_of("nested")
    with pyro.settings.context(module_local_params=True) if local else contextlib.nullcontext():
        guide = KINDS["realnvp"](case.model).initialize(*case.args)
        loss = Trace_ELBO()(case.model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
        for _ in range(3):
            if torch_loop:
                optimizer.zero_grad()
                loss(*case.args).backward()
                optimizer.step()
            else:
                svi.step(*case.args)
        assert all((parameter != before[name]).any() for name, parameter in guide.named_parameters())
        assert any("AutoRealNVP" in name for name in pyro.get_param_store()) is not local


def documented(loss, captured):
    """Torch's optimizer of captured parameters, as in Pyro's tutorial on training loops of one's own."""
    found = list(dict.fromkeys(site["value"].unconstrained() for site in captured(loss)[1].values()))  # ordered
    optimizer = torch.optim.Adam(found, lr=0.01)
    for _ in range(3):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def differentiated(loss, captured):
    """Pyro's optimizer of several parameters, which takes derivatives by them."""
    optimizer = PyroMultiOptimizer(pyro.optim.Adam({"lr": 0.01}))
    for _ in range(3):
        value, sites = captured(loss)
        optimizer.step(value, {name: site["value"].unconstrained() for name, site in sites.items()})


@pytest.mark.parametrize("loop", [documented, differentiated])
def test_loops_that_capture_parameters_train(loop):
    case = case_of("nested")
    guide = KINDS["realnvp"](case.model)

    def captured(loss):
        with poutine.trace(param_only=True) as capture:
            value = loss()
        return value, dict(capture.trace.nodes)

    guide.initialize(*case.args)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    loop(lambda: Trace_ELBO().differentiable_loss(case.model, guide, *case.args), captured)
    assert all((parameter != before[name]).any() for name, parameter in guide.named_parameters())


def trial(count, treated=None, y=None):
    """A randomized trial, whose treatment another package may set."""
    effect = pyro.sample("effect", dist.Normal(0.0, 2.0))
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    with pyro.plate("unit", count):
        arm = pyro.sample("treated", dist.Bernoulli(0.5 * torch.ones(count)), obs=treated)
        pyro.sample("y", dist.Normal(base + effect * arm, 1.0), obs=y)


@pytest.mark.slow
def test_a_posterior_draws_from_the_model_after_an_intervention():
    """As chirho's ``do`` changes it; Pyro's own does the same. The exact mean follows from the normal equations."""
    generator = torch.Generator().manual_seed(0)
    treated = (torch.rand(40, generator=generator) < 0.5).float()
    y = 1.0 + 2.0 * treated + torch.randn(40, generator=generator)
    posterior = pf.fit(trial, 40, treated, y, progress=False)
    draws = {name: posterior.samples[name] for name in ("effect", "base")}
    changed = poutine.do(trial, data={"treated": torch.ones(5)})
    found = Predictive(changed, posterior_samples=draws)(5)["y"]
    design = torch.stack([torch.ones(40), treated], 1)
    base, effect = torch.linalg.solve(design.mT @ design + 0.25 * torch.eye(2), design.mT @ y)
    assert found.shape == (4000, 5)
    assert float(found.mean()) == pytest.approx(float(base + effect), abs=0.06)


def test_a_guide_draws_after_an_intervention_inside_of_the_model():
    """A handler around the model, inside of the guide: what follows reads the value, and the site keeps its prior."""
    fixed = poutine.do(trial, data={"base": torch.tensor(1.0)})
    guide = pf.AutoFlowMessenger(fixed, layers=2).initialize(4, torch.ones(4), torch.full((4,), 3.0))
    middle = guide.median(4, torch.ones(4), torch.full((4,), 3.0))
    assert float(middle["effect"]) == pytest.approx(8.0 / 4.25, abs=0.1)
    assert float(middle["base"]) == pytest.approx(0.0, abs=0.3)
