"""Flow guides in Pyro's own machinery: every ELBO gets the right densities, every parameter its gradient."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.poutine.messenger import Messenger

import pyro_flows as pf
from tests.invariants import close
from tests.models import CASES, Case, each_model, nested, no_jacobian, real
from tests.registry import randomize
from tests.slow import rest_slow
from tests.state_invariants import evaluations

KINDS = {
    "realnvp": partial(pf.AutoRealNVP, layers=2, hidden=(8,)),
    "nice": partial(pf.AutoNICE, layers=2, hidden=(8,)),
    "planar": partial(pf.AutoPlanar, layers=2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
ENUMERATED = ("mixture", "hidden_markov")


def case_of(name):
    return next(case for case in CASES if case.name == name)


def guide_of(case, kind="realnvp", sd=0.1):
    """A guide with random parameters."""
    guide = KINDS[kind](case.model).initialize(*case.args)
    randomize(guide.flow, sd=sd, seed=51)
    return guide


class Drawn(Messenger):
    """Keep the unconstrained vectors that guides draw."""

    def __init__(self):
        super().__init__()
        self.z = []

    def _pyro_post_sample(self, msg):
        if msg["infer"].get("is_auxiliary"):
            self.z.append(
                msg["value"].detach().flatten(0, -2) if msg["value"].dim() > 1 else msg["value"].detach()[None]
            )


VECTORIZED = {"vectorize_particles": True, "max_plate_nesting": 2}
ELBOS = {
    "Trace": Trace_ELBO(),
    "Trace, 3 particles": Trace_ELBO(num_particles=3),
    "Trace, 3 vectorized": Trace_ELBO(num_particles=3, **VECTORIZED),
    "TraceGraph": TraceGraph_ELBO(),
    "Renyi, 3 particles": RenyiELBO(alpha=0.0, num_particles=3),
    "Renyi, 3 vectorized": RenyiELBO(alpha=0.0, num_particles=3, **VECTORIZED),
}
ENUM_ELBOS = {
    "TraceEnum": TraceEnum_ELBO(max_plate_nesting=2),
    "TraceEnum, 3 vectorized": TraceEnum_ELBO(num_particles=3, **VECTORIZED),
}
USUAL = ("Trace, 3 vectorized", "TraceGraph", "Renyi, 3 particles", *ENUM_ELBOS)


def check_loss(case, elbo):
    """It is made of log p(z) - log q(z) at the drawn z, whatever plates, masks, supports, particles are on the way."""
    guide = guide_of(case)
    density = pf.LogDensity(case.model, case.args, noncentered=guide.structure.noncentered)
    with Drawn() as drawn:
        loss = elbo.loss(case.model, guide, *case.args)
    z = torch.cat(drawn.z)
    assert len(z) == elbo.num_particles
    log_weights = density(z) - guide.get_posterior().log_prob(z)
    renyi = isinstance(elbo, RenyiELBO)
    expected = log_weights.logsumexp(0) - real(float(len(z))).log() if renyi else log_weights.mean()
    close(real(loss), -expected.detach(), 1e-9)


@pytest.mark.parametrize("name", rest_slow(ELBOS, USUAL.__contains__))
@each_model("nested", "masked", "filled", "dependent", "decentered", "improper")
def test_loss_of_continuous_models(case, name):
    if case.name == "masked" and "Renyi" in name:
        pytest.skip("Pyro's RenyiELBO takes a plate that holds all sites for independent problems")
    check_loss(case, ELBOS[name])


@pytest.mark.parametrize("name", ["Trace, 3 vectorized", "TraceGraph"])
def test_loss_of_latents_in_a_sequential_plate(name):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(real(0.0), 1.0))
        for i in pyro.plate("rows", len(y)):
            z = pyro.sample(f"z_{i}", dist.LogNormal(mean, 0.5))
            pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])

    check_loss(Case("loop", model, (real(0.5, 1.5, 1.0),), no_jacobian), ELBOS[name])


@pytest.mark.parametrize("name", ENUM_ELBOS)
@each_model(*ENUMERATED)
def test_loss_of_models_with_enumerated_sites(case, name):
    check_loss(case, ENUM_ELBOS[name])


@pytest.mark.parametrize("kind", rest_slow(KINDS, ("realnvp", "planar").__contains__))
@each_model("nested", "filled", "improper", "hidden_markov")
def test_svi_moves_every_parameter(case, kind):
    """Three steps: a last layer that starts at zero passes gradients on from the second step."""
    elbo = TraceEnum_ELBO if case.name in ENUMERATED else Trace_ELBO
    guide = KINDS[kind](case.model).initialize(*case.args)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    assert before
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo(max_plate_nesting=2))
    for _ in range(3):
        svi.step(*case.args)
    for name, parameter in guide.named_parameters():
        assert torch.isfinite(parameter).all()
        assert (parameter != before[name]).any(), f"{name} did not move"


@pytest.mark.parametrize("name", rest_slow([*ELBOS, *ENUM_ELBOS], USUAL.__contains__))
@each_kind
def test_one_evaluation_of_each_layer_a_step(kind, name):
    case = case_of("nested" if name in ELBOS else "mixture")
    elbo = {**ELBOS, **ENUM_ELBOS}[name]
    guide = guide_of(case, kind)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
    with evaluations(guide.flow) as counts:
        svi.step(*case.args)
    assert len(counts) >= 3
    assert set(counts.values()) == {1 if elbo.vectorize_particles else elbo.num_particles}


def test_jit():
    """With a fresh guide, which Pyro's own flow guide does not survive."""
    case = case_of("nested")
    guide = KINDS["realnvp"](case.model)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), JitTrace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit: tracers see Python numbers, and its deprecation
        svi.step(*case.args)
        before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
        for _ in range(3):
            assert torch.isfinite(real(svi.step(*case.args)))
    assert all((parameter != before[name]).any() for name, parameter in guide.named_parameters())


@pytest.mark.parametrize("kind", rest_slow(KINDS, ("realnvp", "planar").__contains__))
@each_model(where=lambda case: case.name not in ENUMERATED)
def test_log_prob_is_that_of_the_trace(case, kind):
    guide = guide_of(case, kind)
    rows = []
    for _ in range(6):
        trace = poutine.trace(guide).get_trace(*case.args)
        values = {name: trace.nodes[name]["value"].detach() for name in guide.prototype_trace.nodes}
        rows.append((values, trace.log_prob_sum().detach()))
    stacked = {name: torch.stack([values[name] for values, _ in rows]) for name in rows[0][0]}
    totals = torch.stack([total for _, total in rows])
    close(guide.log_prob(stacked).detach(), totals, 1e-8)  # there and back through the bijections
    shaped = {name: value.unflatten(0, (2, 3)) for name, value in stacked.items()}
    close(guide.log_prob(shaped).detach(), totals.reshape(2, 3), 1e-8)
    close(guide.log_prob(rows[0][0]).detach(), totals[0], 1e-8)


def test_to_make_a_guide_draws_no_random_numbers():
    state = torch.random.get_rng_state()
    for kind in KINDS.values():
        kind(nested)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_log_prob_checks_its_values():
    case = case_of("nested")
    guide = guide_of(case)
    values = guide.sample_posterior(2)
    with pytest.raises(ValueError, match=r"values\['tau'\]: expected shape .*got nothing"):
        guide.log_prob({name: value for name, value in values.items() if name != "tau"})
    with pytest.raises(ValueError, match=r"values\['x'\]: expected shape \(\*batch, \*\(3, 4\)\), got shape \(2, 3\)"):
        guide.log_prob({**values, "x": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"one batch shape for all sites, got \[\(2,\), \(5,\)\]"):
        guide.log_prob({**values, "mu": torch.zeros(5)})
