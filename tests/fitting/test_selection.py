"""Races: which starts enter, and which of them wins."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest

import pyro_flows as pf
from pyro_flows.fitting import flow_training
from pyro_flows.starts.gaussians import standard
from tests.models import real

BEST = replace(
    standard(pf.LogDensity(lambda: pyro.sample("x", dist.Normal(real([0.0, 0.0]), 1.0).to_event(1)))), elbo=0.0
)
OTHERS = {
    "no wider": (0.9, 0.0, -1.0, False),
    "next to the same": (1.3, 0.5, -1.0, False),
    "wider": (3.0, 0.0, -1.0, True),
    "as wide nearly, and elsewhere": (1.01, 3.0, -1.0, True),
    "too low": (3.0, 0.0, -13.0, False),
}


@pytest.mark.parametrize("case", OTHERS)
def test_only_starts_that_are_wider_and_elsewhere_are_raced(case):
    """Of the seventeen posteriors, races took 100 steps for starts next to the best one, and gained nothing."""
    scale, away, elbo, raced = OTHERS[case]
    other = replace(BEST, loc=BEST.loc + away, scale=scale * BEST.scale, elbo=elbo)
    assert (flow_training._wider(BEST, [other]) == [other]) is raced


def test_the_widest_of_those_that_are_close_is_raced():
    others = [replace(BEST, scale=scale * BEST.scale, elbo=-2.0) for scale in (3.0, 5.0, 4.0)]
    assert flow_training._wider(BEST, others) == [others[1]]
    assert flow_training._wider(BEST, []) == []


@pytest.mark.parametrize(("scale", "entrants"), [(1.0, 1), (8.0, 2)])
def test_entrants_of_a_race(scale, entrants):
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(real([0.0, 0.0]), 1.0).to_event(1)))
    flow = pf.realnvp(2, layers=2, seed=0).double()
    best = replace(BEST, elbo=-0.1)
    other = replace(best, scale=scale * best.scale, elbo=-1.0)
    winner, done = flow_training.race(flow, density, [best, other], 5, seed=0, extra=())
    assert len(done) == entrants
    assert winner.elbo == max(entrant.elbo for entrant in done)
