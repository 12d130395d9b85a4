"""The guide by effect handlers, in Pyro's and other packages' training loops, and beside other handlers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_flows as pf
from pyro_flows.guides.messenger import Blocks
from tests.guides.test_hierarchical import LOG_EVIDENCE, SCHOOLS, SIGMA, data, long_rows, normal_rows, schools, walk
from tests.models import real


def loss_of(guide, *args, model=schools, elbo=Trace_ELBO, particles=1000):
    with torch.no_grad():
        return elbo(num_particles=particles, vectorize_particles=True).loss(model, guide, *args)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 4))

    def forward(self, y, sigma):
        return self.net(torch.stack([y, sigma], -1) / 10.0)


OPTIONS = {
    "plain": {},
    "groups": {"groups": [["mu"], ["tau"]]},
    "rows in a group": {"groups": [["mu", "tau", "theta"]]},
    "normal rows": {"normal": ["theta"]},
    "normal global": {"normal": ["mu"]},
    "encoded rows": {"normal": ["theta"], "encoder": Encoder()},
    "shared rows": {"normal": ["theta"], "amortized_plates": ["school"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_pyro_agree_and_every_parameter_trains(name):
    pyro.set_rng_seed(0)
    guide = pf.AutoFlowMessenger(schools, layers=2, **OPTIONS[name]).initialize(SCHOOLS, SIGMA)
    with torch.no_grad():
        guide._top.affine.conditioner.values[2:] += 0.3  # no longer what it starts as
    traces = Trace_ELBO(num_particles=2000, vectorize_particles=True)._get_traces(schools, guide, (SCHOOLS, SIGMA), {})
    model_trace, guide_trace = next(iter(traces))
    terms = sum(
        sign * site["log_prob"].reshape(2000, -1).sum(1)
        for sign, trace in ((1.0, model_trace), (-1.0, guide_trace))
        for site in trace.nodes.values()
        if site["type"] == "sample"
    )
    mean, error = float(terms.detach().mean()), float(terms.detach().std()) / 2000**0.5
    for elbo in (TraceMeanField_ELBO, TraceGraph_ELBO):
        assert loss_of(guide, SCHOOLS, SIGMA, elbo=elbo) == pytest.approx(-mean, abs=8.0 * error)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(SCHOOLS, SIGMA)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    for _ in range(3):
        svi.step(SCHOOLS, SIGMA)
    still = [name for name, parameter in guide.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_the_start_is_near_the_evidence_where_rows_are_conditional():
    pyro.set_rng_seed(0)
    guide = pf.AutoFlowMessenger(schools, groups=[["mu", "tau"]], layers=2)
    assert LOG_EVIDENCE - 0.4 < -loss_of(guide, SCHOOLS, SIGMA) < LOG_EVIDENCE + 0.05
    assert pf.diagnose(schools, guide, SCHOOLS, SIGMA, progress=False).log_evidence == pytest.approx(
        LOG_EVIDENCE, abs=0.05
    )


@pytest.mark.parametrize("name", ["normal rows", "encoded rows"])
def test_guides_with_normals_are_judged_like_any_other(name):
    pyro.set_rng_seed(0)
    guide = pf.AutoFlowMessenger(schools, layers=2, **OPTIONS[name]).initialize(SCHOOLS, SIGMA)
    posterior = pf.diagnose(schools, guide, SCHOOLS, SIGMA, progress=False, draws=500)
    assert posterior.verdict.status == "unreliable"  # it is not trained
    assert posterior.samples["theta"].shape[1:] == (8,)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_medians_and_quantiles(parallel):
    guide = pf.AutoFlowMessenger(schools, layers=2, normal=["theta"])
    draws = Predictive(schools, guide=guide, num_samples=7, parallel=parallel)(SCHOOLS, SIGMA)
    assert draws["theta"].shape == (7, 8)
    assert len(draws["theta"].unique(dim=0)) == 7
    low, high = guide.quantiles([0.05, 0.95], SCHOOLS, SIGMA)["theta"]
    middle = guide.median(SCHOOLS, SIGMA)["theta"]
    assert bool(((low < middle) & (middle < high)).all())


def test_groups_are_independent_without_the_affine_map():
    """Each flow sees its own coordinates only."""
    guide = pf.AutoFlowMessenger(schools, layers=2, groups=[["theta", "mu"], ["tau"]], affine="none")
    guide.initialize(SCHOOLS, SIGMA)
    blocks = guide._top._flow.bijection
    assert isinstance(blocks, Blocks)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    jacobian = torch.func.jacrev(lambda x: blocks.forward_and_ladj(x)[0])(torch.ones(10))
    order = [latent.name for latent in guide._latents]
    assert order == ["mu", "tau", "theta"]
    assert bool((jacobian[1, [0, *range(2, 10)]] == 0.0).all())
    assert bool((jacobian[[0, *range(2, 10)], 1] == 0.0).all())
    assert bool((jacobian[2:, 0] != 0.0).any())


# posteriors of a subclass ---------------------------------------------------------------------------------------------


class Mine(pf.AutoFlowMessenger):
    """As Pyro's documentation of ``AutoNormalMessenger`` shows it: a posterior of one's own at one site."""

    def get_posterior(self, name, prior):
        if name == "theta":
            weight = pyro.param("weight", lambda: torch.tensor(0.5))
            return dist.Normal(self.upstream_value("mu").unsqueeze(-1) * weight, 3.0)
        return super().get_posterior(name, prior)


def test_a_subclass_has_posteriors_of_its_own():
    guide = Mine(schools, layers=2, normal=["theta"])
    trace = poutine.trace(guide).get_trace(SCHOOLS, SIGMA)
    assert torch.equal(trace.nodes["theta"]["fn"].mean, (0.5 * trace.nodes["mu"]["value"]).expand(8))
    with pytest.raises(ValueError, match=r"Mine has a posterior of its own for site 'theta'.*normal=\['theta'\]"):
        Mine(schools, layers=2).initialize(SCHOOLS, SIGMA)


class Above(pf.AutoFlowMessenger):
    """Group effects that depend on nothing; rows that are conditional on them."""

    def get_posterior(self, name, prior):
        if name == "u":
            return dist.Normal(real([1.0, -1.0]), 0.5)
        return super().get_posterior(name, prior)


def two_levels(x):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("group", 2, dim=-1):
        u = pyro.sample("u", dist.Normal(mu, 0.8))
        z = pyro.sample("z", dist.Normal(u, 0.7))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_conditional_rows_are_given_what_was_drawn_before():
    guide = Above(two_levels, layers=2, normal=["u"])
    x = real([3.0, -2.0])
    trace = poutine.trace(guide).get_trace(x)
    u, z = trace.nodes["u"]["value"], trace.nodes["z"]["value"]
    precision = 1.0 + 1.0 / 0.49
    exact = dist.Normal((x + u / 0.49) / precision, precision**-0.5).log_prob(z)
    assert guide.local == ["z"]
    assert torch.allclose(trace.nodes["z"]["fn"].log_prob(z), exact, atol=1e-6)


# what it cannot follow ----------------------------------------------------------------------------------------------


@pytest.mark.falls_back
@pytest.mark.parametrize(("model", "site"), [(long_rows, "z"), (lambda y: long_walk(y), "move")])
def test_rows_without_a_conditional_distribution_get_normals(model, site):
    guide = pf.AutoFlowMessenger(model, layers=2)
    draws = guide.sample_posterior(3, torch.zeros(300))
    assert guide.normal == [site]
    assert draws[site].shape[:2] == (3, 300)


def long_walk(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("step", len(y)):
        move = pyro.sample("move", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(scale.unsqueeze(-1) * move.cumsum(-1), 1.0), obs=y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": ["mu"]}, "groups: expected lists of names"),
        ({"normal": "mu"}, "normal: expected names of sites"),
        ({"groups": [["mu"], ["mu", "tau"]]}, "each site in one group"),
        ({"groups": [["mu"]], "normal": ["mu"]}, "none of them in normal="),
        ({"groups": [["m"]]}, "groups: expected one of 'mu', 'tau', 'theta'"),
        ({"normal": ["eta"]}, "normal: expected one of 'mu', 'tau', 'theta'"),
        ({"init_scale": 0.0}, "init_scale: expected a finite number > 0"),
        ({"normal": ["theta"], "encoder": lambda y, sigma: torch.zeros(3, 2)}, r"encoder: expected features of shape"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pf.AutoFlowMessenger(schools, **options).initialize(SCHOOLS, SIGMA)


def test_rows_that_depend_on_each_other_go_to_the_flow():
    guide = pf.AutoFlowMessenger(walk, layers=2).initialize(real([0.3, 1.0, 2.0]))
    assert guide.local == []
    assert guide.normal == []


# other handlers -----------------------------------------------------------------------------------------------------


def test_a_scaled_program_has_a_scaled_loss():
    """As other packages scale the ELBO: both model and guide."""
    pyro.set_rng_seed(0)
    guide = pf.AutoFlowMessenger(schools, layers=2).initialize(SCHOOLS, SIGMA)
    whole = loss_of(guide, SCHOOLS, SIGMA)
    scaled = Trace_ELBO(num_particles=1000, vectorize_particles=True)
    with torch.no_grad():
        found = scaled.loss(poutine.scale(schools, 0.1), poutine.scale(guide, 0.1), SCHOOLS, SIGMA)
    assert found == pytest.approx(0.1 * whole, abs=0.02)


def test_rows_that_are_conditioned_from_outside_are_those_of_the_draws():
    """Handlers around the guide choose the rows of a plate; each row is drawn by its own data."""
    x = data(20, spread=30.0)
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2, init="prior").initialize(x, 5)
    rows = torch.tensor([3, 17, 8, 0, 11])
    with torch.no_grad():
        guide._top.affine.loc[1] = 4.0  # wide rows, so that each is where its data are
    with poutine.condition(data={"row": rows}):
        found = guide(x, 5)
    assert torch.allclose(found["z"], x[rows], atol=6.0)
    assert torch.equal(found["x"], x[rows])


def test_the_divergence_of_a_value_has_the_log_density():
    """Pyro's own Delta leaves it out, so that TraceMeanField_ELBO would be off by the log derivative."""

    def model():
        pyro.sample("x", dist.LogNormal(real(0.0), 1.0))

    guide = pf.AutoRealNVP(model, layers=2, affine="none").initialize()
    assert loss_of(guide, model=model) == pytest.approx(0.0, abs=0.05)
    assert loss_of(guide, model=model, elbo=TraceMeanField_ELBO) == pytest.approx(0.0, abs=0.05)
    assert math.isfinite(loss_of(guide, model=model, elbo=TraceGraph_ELBO))


@pytest.mark.parametrize("around", [{"scale": 2.0}, {"mask": torch.tensor([True, False, True])}], ids=["scale", "mask"])
@pytest.mark.parametrize("kind", [pf.AutoRealNVP, pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_the_mean_field_loss_has_the_scales_and_masks_of_the_model(kind, around):
    """Pyro's has those of a divergence from the guide, which has none."""

    def model(x):
        with poutine.scale(scale=0.5):
            mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with pyro.plate("row", len(x)), getattr(poutine, next(iter(around)))(**around):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data(3)
    guide, losses = kind(model, layers=2).initialize(x), []
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.set_rng_seed(1)
        losses.append(loss_of(guide, x, model=model, elbo=elbo, particles=10))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
