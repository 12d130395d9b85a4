"""Chains that converged and came short of something go on; a search for what they lack begins at draws of its own."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows import LogDensity, McmcDraws
from pyro_flows.inference.chains import refine
from pyro_flows.inference.chains.judging import around
from pyro_flows.inference.chains.search import MISS, TOO_LITTLE, held_out, missed_by_chains
from pyro_flows.inference.modes import missed_modes
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, MissedRegion
from pyro_flows.inference.modes.unverified_modes import UNWEIGHED
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.support.process.stages import SEARCH_BY_CHAINS
from tests.inference.chains.test_refine import GOOD


@pytest.mark.parametrize(
    ("changed", "enough"),
    [
        ({"ess_tail": 400.0}, True),
        ({"ess_tail": 399.0}, False),
        ({"ess_bulk": math.nan}, False),
        ({"r_hat": 1.2}, True),
        ({"nested_r_hat": 1.011}, False),
        ({"divergences": 0.0002}, True),  # with half of the step
    ],
)
def test_chains_that_only_lack_draws_get_them(changed, enough):
    assert refine._only_lacks_draws(dataclasses.replace(GOOD, **changed)) == enough


def test_a_search_begins_at_chains_that_the_moments_are_not_of():
    """A normal distribution with the moments of draws is denser at these: by about D^2 / 2N nats in the mean."""
    dim, draws = 60, 10
    z = torch.randn(64, draws, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chains = McmcDraws(z, {"lp": z[..., 0]}, {"superchain": torch.arange(64) // 8}, {})
    out = held_out(chains)
    assert [int(part) for part in chains.state["superchain"][out].unique()] == [3, 7]
    flow = around(chains)
    fresh = torch.randn(2000, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        at_own, at_others, at_fresh = (
            float(flow.log_prob(points).mean()) for points in (z[~out].flatten(0, 1), z[out].flatten(0, 1), fresh)
        )
    assert at_own - at_fresh > 3.0
    assert at_others == pytest.approx(at_fresh, abs=1.5)


def test_of_few_superchains_every_fourth_chain_is_held_out():
    z = torch.zeros(8, 10, 2)
    assert held_out(McmcDraws(z, {}, {"superchain": torch.zeros(8).long()}, {})).nonzero()[:, 0].tolist() == [3, 7]


def normal_chains():
    """The density of N(0, I) in three dimensions, and chains that have converged there."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    density = LogDensity(model)
    z = torch.randn(64, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = density(z.flatten(0, 1)).detach()
    return density, McmcDraws(z, {"lp": log_p.reshape(64, 50)}, {"superchain": torch.arange(64) // 8}, {})


def test_what_chains_hold_does_not_hide_what_a_later_search_finds(monkeypatch):
    """A refined lie: a moved region that chains went through ended the search, which then missed a scale's tail."""
    density, chains = normal_chains()
    near, far = torch.zeros(3, dtype=torch.float64), torch.full((3,), 5.0, dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    monkeypatch.setattr(missed_modes, "mirrored", lambda *_: [MissedRegion(near, Start("mirrored", near, one))])
    tail = MissedRegion(far, Start(BY_WALKERS, far, one), beside=True)
    monkeypatch.setattr(missed_modes, "under_covered_region", lambda *_, **__: [tail])
    found = missed_by_chains(density, chains, lambda points: density(points), 0.0, 0.0, [], seed=0)
    assert len(found.failures) == 1
    assert found.failures[0].startswith(TOO_LITTLE)
    assert not found.stages, "draws that wandered have no place that longer chains could be held to"


@pytest.mark.parametrize("joined", [True, False])
def test_a_place_of_untold_mass_is_told_by_chains_that_begin_there(monkeypatch, joined):
    """A thousand local latents took twice as long, and a flow: Hessians were too dear to weigh a place of no mass."""
    density, chains = normal_chains()
    far = torch.full((3,), 5.0, dtype=torch.float64)

    def climbed(guide, modes, z, log_q, unresolved, *, seed):
        unresolved.append(MissedRegion(far, Start("mode", far, torch.ones(3, dtype=torch.float64))))
        return []

    monkeypatch.setattr(missed_modes, "climbed", climbed)
    for name in ("surveyed", "under_covered_region"):
        monkeypatch.setattr(missed_modes, name, lambda *_, **__: [])
    asked = []

    def come_to_the_others(sampler, places):
        asked.append(places)
        return joined

    monkeypatch.setattr("pyro_flows.inference.chains.search.mixes_with_others", come_to_the_others)
    given = (lambda points: density(points), 0.0, 0.0, [])
    found = missed_by_chains(density, chains, *given, seed=0, sampler="some")
    assert found.notes == ([] if joined else [UNWEIGHED])
    assert not found.failures
    assert torch.equal(asked[0], far[None])


def test_a_region_that_is_known_to_hold_next_to_nothing_need_not_be_visited(monkeypatch):
    """An alarm: the covered mass is far below the evidence where a guide hardly overlaps with a funnel.

    So the top of the funnel, where no draw is, looked like a mode with all of the mass. Here a place has 2e-9 of it.
    """
    far, size = torch.full((3,), 5.0, dtype=torch.float64), torch.full((3,), 0.2, dtype=torch.float64)

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        own, there = (dist.Normal(*at).log_prob(x).sum(-1) for at in ((0.0, 1.0), (far, size)))
        pyro.factor("place", torch.logaddexp(own, there - 20.0) - own)

    density, chains = LogDensity(model), normal_chains()[1]
    monkeypatch.setattr(missed_modes, "mirrored", lambda *_: [MissedRegion(far, Start("mode", far, size))])
    for evidence, failures in ((0.0, 0), (-20.0, 1)):
        found = missed_by_chains(density, chains, lambda points: density(points), 0.0, evidence, [], seed=0)
        assert len(found.failures) == failures


@pytest.mark.parametrize(("place", "held"), [(0.0, True), (30.0, False)])
def test_later_chains_are_held_to_what_earlier_ones_lacked(monkeypatch, place, held):
    """Without this a second search that fails to find the mode again would make the verdict a lie."""
    density, chains = normal_chains()
    at, one = torch.full((3,), place, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    far = torch.full((3,), 30.0, dtype=torch.float64)
    monkeypatch.setattr(missed_modes, "mirrored", lambda *_: [MissedRegion(far, Start("mirrored", far, one))])
    given = (density, chains, lambda points: density(points), 0.0, 0.0)
    first = missed_by_chains(*given, [], seed=0)
    assert [said.startswith(MISS) for said in first.failures] == [True]
    (stage,) = first.stages
    assert stage.stage == SEARCH_BY_CHAINS
    assert stage.details["places"] == [far.tolist()]
    monkeypatch.setattr(missed_modes, "mirrored", lambda *_: [])
    entry = stage.as_dict()
    entry["details"] = {**entry["details"], "places": [at.tolist()]}  # as if the chains went there
    again = missed_by_chains(*given, [entry], seed=0)
    assert again.failures == ([] if held else first.failures)
