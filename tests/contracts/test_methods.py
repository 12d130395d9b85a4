"""What each method of ``fit`` promises: the right posterior, draws that follow their density, and an end."""

from __future__ import annotations

import functools

import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting.methods import METHODS
from pyro_flows.inference.verdict import methods
from tests.contracts.posteriors import KNOWN

DRAWN = 20_000
pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
ALL = [pytest.param(name, marks=pytest.mark.slow if known.slow else ()) for name, known in KNOWN.items()]
WITH_DENSITY = [case for case in ALL if case.values[0] != methods.MCMC]


@functools.cache
def fitted(name: str) -> pf.Posterior:
    """A fit of the model that this method answers, made once in a process."""
    return pf.fit(KNOWN[name].model, *KNOWN[name].args, seed=1, progress=False)


def test_each_method_has_a_model():
    tried = {method.name for method in METHODS if method.name in methods.METHODS}
    assert tried | {methods.TABULATED} == set(KNOWN)  # a table of one coordinate comes with those of several


@pytest.mark.parametrize("name", ALL)
def test_it_answers_and_is_right(name):
    known, posterior = KNOWN[name], fitted(name)
    assert posterior.method == name
    assert posterior.verdict.status != "unreliable", posterior.verdict
    for site, (mean, sd) in known.moments.items():
        values = posterior.samples[site].double()
        assert float(((values.mean(0) - mean) / sd).abs().max()) < 0.1
        assert float((values.std(0) / sd).log().abs().max()) < 0.1


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_it_has_the_evidence(name):
    assert fitted(name).log_evidence == pytest.approx(KNOWN[name].evidence, abs=0.03)


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_draws_follow_their_density(name):
    """By Stein's identity: E[d log q / dz_i] = 0 and E[(z_i - c_i) d log q / dz_i] = -1, for any c."""
    flow = fitted(name).flow
    torch.manual_seed(0)
    z, log_q = flow.draw(DRAWN)
    z = z.detach().requires_grad_()
    again = flow.log_prob(z)
    torch.testing.assert_close(again.detach(), log_q, rtol=1e-4, atol=1e-4)
    (score,) = torch.autograd.grad(again.sum(), z)
    away = (z - z.mean(0)).detach()
    for terms in (score * away.std(0), 1.0 + score * away):
        error = terms.std(0) / DRAWN**0.5
        assert float((terms.mean(0) / error).abs().max()) < 4.5


@pytest.mark.parametrize("name", ALL)
def test_it_ends_within_its_budget(name):
    assert fitted(name).settings["gradient_evaluations"] <= KNOWN[name].gradients
