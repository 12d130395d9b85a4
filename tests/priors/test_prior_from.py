"""A posterior as a prior: supports, shapes, dimensions, files, and chains of batches against all data at once."""

import copy
import json
import math
import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

import pyro_flows as pf
from pyro_flows.model.supports import _event_dim
from pyro_flows.priors import making
from pyro_flows.priors.making import _fitted, _in_one_turn
from pyro_flows.priors.parts import Joint, Part, describe, restore
from tests.posteriors import Y, schools_posterior

QUICK = {"max_epochs": 15}


def walk(y, prior=None):
    """A slope, a scale and shares, with priors of their own or one for both slope and scale."""
    if prior is None:
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    else:
        values = prior.sample()
        slope, scale = values["slope"], values["scale"]
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(slope, scale), obs=y)


def in_chains(draws):
    """A judged posterior of exact draws, one chain after the other."""
    return {name: value.reshape(4, -1, *value.shape[1:]) for name, value in draws.items()}


def skewed(count=8000):
    """Draws of two correlated sites, one of them positive: neither a normal distribution nor independent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    return {"slope": x[:, 0], "scale": (0.5 * x[:, 0] + 0.5 * x[:, 1]).exp()}


def tied():
    """The model of these draws."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.5 * slope, 0.5))
    pyro.factor("nothing is observed", torch.zeros_like(scale))


@pytest.fixture(scope="module")
def joint():
    posterior = pf.from_mcmc(in_chains(skewed()), tied)
    assert posterior.verdict.status == "ok"
    return pf.prior_from(posterior, max_epochs=60)


@pytest.mark.slow
def test_several_sites_are_one_event_with_their_correlation(joint):
    assert joint.sites == ("slope", "scale")
    distribution = joint()
    assert distribution.event_shape == (2,)
    torch.manual_seed(0)
    found = joint.split(distribution.sample((20_000,)))
    assert bool((found["scale"] > 0).all())
    pair = torch.stack([found["slope"], found["scale"].log()])
    torch.testing.assert_close(pair.mean(1), torch.zeros(2), rtol=0.0, atol=0.04)
    torch.testing.assert_close(pair.cov(), torch.tensor([[1.0, 0.5], [0.5, 0.5]]), rtol=0.0, atol=0.05)
    assert 0.0 < joint.mean_error < 0.06
    assert 0.0 < joint.sd_error < 0.06
    assert joint.status == "ok"
    assert str(joint).startswith("Prior of slope, scale")


def test_the_density_is_that_of_the_draws(joint):
    draws = skewed(2000)
    value = torch.stack([draws["slope"], draws["scale"]], 1)
    x = draws["slope"]
    noise = (draws["scale"].log() - 0.5 * x) / 0.5
    exact = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(noise)
    exact = exact - math.log(0.5) - draws["scale"].log()
    found = joint().log_prob(value)
    assert float((exact - found).mean()) == pytest.approx(0.0, abs=0.02)
    drawn = joint().sample((4000,))
    assert bool(torch.isfinite(joint().log_prob(drawn)).all())
    assert bool(joint().support.check(drawn).all())


def test_nothing_trains_and_no_gradient_is_lost(joint):
    assert not any(parameter.requires_grad for parameter in joint.parameters())
    value = joint().rsample((3,))
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(joint().log_prob(leaf).sum(), leaf)
    assert bool((gradient != 0).all())
    pyro.clear_param_store()
    walk(torch.zeros(2), joint)
    assert not list(pyro.get_param_store())


@pytest.mark.slow
def test_a_model_with_it_is_fitted_and_chained(joint):
    y = torch.tensor([0.5, 1.5, 0.2])
    density = pf.LogDensity(walk, (y, joint))
    assert density.dim == 2
    assert density.reason is None
    z = torch.randn(5, 2)
    values = density.constrain(z)
    assert set(values) == {"prior", "slope", "scale"}
    prior = joint().log_prob(values["prior"]) + density.log_jacobian(z)
    likelihood = dist.Normal(values["slope"][:, None], values["scale"][:, None]).log_prob(y).sum(1)
    torch.testing.assert_close(density(z), prior + likelihood, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(density.unconstrain(values), z, rtol=1e-4, atol=1e-4)
    guide = pf.AutoFlow(walk, "nice", layers=2).initialize(y, joint)
    posterior = pf.diagnose(walk, guide, y, joint, draws=500)
    with pytest.warns(pf.UnreliableWarning) if posterior.verdict.status == "unreliable" else _nothing():
        again = pf.prior_from(posterior, "prior", **QUICK)
    assert again.sites == ("slope", "scale")
    assert set(again.sample()) == {"slope", "scale"}


def _nothing():
    return nullcontext()


def test_draws_are_shared_by_name_with_pyros_own_inference(joint):
    trace = pyro.poutine.trace(walk).get_trace(torch.zeros(2), joint)
    assert {"prior", "slope", "scale", "y"} <= set(trace.nodes)
    assert float(trace.nodes["scale"]["value"]) > 0
    assert trace.log_prob_sum().dim() == 0


def test_saved_and_loaded(joint, tmp_path):
    joint.save(tmp_path / "prior")
    found = pf.FittedPrior.load(tmp_path / "prior")
    value = joint().sample((50,))
    torch.testing.assert_close(found().log_prob(value), joint().log_prob(value))
    assert found.sites == joint.sites
    assert str(found) == str(joint)
    for other in (pickle.loads(pickle.dumps(joint)), copy.deepcopy(joint)):
        torch.testing.assert_close(other().log_prob(value), joint().log_prob(value))
    (tmp_path / "prior" / "prior.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="digest differs"):
        pf.FittedPrior.load(tmp_path / "prior")
    with pytest.raises(ValueError, match="expected the directory of a saved prior"):
        pf.FittedPrior.load(tmp_path)


# one site, its plate, its own flow ------------------------------------------------------------------------------------


def again(y, prior):
    theta = pyro.sample("theta", prior())
    double = pyro.deterministic("double", 2 * theta)
    with pyro.plate("school", len(y)):
        pyro.sample("y", dist.Normal(double / 2, 1.0), obs=y)


@pytest.mark.slow
def test_a_site_in_a_plate_keeps_its_dimension(tmp_path):
    prior = pf.prior_from(schools_posterior("ok"), "theta", **QUICK)
    assert prior().event_shape == (8,)
    assert prior.parts[0].dims == ("school",)
    prior.save(tmp_path / "prior")
    for one in (prior, pf.FittedPrior.load(tmp_path / "prior")):
        guide = pf.AutoFlow(again, "nice", layers=2).initialize(Y, one)
        tree = pf.diagnose(again, guide, Y, one, draws=200)
        with pytest.warns(pf.UnreliableWarning) if tree.verdict.status == "unreliable" else _nothing():
            found = tree.to_arviz(predictive=False)
        assert found["posterior"]["theta"].dims == ("chain", "draw", "school")
        assert found["unconstrained_posterior"]["theta"].dims == ("chain", "draw", "school")
        assert pf.prior_from(tree, **QUICK).parts[0].dims == ("school",) if tree.verdict.status == "ok" else True


def test_a_flow_that_is_the_posterior_is_taken_and_moved(monkeypatch):
    def effects(y):
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(()).double(), 2.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    posterior = pf.fit(effects, Y.double(), progress=False, max_steps=400, escalate=False)
    prior = pf.prior_from(posterior)
    assert prior.flow is not posterior.flow
    value = prior().sample((10,))
    exact = dist.Normal(Y.double() / 1.25, 1.25**-0.5).log_prob(value).sum(-1)
    assert float((prior().log_prob(value) - exact).abs().max()) < 0.1  # trained on, and moved to weighted moments
    assert 0.0 < prior.mean_error < 0.06
    drawn, given = prior.flow.draw(20_000)[0], posterior.z
    assert float(((drawn.mean(0) - given.mean(0)) / given.std(0)).abs().max()) < 0.06
    calls = []

    def bent(flow, *_):
        (tails,) = (layer for layer in flow.modules() if isinstance(layer, pf.transforms.SinhArcsinh))
        for parameter in tails.parameters():
            parameter.data.fill_(0.5)
        calls.append(flow)
        return flow

    monkeypatch.setattr(making, "OWN_ERROR_MOST", 0.0)
    monkeypatch.setattr(making, "_trained", bent)
    kept = pf.prior_from(posterior)
    assert len(calls) == 1
    assert kept.mean_error < 0.1  # training that makes a flow worse is not taken; this one is .5 sd off


def apart(y, prior):
    """The data tell of a size, and not of its sign."""
    place = pyro.sample("place", prior())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(place.abs(), 1.0), obs=y)


def test_a_table_that_weights_corrected_is_the_prior():
    """It was a planar flow of resampled draws, after half a minute, and means might be .02 sd off."""
    y = torch.tensor([1.0, 1.5, 2.2])
    posterior = pf.fit(apart, y, lambda: dist.Normal(0.0, 3.0), progress=False)
    assert posterior.verdict.status == "corrected"
    prior = pf.prior_from(posterior)
    assert prior.flow.recipe.builder == "marginals"
    assert prior.mean_error < 0.005
    grid = torch.linspace(-8.0, 8.0, 4001)
    right = dist.Normal(0.0, 3.0).log_prob(grid) + dist.Normal(grid.abs()[:, None], 1.0).log_prob(y).sum(1)
    right = right - torch.trapezoid(right.exp(), grid).log()
    assert float(torch.trapezoid(right.exp() * (right - prior().log_prob(grid)), grid)) < 1e-4


@pytest.mark.parametrize("dim", [1, 2])
def test_draws_of_two_modes_begin_at_a_mixture(dim):
    """One coordinate took 20,000 steps of a planar flow; a Real-NVP alone is far off after so few epochs."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(12_000, dim, generator=generator) + 3.0 * torch.randn(12_000, 1, generator=generator).sign()
    train, test = z.double().split(6000)
    flow = _fitted(train, torch.full((6000,), 1.0 / 6000).double(), 0, 5, False)
    with torch.no_grad():
        nats = float(flow.log_prob(test).mean())
    parts = [dist.Normal(place, 1.0).log_prob(test).sum(1) for place in (3.0, -3.0)]
    assert nats > float((torch.logaddexp(*parts) - math.log(2.0)).mean()) - 0.01
    part = [Part("theta", torch.Size([dim]), constraints.independent(constraints.real, 1), (None,))]
    prior = pf.FittedPrior(flow, part, status="ok", verdict="ok", error=making.UNKNOWN)
    assert prior().rsample((3, 4)).shape == (3, 4, dim)


def test_draws_of_one_gaussian_are_one_gaussian():
    z = torch.randn(6000, 1, generator=torch.Generator().manual_seed(1)).double()
    flow = _fitted(z, torch.full((6000,), 1.0 / 6000).double(), 0, None, False)
    assert flow.mixture is None
    with torch.no_grad():
        middle, far = flow.log_prob(torch.tensor([[0.0], [6.0]]).double())
    assert float(middle - far) == pytest.approx(18.0, rel=0.1)


@pytest.mark.falls_back
def test_an_angle_is_brought_into_one_turn():
    """Angles about pi were two heaps at both ends of the line, five units apart."""

    def wind(y):
        angle = pyro.sample("angle", dist.VonMises(0.0, 0.1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.VonMises(angle, 4.0), obs=y)

    y = torch.tensor([3.0, -3.1, 2.7, -2.9, 3.1, -2.6, 2.9, 3.1])
    posterior = pf.fit(wind, y, draws=500, progress=False)
    kept = posterior.samples["angle"].clone()
    assert float(kept.std()) > 2.0
    drawn = pf.prior_from(posterior, max_epochs=1)().sample((20_000,))
    total = torch.polar(torch.tensor([0.1, *[4.0] * 8]), torch.cat([torch.zeros(1), y])).sum()
    assert float(drawn.mean()) == pytest.approx(float(total.angle()) + math.tau * (float(total.angle()) < 0), abs=0.01)
    grid = torch.linspace(-math.pi, math.pi, 10_001)
    weights = torch.softmax(total.abs() * grid.cos(), 0)
    assert float(drawn.std()) == pytest.approx(float((weights * grid.square()).sum().sqrt()), rel=0.03)
    assert torch.equal(posterior.samples["angle"], kept)


# what cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_flows.UnreliableWarning")
def test_what_has_no_prior_of_its_own_is_refused():
    def bounded(y):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        below = pyro.sample("below", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(below, 1.0), obs=y)

    def guide(y):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("below", dist.Uniform(0.0, top))

    posterior = pf.diagnose(bounded, guide, torch.tensor(0.1))
    with pytest.raises(ValueError, match="support of 'below' depends on other latents"):
        pf.prior_from(posterior)
    with pytest.raises(ValueError, match=r"sites: expected one of 'below', 'top', got 'tip'\. Did you mean 'top'"):
        pf.prior_from(posterior, "tip")
    with pytest.raises(ValueError, match="expected one or more latent sites"):
        pf.prior_from(posterior, [])
    assert pf.prior_from(posterior, "top", **QUICK)().support.lower_bound == 0.0


def test_an_unreliable_posterior_warns():
    with pytest.warns(pf.UnreliableWarning, match="prior_from"):
        prior = pf.prior_from(schools_posterior("unreliable"), **QUICK)
    assert prior.status == "unreliable"
    assert "unreliable" in str(prior)
    assert "error is not known" in str(prior)
    assert prior.mean_error == prior.sd_error == math.inf


SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "unit": constraints.unit_interval,
    "interval": constraints.interval(-2.0, 3.0),
    "bounds": constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 5.0])),
    "from zero": constraints.interval(0.0, 2.0),
    "above": constraints.greater_than(2.0),
    "below": constraints.less_than(-1.0),
    "half open": constraints.half_open_interval(0.0, 2.0),
    "simplex": constraints.simplex,
    "vector": constraints.independent(constraints.positive, 2),
    "cholesky": constraints.lower_cholesky,
    "correlations": constraints.corr_cholesky,
    "covariance": constraints.positive_definite,
    "ordered": dist.constraints.ordered_vector,
    "positive ordered": dist.constraints.positive_ordered_vector,
    "correlation matrix": dist.constraints.corr_matrix,
}
SHAPES = {
    **dict.fromkeys(("simplex", "ordered", "positive ordered"), (3,)),
    **dict.fromkeys(("cholesky", "correlations", "covariance", "correlation matrix", "vector"), (3, 3)),
    "bounds": (2,),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_come_back_from_their_text(name):
    text = json.loads(json.dumps(describe(SUPPORTS[name])))
    support = restore(text, torch.float64)
    lifted = len(SHAPES.get(name, ())) - _event_dim(support)
    support = constraints.independent(support, lifted) if lifted > 0 else support
    part = Part(name, torch.Size(SHAPES.get(name, ())), support, (None,) * len(SHAPES.get(name, ())))
    z = torch.randn(4, part.size, dtype=torch.float64)
    value, ladj = part.forward(z)
    assert value.shape == (4, *part.shape)
    assert bool(SUPPORTS[name].check(value).all())
    assert ladj.shape == (4,)
    back, also = part.inverse(value)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(also, ladj)
    if name != "bounds":  # of a tensor, the number type is part of the text
        assert str(restore(text, torch.float64)) == str(SUPPORTS[name])
    assert Part.read(part.describe(), torch.float64).size == part.size


def test_unknown_supports_are_refused():
    with pytest.raises(NotImplementedError, match="the support"):
        describe(dist.constraints.sphere)
    with pytest.raises(ValueError, match="unknown kind 'ball'"):
        restore({"kind": "ball"}, torch.float64)


def test_the_joint_bijection_is_one():
    parts = [
        Part("a", torch.Size(()), constraints.positive, ()),
        Part("b", torch.Size((3,)), constraints.simplex, (None,)),
        Part("c", torch.Size((2, 2)), constraints.independent(constraints.real, 2), (None, None)),
    ]
    support = Joint(parts)
    transform = biject_to(support)
    z = torch.randn(5, 7, dtype=torch.float64)
    value = transform(z)
    assert value.shape == (5, 8)
    assert transform.forward_shape((5, 7)) == (5, 8)
    assert transform.inverse_shape((5, 8)) == (5, 7)
    assert bool(support.check(value).all())
    outside = value.clone()
    outside[0, 0] = -1.0
    assert support.check(outside).tolist() == [False, True, True, True, True]
    torch.testing.assert_close(transform.inv(value), z)
    free = torch.autograd.functional.jacobian(lambda row: torch.cat([transform(row)[:3], transform(row)[4:]]), z[0])
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, value)[0], torch.linalg.slogdet(free)[1])


def test_pyro_may_register_a_prior(tmp_path):
    """A model that did warned of each of the prior's parameters, none of which is trained."""
    posterior = pf.fit(walk, torch.tensor([0.5, 1.5, 1.0]), progress=False)
    prior = pf.prior_from(posterior, **QUICK)
    prior.save(tmp_path / "prior")
    for one in (prior, pf.FittedPrior.load(tmp_path / "prior"), copy.deepcopy(prior)):
        pyro.module("prior", one)
    assert not [*pyro.get_param_store()]


def test_angles_on_both_sides_of_a_cut_are_near_each_other():
    angles = torch.tensor([[3.0, 0.1], [-3.1, -0.2], [3.1, 0.3]])
    found = _in_one_turn(angles, torch.full((3,), 1.0 / 3.0, dtype=torch.float64))
    turns = (found - angles) / math.tau
    torch.testing.assert_close(turns, turns.round(), rtol=0.0, atol=1e-6)
    assert float((found.amax(0) - found.amin(0)).max()) < 0.51
