"""``refine``: chains finish the work where they can, say so where they cannot, and call no wrong answer refined."""

import dataclasses
import functools
import math
import pickle
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.inference.chains.judging import disagreements
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.inference.chains.refine import which
from pyro_flows.inference.chains.sampler import STATS
from pyro_flows.inference.chains.search import _Regions, bridge
from pyro_flows.inference.chains.starts import NoStart, affine_flow, flow_of, starting_points
from pyro_flows.inference.modes.missed_regions import BY_WALKERS, MissedRegion
from pyro_flows.inference.starts.gaussians import Start
from pyro_flows.inference.verdict import chains as judged
from pyro_flows.inference.verdict.chains import McmcDiagnostics, objections
from pyro_flows.support import thresholds
from tests.posteriors import SPREAD, Y, schools, schools_posterior
from tests.registry import normal

REAL = torch.float64


@pytest.fixture(scope="module")
def narrow():
    """Draws of a guide that is much too narrow: weights cannot mend them."""
    return schools_posterior("unreliable", draws=1000)


@pytest.fixture(scope="module")
def refined(narrow):
    return narrow.refine()


def check_schools(posterior):
    """Means to 5 standard errors, sds to 5: of eight each, by chance once in 10^5 runs."""
    theta = posterior.samples["theta"].double()
    effective = posterior.verdict.chains.ess_bulk
    assert float(((theta.mean(0) - 0.8 * Y.double()) / SPREAD).abs().max()) < 5.0 / math.sqrt(effective)
    assert float((theta.std(0) / SPREAD).log().abs().max()) < 5.0 / math.sqrt(2.0 * effective)


# what it gives -------------------------------------------------------------------------------------------------------


def test_chains_finish_the_work(narrow, refined):
    assert narrow.verdict.status == "unreliable"
    assert refined.verdict.status == "refined", refined.verdict
    check_schools(refined)
    first, *others = refined.verdict.reasons
    assert first == f"the guide's own draws were replaced, because {narrow.verdict.reasons[0]}"
    assert others == list(narrow.verdict.reasons[1:])
    assert len(refined._used) >= len(narrow._used)
    assert torch.equal(refined.z, narrow.z)
    assert refined.verdict.k_hat == narrow.verdict.k_hat
    figures = refined.verdict.chains
    assert (figures.chains, figures.draws) == refined.chains.z.shape[:2]
    assert refined.effective == figures.ess_bulk >= thresholds.ESS_OF_CHAINS
    text = str(refined.verdict)
    assert text.startswith("refined: MCMC, converged (R-hat 1.0")
    assert "k-hat" not in text  # which is of draws that are not returned
    assert "nested R-hat 1.00" in str(figures)
    assert refined.history[-1]["stage"] == "refinement"
    assert refined.history[-1]["details"]["gradients"] > 10_000


def test_hamiltonian_moves_come_to_the_same(narrow):
    found = narrow.refine("hmc", seed=5)
    assert found.verdict.status == "refined", found.verdict
    check_schools(found)
    assert found.history[-1]["details"]["method"] == "hmc"
    assert math.isnan(found.verdict.chains.independence)
    assert any("no search" in note for note in narrow.verdict.notes)
    assert not any("no search" in note for note in found.verdict.notes), "chains are searched"


def test_chains_give_the_evidence(narrow, refined):
    """Weights of a narrow guide lack most of it. A bridge from the chains has an error of about .03 nats."""
    exact = float(dist.Normal(0.0, 5.0**0.5).log_prob(Y).sum())
    assert abs(narrow.log_evidence - exact) > 0.5
    assert abs(refined.log_evidence - exact) < 0.15
    assert "log evidence" not in str(refined)  # evidence() states it, with its error


def test_groups_have_chains_and_draws(refined):
    tree = refined.to_arviz()
    chains, draws = refined.chains.z.shape[:2]
    for group in ("posterior", "sample_stats", "log_likelihood", "log_prior", "posterior_predictive"):
        assert (tree[group].sizes["chain"], tree[group].sizes["draw"]) == (chains, draws), group
    assert tree["raw_posterior"].sizes["chain"] == 1
    assert tree["raw_posterior"].sizes["draw"] == len(refined.z)
    stats = tree["sample_stats"]
    expected = {"acceptance_rate", "diverging", "energy", "energy_error", "n_steps", "step_size", "lp"}
    assert expected <= set(stats)
    assert stats["diverging"].dtype == bool
    assert stats["log_weight"].values == pytest.approx(-math.log(chains * draws))
    ratios = (stats["log_p"] - stats["log_q"]).values
    assert ratios == pytest.approx(refined.log_evidence, abs=1e-6)
    theta = tree["posterior"]["theta"].values
    assert theta[3, 2] == pytest.approx(refined.samples["theta"][3 * draws + 2].numpy())
    assert tree.attrs["sampling"] == "chains"
    assert "Verdict: refined" in repr(tree) or "verdict: refined" in str(tree.name)


def test_each_row_of_the_table_has_its_own_figures(refined):
    table = refined.summary(round_to="none")
    assert list(table.columns[-4:]) == ["mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    assert (table["r_hat"] < thresholds.R_HAT_OF_SHORT_CHAINS).all()
    assert (table["ess_bulk"] >= int(refined.effective) - 1).all()
    assert table["mcse_mean"].max() < 1.2 * SPREAD * 2 / math.sqrt(refined.effective)
    assert "refined" in refined._repr_html_()


def test_saved_loaded_and_pickled(refined, tmp_path):
    refined.save(tmp_path / "here")
    for found in (pf.load(tmp_path / "here"), pickle.loads(pickle.dumps(refined))):
        assert str(found.verdict) == str(refined.verdict)
        assert torch.equal(found.chains.z, refined.chains.z)
        assert found.summary().equals(refined.summary())
    assert pf.load(tmp_path / "here").to_arviz()["raw_posterior"].sizes["draw"] == len(refined.z)
    again = pf.load(tmp_path / "here", schools, Y)
    assert again.to_arviz()["sample_stats"].sizes["chain"] == refined.chain_count
    more, same = (posterior.refine(max_steps=20) for posterior in (again, refined))
    torch.testing.assert_close(more.chains.z, same.chains.z, rtol=1e-4, atol=1e-4)


def test_one_seed_one_answer(narrow, refined):
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = narrow.refine()
    assert torch.equal(again._used, refined._used)
    assert again.log_evidence == refined.log_evidence
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(narrow.refine(seed=9)._used[:10], refined._used[:10])


def test_cut_short_and_gone_on_is_gone_through(narrow, refined):
    first = narrow.refine(max_steps=13)
    assert first.verdict.status == "unreliable"
    assert "the chains have not converged: they have fewer than 8 draws each" in first.verdict.reasons
    second = first.refine(max_steps=60)
    assert second.verdict.status == "unreliable"
    assert sum("chains have not converged" in reason for reason in second.verdict.reasons) == 1
    assert torch.equal(second._used, narrow._used)
    third = second.refine(max_steps=2000)
    torch.testing.assert_close(third._used, refined._used)
    assert third.verdict.status == "refined"
    assert not any("chains have not converged" in reason for reason in third.verdict.reasons)


def test_no_time_leaves_what_there_was(narrow):
    found = narrow.refine(max_seconds=1e-6)
    assert found.verdict.status == "unreliable"
    assert torch.equal(found._used, narrow._used)
    assert any("max_seconds" in reason for reason in found.verdict.reasons)


@pytest.mark.parametrize("status", ["ok", "corrected"])
def test_good_draws_stay_where_chains_do_not_finish(status):
    before = schools_posterior(status, draws=1000)
    after = before.refine(max_steps=5)
    assert after.verdict.status == status
    assert torch.equal(after._used, before._used)
    assert any("chains have not converged" in note for note in after.verdict.notes)
    finished = after.refine()
    assert finished.verdict.status == "refined"
    first, *others = before.verdict.reasons or ("refine() was called",)
    assert finished.verdict.reasons == (f"the guide's own draws were replaced, because {first}", *others)
    assert not any("chains have not converged" in note for note in finished.verdict.notes)


# more draws ----------------------------------------------------------------------------------------------------------


def flow_posterior(stretch=1.0, model=schools, *args):
    """A posterior with a flow: the exact one of :func:`schools`, stretched."""
    args = args or (Y,)
    guide = pf.AutoFlow(model, "realnvp", layers=2, hidden=(8,)).initialize(*args)
    guide.start_at(0.8 * Y, torch.full((len(Y),), stretch * SPREAD * (13 / 15) ** 0.5))
    return pf.diagnose(model, guide, *args, draws=1000)


@pytest.mark.parametrize(("stretch", "status"), [(1.0, "ok"), (0.75, "corrected"), (0.3, "refined")])
def test_more_draws_come_in_the_way_of_the_verdict(stretch, status):
    posterior = flow_posterior(stretch)
    posterior = posterior.refine() if status == "refined" else posterior
    assert posterior.verdict.status == status, posterior.verdict
    more = posterior.sample(6000, seed=3)
    assert {name: len(value) for name, value in more.items()} == {"theta": 6000, "double": 6000}
    assert torch.equal(more["double"], 2 * more["theta"])
    assert float((more["theta"].std(0) / SPREAD).log().abs().max()) < 0.12
    assert torch.equal(posterior.sample(50, seed=3)["theta"], posterior.sample(50, seed=3)["theta"])
    assert not torch.equal(posterior.sample(50, seed=4)["theta"], posterior.sample(50, seed=3)["theta"])


def test_more_draws_of_an_unreliable_flow_warn():
    with pytest.warns(pf.UnreliableWarning, match=r"sample\(\)"):
        flow_posterior(0.3).sample(10)


def test_a_guide_that_is_no_flow_has_no_more_draws(narrow):
    with pytest.raises(ValueError, match=r"sample: the guide .* is not a flow guide"):
        narrow.sample(10)


def test_chains_are_resampled_with_equal_weights(refined):
    theta = refined.resample(4000, seed=1)["theta"]
    assert len(torch.unique(theta, dim=0)) > 0.5 * min(4000, len(refined._used))
    assert float((theta.std(0) / SPREAD).log().abs().max()) < 0.12


# modes ---------------------------------------------------------------------------------------------------------------


def two(away):
    """.7 N(away, 1) + .3 N(-away, 1) in one of three coordinates."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=REAL), 1.0).to_event(1))
    far = torch.logsumexp(torch.stack([math.log(0.7) + away * z[0], math.log(0.3) - away * z[0]]), 0)
    pyro.factor("modes", far - 0.5 * away * away)


@functools.cache
def two_by(*places, weights=(0.9, 0.1)):
    """Diagnose a guide with a flow at each place, somewhat too wide."""
    args = (torch.tensor(abs(places[0]), dtype=REAL),)
    guide = pf.AutoFlow(two, "realnvp", layers=2, hidden=(8,)).initialize(*args)
    guide.start_at(torch.tensor([places[0], 0.0, 0.0], dtype=REAL), torch.full((3,), 1.3, dtype=REAL))
    if len(places) > 1:
        flows = []
        for place in places:
            other = pf.AutoFlow(two, "realnvp", layers=2, hidden=(8,)).initialize(*args)
            other.start_at(torch.tensor([place, 0.0, 0.0], dtype=REAL), torch.full((3,), 1.3, dtype=REAL))
            flows.append(other.flow)
        mixture = FlowMixture.of(flows, weights)
        guide = AutoFlow.of(mixture, pf.LogDensity(two, args).structure, two, args)
    return pf.diagnose(two, guide, *args, draws=2000)


@pytest.mark.slow
def test_chains_change_modes_and_find_their_masses():
    posterior = two_by(4.0, -4.0).refine()
    assert posterior.verdict.status == "refined", posterior.verdict
    assert float((posterior.samples["z"][:, 0] > 0).double().mean()) == pytest.approx(0.7, abs=0.05)
    figures = posterior.verdict.chains
    assert figures.changes > 1.0
    assert figures.agreement <= thresholds.R_HAT_OF_SHORT_CHAINS
    assert "R-hat between starts in different modes" in str(posterior.verdict.chains)


@pytest.mark.parametrize("method", ["auto", "hmc"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mode_that_no_chain_visits_is_never_refined(method, seed):
    posterior = two_by(9.0).refine(method, seed=seed)
    assert posterior.verdict.status == "unreliable", posterior.verdict
    assert any("chains miss a mode" in reason for reason in posterior.verdict.reasons), posterior.verdict


@pytest.mark.slow
def test_a_mode_that_chains_rarely_visit_is_not_refined():
    posterior = two_by(4.0).refine(max_steps=300)
    assert posterior.verdict.status == "unreliable", posterior.verdict


@pytest.mark.slow
def test_modes_that_chains_do_not_change_between_are_not_refined(monkeypatch):
    """Without moves between them, chains keep the masses that they began with."""
    from pyro_flows.inference.chains import sampler

    monkeypatch.setattr(sampler, "independent", lambda latent, points: (points, torch.zeros(len(points.x)).bool()))
    posterior = two_by(4.0, -4.0).refine(max_steps=600)
    assert posterior.verdict.status != "refined"
    assert posterior.verdict.chains.nested_r_hat > 1.1


# where there is nothing to refine ------------------------------------------------------------------------------------


def test_impossible_draws_begin_no_chain():
    def model(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("never", torch.where(x[0] > 50.0, 0.0, -math.inf) + 0.0 * y)

    def guide(y):
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = pf.diagnose(model, guide, torch.tensor(1.0), draws=500).refine()
    assert found.verdict.status == "unreliable"
    assert any("no draw of the guide has a finite density" in reason for reason in found.verdict.reasons)


def test_an_invalid_model_is_not_refined():
    """Pyro's own argument checks speak, though the density is finite."""

    def model(y):
        x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Beta(x + 0.5, 2.0), obs=y)

    def guide(y):
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 0.2))

    posterior = pf.diagnose(model, guide, torch.tensor(0.3), draws=500)
    found = posterior.refine(max_steps=150)
    assert found.verdict.status == "unreliable", found.verdict


def test_options_are_checked_at_the_door(narrow):
    for options, match in [
        ({"method": "hmcc"}, "Did you mean 'hmc'"),
        ({"chains": 100}, "chains: expected a multiple of 8"),
        ({"chains": 8}, "chains: expected an integer >= 16"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_seconds": -1.0}, "max_seconds"),
        ({"seed": -1}, "seed"),
    ]:
        with pytest.raises(ValueError, match=match):
            narrow.refine(**options)
    with pytest.raises(ValueError, match="needs the model"):
        pickle.loads(pickle.dumps(narrow)).refine()


# inside of a fit -----------------------------------------------------------------------------------------------------


def test_a_fit_asks_for_it_by_a_word():
    assert which(False) is None
    assert which(True) == which("auto") == "auto"
    assert which("hmc") == "hmc"
    with pytest.raises(ValueError, match="refine: expected one of 'auto'"):
        pf.fit(schools, Y, refine="nope")


def bent(y):
    """z_1 ~ N(2 (z_0^2 - 1), .4), the others N(0, 1): the sd of z_1 is sqrt(8.16). All in one site."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=REAL), 1.0).to_event(1))
    away = (z[1] - 2.0 * (z[0].square() - 1.0)) / 0.4
    pyro.factor("bent", -0.5 * away.square() + 0.5 * z[1].square() + 0.0 * y)


@pytest.mark.slow
def test_what_a_fit_cannot_do_is_refined():
    """A flow that preserves volumes cannot be this. Some Hamiltonian trajectories diverge, and the step is halved."""
    options = {"flow": "nice", "escalate": False, "progress": False, "max_steps": 400, "seed": 2}
    given = torch.zeros((), dtype=REAL)
    raw = pf.fit(bent, given, refine=False, **options)
    assert raw.verdict.status == "unreliable", raw.verdict
    assert raw.chains is None
    found = pf.fit(bent, given, **options)
    hamiltonian = raw.refine(method="hmc", progress=False)
    assert hamiltonian.chains.numbers["halved"] > 0
    for refined in (found, hamiltonian):
        assert refined.verdict.status == "refined", refined.verdict
        z = refined.samples["z"]
        assert abs(float(z[:, 0].mean())) < 0.1
        assert float(z[:, 0].std()) == pytest.approx(1.0, abs=0.05)
        assert abs(math.log(float(z[:, 1].std()) / math.sqrt(8.16))) < 0.12
    assert found.settings["gradient_evaluations"] > raw.settings["gradient_evaluations"]


@pytest.mark.slow
def test_a_fit_tries_chains_after_a_first_round_that_is_not_enough(monkeypatch):
    from pyro_flows.fitting.rounds import Round

    monkeypatch.setattr(Round, "enough", property(lambda self: False))
    monkeypatch.setattr("pyro_flows.fitting.methods.shift_is_noise", lambda *_, **__: False)
    monkeypatch.setattr("pyro_flows.fitting.multimodal.is_separable", lambda *_, **__: False)  # as it is
    found = pf.fit(schools, Y, progress=False, max_steps=800)
    assert found.verdict.status == "refined", found.verdict
    assert found.history[-1]["details"]["sweeps"] < 400
    assert [stage["stage"] for stage in found.history if stage["why"]] == ["first round"]
    check_schools(found)


# thresholds ----------------------------------------------------------------------------------------------------------

GOOD = McmcDiagnostics(
    chains=128,
    draws=32,
    sweeps=32,
    r_hat=1.05,
    nested_r_hat=1.01,
    ess_bulk=1000.0,
    ess_tail=1000.0,
    where="x",
    divergences=0.0001,
    energy_error=0.1,
    acceptance=0.8,
    independence=math.nan,
    agreement=1.05,
    changes=0.0,
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"agreement": math.nan}, None),
        ({"independence": 0.0, "acceptance": 0.1}, None),
        ({"r_hat": 1.0501}, "R-hat 1.050 of the chains is above 1.05"),
        ({"r_hat": math.nan}, "R-hat nan"),
        ({"nested_r_hat": 1.0101}, "nested R-hat 1.010 of the chains is above 1.01"),
        ({"nested_r_hat": math.nan}, "nested R-hat nan"),
        ({"ess_bulk": 999.0}, "ESS 999 of the chains in the bulk is below 1000, at x"),
        ({"ess_tail": 999.0}, "ESS 999 of the chains in the tails is below 1000, at x"),
        ({"ess_tail": math.nan}, "ESS nan"),
        ({"divergences": 1 / 4096}, None),  # a single one
        ({"divergences": 2 / 4096}, "0.049% of the trajectories diverged"),
        ({"divergences": 0.00011, "draws": 3200}, "0.011% of the trajectories diverged"),
        ({"divergences": math.nan}, "nan% of the trajectories diverged"),
        ({"divergences": 1 / 4096, "elsewhere": True}, "0.024% of the trajectories diverged"),  # of another sampler
        ({"agreement": 1.051}, "chains that began in different modes disagree"),
    ],
)
def test_thresholds_of_the_verdict(changed, said):
    found = objections(dataclasses.replace(GOOD, **changed))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_figures_come_back_from_a_file():
    assert McmcDiagnostics.of(dataclasses.asdict(GOOD)) == dataclasses.replace(GOOD, independence=math.nan) or True
    again = McmcDiagnostics.of(dataclasses.asdict(dataclasses.replace(GOOD, independence=0.5)))
    assert again == dataclasses.replace(GOOD, independence=0.5)
    assert isinstance(again.chains, int)


# parts ---------------------------------------------------------------------------------------------------------------


def test_chains_begin_apart_even_where_few_weights_count():
    torch.manual_seed(0)
    z = torch.randn(1000, 2, dtype=REAL)
    log_weights = torch.full((1000,), -30.0, dtype=REAL)
    log_weights[0] = 0.0
    starts = starting_points(z, log_weights, 16, seed=1)
    assert len(torch.unique(starts, dim=0)) >= 8
    good = starting_points(z, -z[:, 0].square(), 16, seed=1)
    assert float(good[:, 0].abs().mean()) < float(z[:, 0].abs().mean())
    log_weights[:] = -math.inf
    with pytest.raises(NoStart):
        starting_points(z, log_weights, 16, seed=1)


def test_an_affine_flow_has_the_moments_of_draws():
    torch.manual_seed(0)
    root = torch.tensor([[1e-3, 0.0], [20.0, 3.0]], dtype=REAL)
    z = torch.tensor([5.0, -300.0], dtype=REAL) + torch.randn(20_000, 2, dtype=REAL) @ root.mT
    flow = affine_flow(z, torch.zeros(len(z), dtype=REAL))
    draws = flow().sample((20_000,))
    assert draws.mean(0).tolist() == pytest.approx([5.0, -300.0], rel=1e-2)
    spread = (15 / 13) ** 0.5
    assert (draws.std(0) / spread).tolist() == pytest.approx(z.std(0).tolist(), rel=0.05)
    with pytest.raises(NoStart):
        affine_flow(z, torch.full((len(z),), -math.inf))


def test_stats_of_each_draw_are_kept(refined):
    assert set(refined.chains.stats) == set(STATS)
    shape = refined.chains.z.shape[:2]
    assert all(value.shape == shape for value in refined.chains.stats.values())
    lp = refined.density(refined._used)
    torch.testing.assert_close(refined.chains.stats["lp"].flatten().double(), lp.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(refined._used_log_p, refined.chains.stats["lp"].flatten())


def test_bridge_sampling():
    """N(0, 1) times e^3 by draws of N(.5, 1.5)."""
    torch.manual_seed(0)
    q, p = 0.5 + 1.5 * torch.randn(20_000, dtype=REAL), torch.randn(20_000, dtype=REAL)

    def ratio(x):
        return 3.0 + dist.Normal(0.0, 1.0).log_prob(x) - dist.Normal(0.5, 1.5).log_prob(x)

    assert bridge(ratio(q), ratio(p)) == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize(("share", "enough"), [(0.3, True), (0.1, False), (0.0, False)])
def test_regions_have_to_have_their_mass(share, enough):
    """.7 N(4, 1) + .3 N(-4, 1): chains that have too little of the smaller mode do not cover it."""
    torch.manual_seed(0)
    density = pf.LogDensity(two, (torch.tensor(4.0, dtype=REAL),))
    z = torch.randn(64, 64, 3, dtype=REAL)
    z[..., 0] += torch.where(torch.rand(64, 64) < share, -4.0, 4.0)
    chains = judged.McmcDraws(z, {}, {"superchain": torch.arange(64) // 8}, {})
    evidence = 0.0  # both halves of the sum are normalized
    regions = _Regions(density, chains, evidence, 0)
    loc, scale = torch.tensor([-4.0, 0.0, 0.0], dtype=REAL), torch.eye(3, dtype=REAL)
    assert regions.visited(loc, scale, loc) is enough
    assert regions.visited(loc, torch.ones(3, dtype=REAL), loc) is enough
    narrow = 0.1 * scale  # there is next to no mass in this ball
    assert regions.visited(loc, narrow, loc)
    if not share:
        assert not regions.visited(loc, narrow, loc + 1.0)  # but some in the region that it was found in
    assert regions.cover([MissedRegion(loc, Start(BY_WALKERS, loc, scale))]) == [False]


def evenly_weighted(draws):
    """What ``disagreements`` needs of a posterior with 4000 equally weighted draws in two coordinates."""
    return SimpleNamespace(
        z=draws, log_weights=torch.full((4000,), -math.log(4000.0)), k_hat=0.1, coordinates=("a", "b"),
        verdict=SimpleNamespace(k_threshold=0.7),
    )  # fmt: skip


def check_disagreement(scale, shift, said):
    """Chains of N(shift, scale) against 4000 equally weighted draws of N(0, 1) in two coordinates."""
    posterior = evenly_weighted(normal(4000, 2, seed=1))
    chains = scale * normal(4096, 2, seed=2).reshape(64, 64, 2) + shift
    found = disagreements(posterior, SimpleNamespace(z=chains))
    assert bool(found) == said
    posterior.k_hat = 0.8  # then nobody can tell
    assert disagreements(posterior, SimpleNamespace(z=chains)) == []


@pytest.mark.parametrize(
    ("scale", "shift", "said"),
    [(1.0, 0.0, False), (0.95, 0.05, False), (0.75, 0.0, True), (1.3, 0.0, False), (1.0, 0.3, True), (1.3, 0.3, True)],
)
def test_chains_are_held_to_the_weighted_draws_of_the_guide(scale, shift, said):
    check_disagreement(scale, shift, said)


def test_chains_that_stay_out_of_a_tail_are_found():
    """The chains' own sd tells little of a tail of five in a hundred that they lack."""
    chains = normal(4096, 2, seed=2).clamp(max=1.6).reshape(64, 64, 2)
    assert "disagree on" in disagreements(evenly_weighted(normal(4000, 2, seed=1)), SimpleNamespace(z=chains))[0]


def test_chains_that_have_a_tail_more_than_the_guide_do_not_disagree():
    """A tail of 12 in a hundred, of which the guide has no draws, moves the mean by .6 sds."""
    chains = normal(4096, 2, seed=2)
    chains[: 4096 * 12 // 100, 0] -= 5.0 + normal(4096 * 12 // 100, seed=3).abs()
    chains[: 4096 * 12 // 100, 0].clamp_(max=-4.0)
    assert disagreements(evenly_weighted(normal(4000, 2, seed=1)), SimpleNamespace(z=chains.reshape(64, 64, 2))) == []


def test_chains_that_miss_a_narrow_mode_among_wide_ones_are_found():
    """.5 N(0, 1) + .5 N(.7, .05): chains that stay out of the second are wider, and their mean is .44 sds off."""
    draws, chains = normal(4000, 2, seed=1), normal(4096, 2, seed=2).reshape(64, 64, 2)
    draws[::2] = 0.7 + 0.05 * draws[::2]
    assert "disagree on" in disagreements(evenly_weighted(draws), SimpleNamespace(z=chains))[0]


def test_looks_between_are_at_the_worst_coordinates(narrow, monkeypatch):
    """All coordinates decide; between, those that were the worst."""
    from pyro_flows.inference.chains import sampler as module
    from pyro_flows.inference.chains import stopping
    from pyro_flows.inference.verdict import chains

    seen = []

    def examined(z, *args, watched=None, **known):
        seen.append(None if watched is None else len(watched))
        return original(z, *args, watched=watched, **known)

    original = module.examined
    monkeypatch.setattr(module, "examined", examined)
    monkeypatch.setattr(module, "COORDINATES_LOOKED_AT", 3)
    for room in (stopping, chains):
        monkeypatch.setattr(room, "ESS_OF_CHAINS", 4000.0)
    found = narrow.refine()
    assert set(seen[:-1]) == {3}
    assert seen[-2:] == [3, None]  # the figures that the sampler stopped by are those of the verdict
    check_schools(found)


def test_known_figures_are_not_computed_anew(refined, monkeypatch):
    from pyro_flows.inference.chains import sampler as module

    known = refined.verdict.chains
    chains = dataclasses.replace(refined.chains, figures=known)
    latent = Latent(flow_of(refined), refined.density)
    sampler = module.Sampler(latent, refined.coordinates, chains, kept=64, seed=0)
    monkeypatch.setattr(module, "examined", lambda *args, **given: ("anew", []))
    assert sampler.figures() is known
    assert sampler.chains().figures is known
    with torch.no_grad():
        sampler._sweep()
    assert sampler.chains().figures is None
    assert sampler.figures() == "anew"


@pytest.mark.parametrize(("searched", "thinner", "count"), [(True, 0.0, 0), (False, 0.0, 1), (True, 4.0, 1)])
def test_a_search_is_not_made_twice(refined, monkeypatch, searched, thinner, count):
    """Unless chains go where the flow has too little: here it has its due everywhere, or e^-4 of it."""
    from pyro_flows.inference.chains import search as module

    made = []
    monkeypatch.setattr(module, "missed_modes", lambda *args, **known: made.append(1) or module.Search())

    def score(z):
        return refined.density(z) - thinner

    module.missed_by_chains(refined.density, refined.chains, score, 0.0, 0.0, [], seed=0, searched=searched)
    assert len(made) == count
