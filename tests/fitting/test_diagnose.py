"""The verdict for any Pyro guide: densities by hand, the autoguides, what has no density, seeds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import init_to_value
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.fitting import programs
from pyro_flows.inference.modes.missed_modes import Search
from tests.posteriors import SCHOOLS, SPREAD, Y, line, line_guide, schools, schools_guide

DRAWS = 300


def mixed(y):
    """Latents on four kinds of support."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    with pyro.plate("pair", 2):
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


ZERO = torch.tensor(0.0)


# densities ------------------------------------------------------------------------------------------------------------


@pytest.mark.falls_back
def test_log_density_of_a_written_guide_in_unconstrained_coordinates():
    def guide(y):
        real = pyro.sample("real", dist.Normal(0.5, 2.0))
        pyro.sample("positive", dist.Gamma(2.0, 1.0 + real**2))  # depends on another site
        pyro.sample("unit", dist.Beta(1.5, 2.5))
        with pyro.plate("pair", 2):
            pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))

    posterior = pf.diagnose(mixed, guide, ZERO, draws=DRAWS)
    values = pf.LogDensity(mixed, (ZERO,)).constrain(posterior.z)
    real, positive, unit, simplex = (values[name].double() for name in ("real", "positive", "unit", "simplex"))
    log_q = dist.Normal(0.5, 2.0).log_prob(real) + dist.Gamma(2.0, 1.0 + real**2).log_prob(positive)
    log_q = log_q + dist.Beta(1.5, 2.5).log_prob(unit)
    log_q = log_q + dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).log_prob(simplex).sum(-1)
    jacobian = positive.log() + unit.log() + (1 - unit).log()
    sticks = simplex[..., :-1] / (1 - simplex[..., :-1].cumsum(-1) + simplex[..., :-1])
    rest = 1 - simplex[..., :-1].cumsum(-1) + simplex[..., :-1]
    jacobian = jacobian + (rest.log() + sticks.log() + (1 - sticks).log()).sum((-1, -2))
    torch.testing.assert_close(posterior.log_q.double(), log_q + jacobian, rtol=1e-3, atol=1e-3)


def test_exact_guide_is_ok_and_gives_the_log_evidence():
    posterior = pf.diagnose(schools, schools_guide(), Y, draws=1000)
    assert posterior.verdict.status == "ok"
    exact = float(dist.Normal(0.0, 5**0.5).log_prob(Y).sum())
    assert posterior.log_evidence == pytest.approx(exact, abs=1e-3)
    assert len(posterior.losses) == 0


@pytest.mark.parametrize(
    ("off", "status"),
    [({"shift": 0.15}, "corrected"), ({"shift": 1.5}, "unreliable"), ({"stretch": 0.5}, "unreliable")],
)
def test_guides_that_miss_are_told_so(off, status):
    assert pf.diagnose(schools, schools_guide(**off), Y).verdict.status == status


def init(loc, spread):
    return {"init_loc_fn": init_to_value(values={"theta": loc}), "init_scale": spread}


@pytest.mark.parametrize(
    "make",
    [
        lambda model: autoguide.AutoDiagonalNormal(model, **init(0.8 * Y, SPREAD)),
        lambda model: autoguide.AutoMultivariateNormal(model, **init(0.8 * Y, SPREAD)),
        lambda model: autoguide.AutoNormal(model, **init(0.8 * Y, SPREAD)),
        lambda model: autoguide.AutoStructured(model, conditionals="mvn", dependencies={}, **init(0.8 * Y, SPREAD)),
    ],
    ids=["diagonal", "full_rank", "normal", "structured"],
)
def test_autoguides_started_at_the_exact_posterior(make):
    """The same Gaussian by four guides, two by their distribution and two by their trace: all weights are equal."""
    posterior = pf.diagnose(schools, make(schools), Y, draws=1000)
    assert posterior.verdict.status == "ok"
    assert posterior.ess == pytest.approx(1000, rel=1e-3)
    assert posterior.log_evidence == pytest.approx(float(dist.Normal(0.0, 5**0.5).log_prob(Y).sum()), abs=1e-3)


@pytest.mark.parametrize("name", ["AutoIAFNormal", "AutoLowRankMultivariateNormal"])
def test_other_continuous_autoguides(name):
    guide = getattr(autoguide, name)(mixed)
    posterior = pf.diagnose(mixed, guide, ZERO, draws=DRAWS)
    assert torch.isfinite(posterior.log_q).all()
    fresh = guide.get_posterior(ZERO)
    expected = fresh.log_prob(posterior.z.float())
    torch.testing.assert_close(posterior.log_q.to(expected), expected, rtol=1e-3, atol=1e-3)


def test_lists_of_guides_run_by_their_trace():
    first = autoguide.AutoDiagonalNormal(poutine.block(mixed, expose=["real", "positive"]), init_scale=0.5)
    second = autoguide.AutoNormal(poutine.block(mixed, hide=["real", "positive"]), init_scale=0.3)
    together = autoguide.AutoGuideList(mixed)
    together.append(first)
    together.append(second)
    posterior = pf.diagnose(mixed, together, ZERO, draws=DRAWS)
    loc = torch.cat([first.loc, second.locs.unit.reshape(1), second.locs.simplex.reshape(-1)])
    scale = torch.tensor([0.5] * 2 + [0.3] * 5)
    expected = dist.Normal(loc, scale).log_prob(posterior.z).sum(-1)
    torch.testing.assert_close(posterior.log_q, expected, rtol=1e-3, atol=2e-3)


def test_flow_guides_with_masks_and_dependent_supports():
    mask = torch.tensor([True, False, True, True])

    def model(y):
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("high", dist.Uniform(low, low + 2))
        with pyro.plate("unit", 4):
            pyro.sample("y", dist.Normal(low, 1.0), obs=y, obs_mask=mask)

    guide = pf.AutoRealNVP(model, layers=2).initialize(torch.zeros(4))
    posterior = pf.diagnose(model, guide, torch.zeros(4), draws=DRAWS)
    assert posterior.z.shape == (DRAWS, 3)
    torch.testing.assert_close(posterior.log_q, guide._flow.log_prob(posterior.z), rtol=1e-4, atol=1e-3)
    assert (posterior.samples["high"] > posterior.samples["low"]).all()


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
def test_dependent_supports_under_pyros_autoguide():
    """Pyro maps ``high`` by the support of its first run; where that is not the model's, draws weigh nothing."""

    def model():
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("high", dist.Uniform(low, low + 2))

    guide = autoguide.AutoDiagonalNormal(model, init_scale=1.0)
    draws = 2000
    posterior = pf.diagnose(model, guide, draws=draws)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        values = [guide() for _ in range(draws)]
    inside = sum(bool(value["low"] < value["high"] < value["low"] + 2) for value in values) / draws
    assert 0.3 < inside < 0.8
    assert float((posterior.log_weights > -torch.inf).double().mean()) == pytest.approx(inside, abs=0.06)
    assert posterior.verdict.status != "ok"
    placed = posterior.density.constrain(posterior.z)
    kept = posterior.log_weights > -torch.inf
    low, high = placed["low"][kept], placed["high"][kept]
    share = (high - guide.prototype_trace.nodes["low"]["value"]) / 2  # the guide's own map of high
    log_q = dist.Normal(guide.loc[0], 1.0).log_prob(low) + dist.Normal(guide.loc[1], 1.0).log_prob(torch.logit(share))
    log_ratio = dist.Normal(0.0, 1.0).log_prob(low) - log_q + (share * (1 - share)).log()
    ours = (posterior.log_p - posterior.log_q)[kept]
    torch.testing.assert_close(ours, log_ratio.detach(), rtol=1e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
@pytest.mark.parametrize("support", ["interval", "positive"])
def test_values_outside_of_the_support_weigh_nothing(support):
    """A uniform prior on (0, 1), or an exponential one, and a Gaussian guide: a share of its draws is outside."""

    def model():
        pyro.sample("x", dist.Uniform(0.0, 1.0) if support == "interval" else dist.Exponential(1.0))

    def guide():
        pyro.sample("x", dist.Normal(0.5, 0.7))

    posterior = pf.diagnose(model, guide, draws=2000)
    normal = dist.Normal(0.5, 0.7)
    edge = torch.tensor(1.0 if support == "interval" else 1e9)
    share = float(normal.cdf(edge) - normal.cdf(torch.tensor(0.0)))
    assert float((posterior.log_weights > -torch.inf).double().mean()) == pytest.approx(share, abs=0.04)
    assert posterior.log_evidence == pytest.approx(0.0, abs=0.1 if support == "interval" else 0.3)
    assert posterior.verdict.status != "ok"


def test_enumerated_models_with_guides_of_the_continuous_sites():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("point", len(y)):
            sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal((2 * sign - 1) * mu, 1.0), obs=y)

    y = torch.tensor([2.0, -2.0, 2.5])
    posterior = pf.diagnose(model, autoguide.AutoNormal(poutine.block(model, hide=["sign"])), y, draws=DRAWS)
    mu = posterior.z[:, :1].double()
    both = torch.stack([dist.Normal(mu, 1.0).log_prob(y), dist.Normal(-mu, 1.0).log_prob(y)])
    expected = dist.Normal(0.0, 2.0).log_prob(mu[:, 0]) + (both.logsumexp(0) - torch.tensor(2.0).log()).sum(-1)
    torch.testing.assert_close(posterior.log_p.double(), expected, rtol=1e-4, atol=1e-4)


def test_factors_and_masks_in_the_guide_count():
    def guide(y):
        with pyro.plate("school", SCHOOLS):
            theta = pyro.sample("theta", dist.Normal(0.8 * y, SPREAD))
            pyro.factor("tilt", 0.25 * torch.ones_like(theta), has_rsample=True)

    plain, tilted = (pf.diagnose(schools, each, Y, draws=DRAWS) for each in (schools_guide(), guide))
    torch.testing.assert_close(tilted.log_q, plain.log_q + 0.25 * SCHOOLS)


def test_masked_entries_of_a_written_guide_count_for_nothing():
    mask = torch.tensor([True, False])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("unit", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=mask)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.5, 0.5**0.5))
        with pyro.plate("unit", 2):
            pyro.sample("y_unobserved", dist.Normal(0.5, 1.5**0.5))

    posterior = pf.diagnose(model, guide, torch.tensor([1.0, 0.0]), draws=DRAWS)
    z = posterior.z
    log_q = dist.Normal(0.5, 0.5**0.5).log_prob(z[:, 0]) + dist.Normal(0.5, 1.5**0.5).log_prob(z[:, 1])
    torch.testing.assert_close(posterior.log_q, log_q)


# how guides are run ---------------------------------------------------------------------------------------------------


@pytest.mark.falls_back
def test_a_guide_that_cannot_be_batched_runs_draw_by_draw(monkeypatch):
    """Also where its density is asked for at given points, which a search does 20,000 times: here the test asks."""
    monkeypatch.setattr("pyro_flows.fitting.diagnose.missed_modes", lambda *given, **options: Search())

    def guide(y):
        with pyro.plate("school", SCHOOLS):
            theta = pyro.sample("theta", dist.Normal(0.8 * y, SPREAD))
        assert theta[0].item() < 1e9

    posterior = pf.diagnose(schools, guide, Y, draws=DRAWS)
    expected = dist.Normal(0.8 * Y, SPREAD).log_prob(posterior.z).sum(-1)
    torch.testing.assert_close(posterior.log_q, expected)
    assert len(posterior.z[:, 0].unique()) == DRAWS
    sites = programs.random_sites(programs.run_guide(guide, (Y,), {}))
    _, score = programs.from_traces(guide, pf.LogDensity(schools, (Y,)), (Y,), {}, sites)
    torch.testing.assert_close(score(posterior.z), expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: schools_guide(), lambda: autoguide.AutoDiagonalNormal(schools)])
def test_one_seed_one_answer_and_the_random_state_stays(make):
    guide, before = make(), torch.get_rng_state()
    first, again, other = (pf.diagnose(schools, guide, Y, draws=DRAWS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.z, again.z)
    assert torch.equal(first._used, again._used)
    assert not torch.equal(first.z, other.z)
    assert first.settings["seed"] == 1
    assert torch.equal(before, torch.get_rng_state())


def test_trained_parameters_are_used_and_left_alone():
    guide = autoguide.AutoNormal(schools)
    svi = pyro.infer.SVI(schools, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    untrained = pf.diagnose(schools, guide, Y, draws=DRAWS).elbo
    for _ in range(200):
        svi.step(Y)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    assert pf.diagnose(schools, guide, Y, draws=DRAWS).elbo > untrained + 5
    assert all(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())


def test_keyword_arguments_reach_model_and_guide():
    x = torch.linspace(0.1, 1.0, 20)
    posterior = pf.diagnose(line, line_guide, model_kwargs={"x": x, "y": 2 * x}, draws=DRAWS)
    assert posterior.verdict.status == "ok"


# what cannot be diagnosed ---------------------------------------------------------------------------------------------


def without(y):
    pyro.param("theta_loc", torch.zeros(SCHOOLS))


def with_another(y):
    schools_guide()(y)
    pyro.sample("extra", dist.Normal(0.0, 1.0))


def hierarchical(y):
    center = pyro.sample("center", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("school", SCHOOLS):
        pyro.sample("theta", dist.Normal(center + 0.8 * y, SPREAD))


def of_another_shape(y):
    with pyro.plate("school", 3):
        pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0))


def points(y):
    value = pyro.param("value", torch.zeros(SCHOOLS), constraint=constraints.real)
    with pyro.plate("school", SCHOOLS):
        pyro.sample("theta", dist.Delta(value))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (
            autoguide.AutoDelta(schools),
            r"a point-mass guide such as AutoDelta has no density.*Point masses are at 'theta'",
        ),
        (points, r"Point masses are at 'theta'"),
        (
            autoguide.AutoLaplaceApproximation(schools),
            r"pass the guide that guide\.laplace_approximation\(\*args\) returns",
        ),
        (without, r"guide: expected the model's latent sites 'theta' .*got none for 'theta'"),
        (with_another, r"got others: 'extra'"),
        (
            hierarchical,
            r"auxiliary sites have 1 coordinates, the latent sites made from them 0.*without extra randomness",
        ),
        (of_another_shape, r"guide: site 'theta' has shape \(3,\), in the model \(8,\)"),
    ],
    ids=["AutoDelta", "delta", "laplace", "missing", "extra", "auxiliary", "shape"],
)
def test_guides_without_a_usable_density(guide, message):
    with pytest.raises(ValueError, match=message):
        pf.diagnose(schools, guide, Y, draws=DRAWS)


@pytest.mark.parametrize("rest", [autoguide.AutoNormal, pf.AutoRealNVP])
def test_partly_point_mass_guides_are_named(rest):
    guide = autoguide.AutoGuideList(mixed)
    guide.append(autoguide.AutoDelta(poutine.block(mixed, expose=["real"])))
    guide.append(rest(poutine.block(mixed, hide=["real"])))
    with pytest.raises(ValueError, match=r"has no density.*Point masses are at 'real'\.$"):
        pf.diagnose(mixed, guide, ZERO, draws=DRAWS)


def test_pyros_autoguides_over_masked_entries_are_refused_with_the_remedy():
    def model(y):
        with pyro.plate("unit", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=torch.tensor([True, False, True]))

    with pytest.raises(
        ValueError, match=r"The model masks entries of 'y_unobserved'; a flow guide such as AutoRealNVP"
    ):
        pf.diagnose(model, autoguide.AutoNormal(model), torch.zeros(3), draws=DRAWS)


def test_finished_laplace_approximation():
    guide = autoguide.AutoLaplaceApproximation(schools, **{"init_loc_fn": init_to_value(values={"theta": 0.8 * Y})})
    guide(Y)
    posterior = pf.diagnose(schools, guide.laplace_approximation(Y), Y, draws=500)
    assert posterior.verdict.status == "ok"


# missed modes ---------------------------------------------------------------------------------------------------------


def two_sided():
    x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 5.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones((), dtype=torch.float64)))
    sides = torch.stack([-2.0 * ((x - side * 4.0).square().sum(-1)) for side in (1.0, -1.0)])
    pyro.factor("sides", torch.logsumexp(sides, 0) - 0.5 * ((scale - 1.0) / 0.2) ** 2)


def one_side(*sides, spread=0.497):
    """Draw from some of the two sides, exactly but for what the prior adds, if ``spread`` is left."""
    pick = torch.tensor(sides, dtype=torch.float64)
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.06, dtype=torch.float64), 0.22))
    parts = dist.Normal(4.0 * pick[:, None].expand(-1, 2), spread).to_event(1)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(len(pick), dtype=torch.float64)), parts))
    return scale


def trained(guide):
    elbo = pyro.infer.Trace_ELBO(8, max_plate_nesting=0, vectorize_particles=True)
    svi = pyro.infer.SVI(two_sided, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    pyro.set_rng_seed(0)
    for _ in range(300):
        svi.step()
    return guide


START = {"x": torch.tensor([4.0, 4.0], dtype=torch.float64), "scale": torch.tensor(1.0, dtype=torch.float64)}
HALVES = {
    "written": lambda: lambda: one_side(1.0),
    "AutoMultivariateNormal": lambda: trained(
        autoguide.AutoMultivariateNormal(two_sided, init_loc_fn=autoguide.init_to_value(values=START), init_scale=0.3)
    ),
    "AutoNormal": lambda: trained(
        autoguide.AutoNormal(two_sided, init_loc_fn=autoguide.init_to_value(values=START), init_scale=0.3)
    ),
}


@pytest.mark.parametrize(
    "name", ["written", "AutoMultivariateNormal", pytest.param("AutoNormal", marks=pytest.mark.slow)]
)
def test_a_guide_with_half_of_the_posterior_misses_a_mode(name):
    """Its weights are even, and say nothing of the other half: it was `ok` or `corrected`."""
    verdict = pf.diagnose(two_sided, HALVES[name](), draws=1000).verdict
    assert verdict.status == "unreliable"
    assert any("misses a mode near" in reason for reason in verdict.reasons)


def test_a_guide_with_both_halves_misses_none():
    verdict = pf.diagnose(two_sided, lambda: one_side(1.0, -1.0), draws=1000).verdict
    assert verdict.status in ("ok", "corrected")
    assert not any("no search" in note for note in verdict.notes)


def test_where_a_guide_hides_its_density_the_verdict_says_that_nothing_was_searched():
    def hidden():
        both = pyro.sample("both", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1),
                           infer={"is_auxiliary": True})  # fmt: skip
        pyro.sample("x", dist.Delta(both, log_density=torch.zeros(()), event_dim=1))

    def normal():
        pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    with pytest.warns(pf.NothingObservedWarning):
        verdict = pf.diagnose(normal, hidden, draws=1000).verdict
    assert any("no search for missed modes was made" in note for note in verdict.notes)


def test_a_guide_is_searched_unless_the_larger_sample_has_poor_weights_too(monkeypatch):
    """A first sample was too poor to be searched from, and a larger one that passed was `ok`, with a note."""
    monkeypatch.setattr("pyro_flows.fitting.diagnose.ESS_SHARE_LEAST", 1.1)  # no first sample is good enough
    verdict = pf.diagnose(two_sided, lambda: one_side(1.0), draws=1000).verdict
    assert [reason.split(" near")[0] for reason in verdict.reasons] == ["the guide misses a mode"]
    assert not any("no search" in note for note in verdict.notes)
    verdict = pf.diagnose(two_sided, lambda: one_side(1.0, spread=0.25), draws=1000).verdict
    assert verdict.status == "unreliable"
    assert any("no search for missed modes was made" in note for note in verdict.notes)
