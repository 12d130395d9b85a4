"""When chains have draws enough: for the figures of the verdict, and for the sds of heavy tails."""

import math
import re
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.parts import location_scale
from pyro_flows.inference.chains import stopping
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.sampler import HALVINGS, STATS, Kept, Sampler
from pyro_flows.inference.chains.stopping import slowest
from pyro_flows.inference.verdict.chains import McmcDiagnostics
from pyro_flows.support.numbers import mixing
from pyro_flows.support.thresholds import ESS_OF_CHAINS, ESS_OF_CHAINS_MOST
from tests.registry import normal

CHAINS, DRAWS = 64, 128
GOOD = McmcDiagnostics(
    chains=CHAINS, draws=DRAWS, sweeps=DRAWS, r_hat=1.01, nested_r_hat=1.002, ess_bulk=2.0 * ESS_OF_CHAINS,
    ess_tail=2.0 * ESS_OF_CHAINS, where="x", divergences=0.0, energy_error=0.1, acceptance=0.9, independence=math.nan,
    agreement=math.nan, changes=0.0,
)  # fmt: skip


def normals(dim=2, chains=CHAINS, draws=DRAWS):
    return normal(chains, draws, dim, seed=0)


def sampler_with(draws):
    """A sampler of a standard normal that has kept these draws."""
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)))
    latent = Latent(location_scale(2, base="normal", diagonal=True).double(), density)
    found = Sampler.begin(
        latent, ["x[0]", "x[1]"], draws[:8, 0], chains=CHAINS, kept=DRAWS // 2, seed=0, independence=0
    )
    found.draws = Kept(draws, dict.fromkeys(STATS, draws[..., 0]))
    return found


def has_enough(sampler, figures, all_=None):
    """Whether a sampler takes its draws for enough, with figures like these of those watched, and of ``all_``."""
    sampler._figures, sampler.judged = lambda watched: all_ if watched is None and all_ else figures, None
    sampler._looked_at()
    return sampler.resolved


@pytest.mark.parametrize(("df", "kurtosis"), [(None, 3.0), (10, 4.0)])
def test_errors_of_sds(df, kurtosis):
    r"""Of S draws: :math:`\sqrt{(\kappa - 1) / (4 S)}`."""
    torch.manual_seed(0)
    draws = normals() if df is None else dist.StudentT(torch.tensor(float(df)).double()).sample((CHAINS, DRAWS, 2))
    exact = math.sqrt((kurtosis - 1.0) / (4.0 * CHAINS * DRAWS))
    torch.testing.assert_close(mixing.sd_errors(draws), torch.full((2,), exact).double(), rtol=0.2, atol=0.0)


def test_errors_of_sds_count_effective_draws():
    """Each draw eight times in a row: as few as an eighth."""
    draws = normals(draws=64)
    repeated = draws.repeat_interleave(8, 1)
    ratio = mixing.sd_errors(repeated) / mixing.sd_errors(draws)
    torch.testing.assert_close(ratio, torch.ones(2).double(), rtol=0.15, atol=0.0)
    assert mixing.sd_errors(draws[:, :3]).isnan().all()


def test_draws_that_tell_all_sds_are_enough():
    assert has_enough(sampler_with(normals()), GOOD)


def test_a_chain_that_began_far_away_is_warm_up():
    """One chain of 64 comes back from 30 sds in the first third: no R-hat tells, the sd is half too large."""
    draws = normals()
    draws[0, :40, 0] -= torch.linspace(30.0, 0.0, 40).double()
    assert float(draws[..., 0].std()) > 1.4
    sampler = sampler_with(draws)
    assert not has_enough(sampler, GOOD)
    assert len(sampler.draws) == sampler.numbers["checked"] == DRAWS // 2
    left = sampler.draws.stacked()[0]
    assert torch.equal(left, draws[:, DRAWS // 2 :])
    assert has_enough(sampler, GOOD)


def test_heavy_tails_take_more_draws(monkeypatch):
    """Some of the later draws are far out: more are asked for, until there are three times as many, and not cheap."""
    draws = normals()
    draws[::8, DRAWS // 2 :: 8, 1] *= 12.0
    sampler = sampler_with(draws)
    assert not has_enough(sampler, GOOD)
    assert len(sampler.draws) == DRAWS
    plenty = ESS_OF_CHAINS_MOST
    plenty_of_them = replace(GOOD, ess_bulk=plenty, ess_tail=plenty)
    assert not has_enough(sampler_with(draws), plenty_of_them)
    monkeypatch.setattr(stopping, "CHEAP", 0)
    assert has_enough(sampler_with(draws), plenty_of_them)
    assert not has_enough(sampler_with(draws), plenty_of_them, all_=GOOD), "others have fewer, and are waited for"


def test_a_half_that_is_clearly_better_stays_alone_where_nothing_is_waited_for(monkeypatch):
    """A chain far out in the first half, and very many effective draws; chance alone drops nothing."""
    monkeypatch.setattr(stopping, "CHEAP", 0)
    plenty = ESS_OF_CHAINS_MOST
    plenty_of_them = replace(GOOD, ess_bulk=plenty, ess_tail=plenty)
    draws = normals()
    draws[0, :40, 0] -= torch.linspace(30.0, 0.0, 40).double()
    sampler = sampler_with(draws)
    assert not has_enough(sampler, plenty_of_them)
    assert torch.equal(sampler.draws.stacked()[0], draws[:, DRAWS // 2 :])
    draws = normals()
    draws[::8, ::8, 1] *= 12.0
    draws[::8, DRAWS // 2 :: 8, 1] *= 0.9  # a little better by chance
    may_be = stopping.allowed(draws, few=False)
    error, later = (stopping.shortfall(part, may_be) for part in (draws, draws[:, DRAWS // 2 :]))
    assert max(1.0, stopping.CLEARLY * error) < later
    sampler = sampler_with(draws)
    assert has_enough(sampler, plenty_of_them)
    assert len(sampler.draws) == DRAWS


@pytest.mark.parametrize(
    ("error", "kurtosis", "gradients", "sweeps", "resolved"),
    [
        (0.019, 4.1, 99_999, 255, True),
        (0.021, 4.1, 99_999, 255, False),
        (0.039, 4.1, 100_000, 255, True),
        (0.039, 4.1, 99_999, 256, True),
        (0.041, 4.1, 100_000, 256, False),
        (0.039, 3.9, 99_999, 255, True),
        (0.041, 3.9, 99_999, 255, False),
    ],
)
def test_cheap_draws_have_to_tell_sds_of_heavy_tails_better(monkeypatch, error, kurtosis, gradients, sweeps, resolved):
    monkeypatch.setattr(mixing, "sd_errors", lambda draws: torch.tensor([0.001, error]).double())
    monkeypatch.setattr(mixing, "kurtoses", lambda draws: torch.tensor([3.0, kurtosis]).double())
    assert stopping.resolved_sds(replace(GOOD, sweeps=sweeps), normals(), gradients)[:2] == (resolved, False)


def test_a_half_does_not_go_for_lighter_tails(monkeypatch):
    """Its errors count in the same way as those of all draws, whose tails are just heavy."""
    half = DRAWS // 2
    errors = {DRAWS: 0.025, half: 0.025 * math.sqrt(2.0)}
    kurtosis = {DRAWS: 4.1, half: 3.9}
    monkeypatch.setattr(mixing, "sd_errors", lambda draws: torch.tensor([errors[draws.shape[1]]]).double())
    monkeypatch.setattr(mixing, "kurtoses", lambda draws: torch.tensor([kurtosis[draws.shape[1]]]).double())
    assert stopping.resolved_sds(GOOD, normals(dim=1), 0.0)[:2] == (False, False)


def test_effective_draws_of_the_values_themselves():
    """Each draw eight times in a row: an eighth; the slowest coordinates first."""
    draws = normals(dim=3)
    draws[..., 1] = draws[:, : DRAWS // 8, 1].repeat_interleave(8, 1)
    found = mixing.effective(draws)
    torch.testing.assert_close(found / (CHAINS * DRAWS), torch.tensor([1.0, 0.125, 1.0]).double(), rtol=0.2, atol=0.0)
    assert mixing.effective(draws[:, :3]).isnan().all()
    assert slowest(draws, 1) == [1]


def test_draws_after_a_halved_step_are_counted_as_they_will_be():
    sampler = sampler_with(normals())
    sampler.kernel.step, sampler.kernel.length = 0.05, 8.0  # 160 leaps, of which 64 may be made at most
    foreseen = sampler._gradients(10.0, 0.5)
    sampler._begin_halved()
    assert sampler._gradients(10.0) == foreseen == 2.0 * 10.0 * 32 * CHAINS


def test_chains_that_diverge_begin_anew():
    sampler = sampler_with(normals())
    sampler.numbers |= {"sweeps": 100, "fixed_at": 0}
    found = replace(sampler.figures(), sweeps=100, ess_bulk=1000.0, ess_tail=500.0)
    assert sampler.gradients_needed(found) == sampler._gradients(100.0), "200 sweeps suffice, of which 100 are done"
    assert sampler.gradients_needed(replace(found, divergences=0.01)) == sampler._gradients(200.0, 0.5)
    sampler._begin_halved()
    assert sampler.gradients_needed(replace(found, divergences=0.01)) == sampler._gradients(200.0), "no second time"
    sampler.numbers |= {"sweeps": 100, "fixed_at": 0, "halved": HALVINGS}
    assert sampler.gradients_needed(replace(found, divergences=0.01)) == sampler._gradients(100.0)


def test_kurtoses():
    """Of a normal, a uniform and a Laplace distribution."""
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    laplace = -torch.sign(u - 0.5) * torch.log1p(-2.0 * (u - 0.5).abs())
    draws = torch.stack([torch.special.ndtri(u), u, laplace], -1).reshape(10, 2000, 3)
    expected = torch.tensor([3.0, 1.8, 6.0]).double()
    torch.testing.assert_close(mixing.kurtoses(draws), expected, rtol=0.02, atol=0.0)


def test_as_many_draws_are_held_as_tell_sds():
    """256 of each chain in two dimensions, before every other one goes."""
    sampler = sampler_with(normals(draws=255))
    sampler._make_room(GOOD)
    assert len(sampler.draws) == 255
    sampler = sampler_with(normals(draws=256))
    sampler._make_room(GOOD)
    assert len(sampler.draws) == 128


def far_out(draws):
    """One chain of 64 that begins sixty sds out, and takes most of its draws to come back."""
    gone = draws.clone()
    gone[0, :, 0] += torch.linspace(60.0, 0.0, draws.shape[1]).to(gone)
    return gone


def test_an_sd_that_draws_do_not_tell_speaks_against_chains():
    draws = normals(draws=64)
    assert stopping.unresolved(draws, GOOD, ["a", "b"]) == []
    (said,) = stopping.unresolved(far_out(draws), GOOD, ["a", "b"])
    assert re.fullmatch(r"the sd of the chains at a has a Monte Carlo error of \d+%", said)
    many = replace(GOOD, ess_bulk=10.0 * ESS_OF_CHAINS, ess_tail=10.0 * ESS_OF_CHAINS)  # an sd that may not exist
    assert stopping.unresolved(far_out(draws), many, ["a", "b"]) == []
