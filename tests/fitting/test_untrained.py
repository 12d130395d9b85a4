"""A sampler before any training, training that ends where it gains nothing, and chains that have what a flow lacks."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.parts import affine_base_of, location_scale
from pyro_flows.flows.recipe import begin_at, latent_recipe, set_df
from pyro_flows.inference.chains.hmc import microcanonical
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.refine import _gone_on
from pyro_flows.inference.chains.sampler import ROUND, Sampler
from pyro_flows.inference.chains.search import visits_all
from pyro_flows.inference.chains.untrained import chains_of_gaussian
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, MissedRegion
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.training.loop import COOL, STALLED, Budget, Look, train
from pyro_flows.inference.training.trainer import Trainer
from pyro_flows.inference.verdict.chains import McmcDiagnostics, McmcDraws
from pyro_flows.support.process.progress import Bar
from tests.invariants import close
from tests.registry import normal

DIM = 60
ONES = torch.ones(DIM, dtype=torch.float64)


def bent():
    """The mean of each second coordinate is half of the square of the one before."""
    z = pyro.sample("z", dist.Normal(torch.zeros(DIM).double(), 1.0).to_event(1))
    pyro.factor("bend", 0.5 * z[1::2].square().sum() - 0.5 * (z[1::2] - 0.5 * z[::2].square()).square().sum())


def two_sided(masses, aside=0.0):
    """Independent normals, two of the first coordinate, at -3 and 3 with sds of 0.5; the second one may lie aside."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(DIM).double(), 1.0).to_event(1))
        first = torch.stack([-0.5 * ((z[0] - 3.0 * side) / 0.5) ** 2 for side in (-1.0, 1.0)])
        second = torch.stack([0.5 * z[1] ** 2 - 0.5 * (z[1] + aside) ** 2, torch.zeros_like(z[1])])
        parts = first + second + torch.tensor(masses).double().log()
        pyro.factor("sides", 0.5 * z[0] ** 2 + torch.logsumexp(parts, 0))

    return model


def attempted(model, loc, scale, **options):
    density = pf.LogDensity(model)
    names = [f"z[{i}]" for i in range(DIM)]
    return chains_of_gaussian(Start("given", loc, scale), density, names, 4000, seed=0, bar=Bar("", False), **options)


@pytest.mark.slow
def test_without_a_sampler_a_flow_is_trained(trained_in_short):
    assert len(trained_in_short.losses) > 0


@pytest.mark.slow
def test_chains_in_one_of_two_modes_do_not_pass():
    """Chains that began in the one mode agree with each other, and lack the other; only a twin is given to them."""
    loc, scale = torch.zeros(DIM).double(), ONES.clone()
    loc[0], scale[0] = 3.0, 0.5
    assert attempted(two_sided((0.35, 0.65), aside=8.0), loc, scale) is None
    both = attempted(two_sided((0.35, 0.65)), loc, scale)
    assert len(both.copies.components) == 2
    assert float((both.chains.z[..., 0] > 0.0).double().mean()) == pytest.approx(0.65, abs=0.05)
    assert float(both.chains.z[..., 0].abs().mean()) == pytest.approx(3.0, abs=0.05)
    assert attempted(lambda: pyro.sample("z", dist.Normal(loc, scale).to_event(1)), loc, scale) is not None


def test_a_sampler_that_cannot_end_in_time_is_given_up_after_a_round():
    density = pf.LogDensity(bent)
    flow = location_scale(DIM, df=60.0, diagonal=True).double()
    z = flow.draw(8)[0].detach()
    sampler = Sampler.begin(
        Latent(flow, density), [str(i) for i in range(DIM)], z, chains=64, kept=64, seed=0, independence=0
    )
    before = density.evaluations
    assert sampler.run(2000, gradients=25_000) is None
    assert sampler.numbers["sweeps"] == ROUND, "a round takes 10,000, and those after it take 24,000 at least"
    assert density.evaluations - before < 20_000


@pytest.mark.slow
def test_chains_that_diverge_are_given_up_where_gradients_do_not_suffice_for_half_of_the_step(monkeypatch):
    """It begins the draws anew, at twice the cost: before training, it is tried at once, if it can end in time."""

    def diverging(*args, **options):
        moved = microcanonical(*args, **options)
        return moved._replace(diverging=torch.arange(64) < 2)  # of 64 chains

    monkeypatch.setattr("pyro_flows.inference.chains.sampler.microcanonical", diverging)
    density = pf.LogDensity(bent)
    flow = location_scale(DIM, df=120.0, diagonal=True).double()
    start, found = flow.draw(8)[0].detach(), {}
    for patient, gradients in ((True, 150_000), (False, 80_000), (False, 150_000)):
        given = {"chains": 64, "kept": 64, "seed": 0, "independence": 0}
        sampler = Sampler.begin(Latent(flow, density), [str(i) for i in range(DIM)], start, **given)
        sampler.run(500, gradients=gradients, patient=patient)
        found[patient, gradients] = sampler
    assert found[True, 150_000].numbers["halved"] >= 1
    assert found[False, 80_000].numbers["halved"] == 0
    assert len(found[False, 80_000].draws) == 3, "4 trajectories may diverge"
    assert found[False, 150_000].numbers["halved"] >= 1
    assert found[False, 150_000].kernel.most_leaps >= 2 * found[False, 80_000].kernel.most_leaps, "as long as before"


def space(dim, written=80_000):
    """The space of chains on a density of so many coordinates, whose gradient writes so many numbers."""
    return SimpleNamespace(dim=dim, density=SimpleNamespace(written=written))


class Paced:
    """Chains that have what they are told at the end of each run, at 2,000 gradients a sweep."""

    resolved, others, latent = False, 1.0, space(100)

    def __init__(self, least):
        self.least, self.asked = iter(least), []

    def run(self, sweeps, report, *, gradients, patient):
        self.asked.append(gradients)
        ess, nested, diverged, self.resolved = next(self.least)
        self.found = McmcDiagnostics(
            chains=64, draws=64, sweeps=100, r_hat=1.0, nested_r_hat=nested, ess_bulk=2.0 * ess, ess_tail=ess,
            where="z", divergences=diverged, energy_error=0.0, acceptance=0.8, independence=math.nan,
            agreement=math.nan, changes=math.nan,
        )  # fmt: skip
        return self.found

    def figures(self):
        return replace(self.found, nested_r_hat=self.others)

    def gradients_needed(self, found):
        return 200_000.0 * (1500.0 / found.ess_tail - 1.0)


@pytest.mark.parametrize(
    ("least", "asked"),
    [
        ([(1600, 1.0, 0.0, True)], []),
        ([(800, 1.0, 0.0, False), (1600, 1.0, 0.0, True)], [300_000]),  # 175,000 needed, 600,000 in all granted
        ([(800, 1.0, 0.001, False), (1600, 1.0, 0.0, True)], [300_000]),  # the step has been halved
        ([(400, 1.0, 0.0, False), (1600, 1.0, 0.0, True)], [825_000]),
        ([(800, 1.0, 0.0, False), (300, 1.0, 0.0, False)], [300_000]),  # 800,000 more would be too many
        ([(249, 1.0, 0.0, False)], []),
        ([(800, 1.02, 0.0, False)], []),
        ([(1600, 1.0, 0.0, False), (1900, 1.0, 0.0, True)], [900_000]),  # enough draws, but not for all sds
        ([(1600, 1.0, 0.0, False), (1900, 1.0, 0.0, False)], [900_000]),
    ],
)
def test_chains_go_on_while_that_costs_less_than_a_flow(least, asked):
    sampler = Paced(least)
    first = sampler.run(0, None, gradients=300_000, patient=False)
    _gone_on(sampler, first, 300_000, Bar("", False), False)
    assert sampler.asked == [300_000, *asked]


@pytest.mark.parametrize(
    ("change", "patient", "ess", "asked"),
    [
        ({}, True, 1600, [900_000]),  # sds are waited for
        ({}, True, 800, []),  # effective draws are not
        ({"latent": space(50)}, False, 1600, [300_000]),
        ({"latent": space(100, 34_000)}, False, 1600, [2_100_000]),  # half as dear
        ({"latent": space(100, 10)}, False, 1600, [4_500_000]),
        ({"others": 1.02}, False, 1600, []),  # coordinates that were not looked at disagree
    ],
)
def test_chains_go_on_for_sds(change, patient, ess, asked):
    sampler = Paced([(ess, 1.0, 0.0, False), (2 * ess, 1.0, 0.0, True)])
    vars(sampler).update(change)
    first = sampler.run(0, None, gradients=300_000, patient=patient)
    _gone_on(sampler, first, 300_000, Bar("", False), patient)
    assert sampler.asked == [300_000, *asked]


@pytest.fixture(scope="module")
def trained_in_short():
    return pf.fit(bent, progress=False, refine=False, escalate=False, max_steps=100, draws=500)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "moves"), [("hmc", "Hamiltonian"), ("auto", "microcanonical")])
def test_moves_are_those_that_were_asked_for(method, moves, trained_in_short):
    refined = trained_in_short.refine(method, max_steps=70)
    assert refined.chains.numbers["moves"] == moves
    assert refined.refine(method, max_steps=10).chains.numbers["moves"] == moves


def trained(look):
    """Train until the functionals stand still, or the look ends it; they never stand still here."""
    density = pf.LogDensity(bent)
    flow = pf.realnvp(DIM, layers=2).double()
    return train(
        Trainer(flow, density, learning_rate=1e-3, batch=16), Budget(5000), seed=0, report=lambda *said: None, look=look
    )


@pytest.mark.slow
@pytest.mark.parametrize(("shares", "stalls", "tries"), [((0.3, 0.31), True, 2), ((0.1, 0.3, 0.31), True, 3)])
def test_training_ends_where_the_weights_get_hardly_better(shares, stalls, tries, monkeypatch):
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.level", lambda self: True)
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.stationary", lambda self: (False, "never"))
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.promises", lambda self, gap: False)
    left = iter(shares)
    asked = []

    def weigh():
        asked.append(next(left))
        return False, asked[-1]

    result = trained(Look(0.04, weigh, stalls))
    assert len(asked) == tries
    assert STALLED in result.why
    assert not result.converged
    assert len(result.losses) > tries * COOL // 2


@pytest.mark.slow
def test_without_a_sampler_it_is_tried_once_and_training_goes_on(monkeypatch):
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.level", lambda self: True)
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.stationary", lambda self: (False, "never"))
    monkeypatch.setattr("pyro_flows.inference.training.loop.Monitor.promises", lambda self, gap: False)
    asked = []

    def weigh():
        asked.append(1)
        return False, 0.3

    result = trained(Look(0.04, weigh))
    assert asked == [1]
    assert STALLED not in result.why


def test_chains_hold_what_they_go_in_and_out_of():
    density = pf.LogDensity(two_sided((0.5, 0.5)))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 100, DIM, generator=generator, dtype=torch.float64)
    side = torch.where(torch.rand(64, 100, generator=generator) < 0.5, -1.0, 1.0)
    z[..., 0] = 3.0 * side + 0.5 * z[..., 0]
    both = McmcDraws(z, {"lp": density(z.flatten(0, 1)).reshape(64, 100)}, {"superchain": torch.arange(64) // 8}, {})
    right = McmcDraws(z.clone(), both.stats, both.state, {})
    right.z[..., 0] = 3.0 + (z[..., 0] - 3.0 * side)
    loc, scale = torch.zeros(DIM).double(), ONES.clone()
    loc[0], scale[0] = -3.0, 0.5
    region = MissedRegion(loc, Start("climbed", loc, scale))
    evidence = math.log(0.5)  # two normals of sd a half, by half of the mass each
    assert visits_all(density, both, [region], evidence, seed=0)
    assert not visits_all(density, right, [region], evidence, seed=0)
    assert visits_all(density, right, [MissedRegion(loc, Start(BY_WALKERS, loc, scale))], evidence, seed=0)


@pytest.mark.parametrize("dim", [3, 250])
@pytest.mark.parametrize("name", ["realnvp", "nice", "planar"])
def test_a_look_at_an_untrained_flow_is_one_at_its_affine_map(name, dim):
    """All layers but the affine map start at the identity, so draws and their densities are the same."""
    recipe = latent_recipe(name, {}, affine="auto", base="student_t", df=15.0)
    flow = recipe.build_for_latents(dim).double()
    start = Start("given", torch.linspace(-1.0, 1.0, dim).double(), torch.linspace(0.5, 2.0, dim).double())
    affine = affine_base_of(flow)
    found = []
    for one in (flow, affine):
        begin_at(set_df(one, 30.0), start.loc, start.scale)
        torch.manual_seed(0)
        found.append(one.draw(200))
    assert len(list(affine.modules())) < len(list(flow.modules()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_correlations_of_more_than_200_latents_are_answered_at_the_start(tmp_path):
    """210 latents, each observed with its neighbor: a Gaussian with all correlations, and a file that keeps them."""
    y = normal(210, seed=5)

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
        before = torch.cat([torch.zeros_like(x[..., :1]), x[..., :-1]], -1)
        pyro.sample("y", dist.Normal(x + 0.5 * before, 0.7).to_event(1), obs=y)

    map_ = torch.eye(210, dtype=y.dtype) + 0.5 * torch.ones(209, dtype=y.dtype).diag(-1)
    precision = torch.eye(210, dtype=y.dtype) + map_.mT @ map_ / 0.49
    mean = torch.linalg.solve(precision, map_.mT @ y / 0.49)
    found = pf.fit(model, y, flow="realnvp", refine=False, progress=False)
    assert (found.verdict.status, found.method) == ("ok", "Gaussian")
    assert found.ess > 0.99 * len(found.z)
    exact = dist.MultivariateNormal(mean, precision_matrix=precision).log_prob(found.samples["x"])
    assert (found.guide.log_prob(found.samples) - exact).abs().mean() < 0.1
    found.save(tmp_path / "kept")
    kept = pf.load(tmp_path / "kept", model, y)
    close(kept.guide.log_prob(kept.samples), found.guide.log_prob(found.samples), 1e-9)
