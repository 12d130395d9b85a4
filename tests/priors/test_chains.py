"""Chains of fitted priors: what a link adds to the error, what stays of it, and a new beginning from all data."""

import copy
import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.recipe import with_mixture
from pyro_flows.priors import errors, fitted
from pyro_flows.priors.errors import (
    PriorError,
    Sample,
    accumulated,
    box,
    compared,
    equal,
    matched,
    moments,
)

VAGUE = lambda: dist.Normal(0.0, 10.0)  # noqa: E731


def line(y, prior):
    """A mean with unit noise."""
    mu = pyro.sample("mu", prior())
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact(y, loc=0.0, precision=0.01):
    """The posterior of the mean: its place and precision."""
    total = precision + len(y)
    return (precision * loc + float(y.sum())) / total, total


def judged(y, prior, loc, precision):
    """The exact posterior of a batch, by draws of a guide."""
    return pf.diagnose(line, lambda y, prior: pyro.sample("mu", dist.Normal(loc, precision**-0.5)), y, prior)


@pytest.fixture(scope="module")
def chain():
    """Three batches of four rows: the posteriors' places and precisions, and the priors."""
    y = torch.randn(12, generator=torch.Generator().manual_seed(0))
    loc, precision, prior, found = 0.0, 0.01, VAGUE, []
    for batch in y.split(4):
        loc, precision = exact(batch, loc, precision)
        prior = pf.prior_from(judged(batch, prior, loc, precision), "mu", max_epochs=3)
        found.append((loc, precision, prior))
    return y, found


def test_each_link_adds_its_error(chain):
    _, found = chain
    assert [prior.links for *_, prior in found] == [1, 2, 3]
    own = found[0][2]
    assert 0.0 < own.mean_error < 0.04  # 2.2 standard errors of 20,000 draws, and those of the flow's moments
    assert 0.0 < own.sd_error < 0.04
    for (*_, earlier), (*_, later) in pairwise(found):
        assert later.mean_error == pytest.approx(math.hypot(own.mean_error, earlier.mean_error), rel=0.2)
        assert later.sd_error == pytest.approx(math.hypot(own.sd_error, earlier.sd_error), rel=0.2)


def test_the_stated_error_covers_the_true_one(chain):
    _, found = chain
    for loc, precision, prior in found:
        z = prior.flow.draw(200_000)[0].double()
        noise = 3.0 / math.sqrt(200_000)
        assert abs(float(z.mean()) - loc) * precision**0.5 < prior.mean_error + noise
        assert abs(math.log(float(z.std()) * precision**0.5)) < prior.sd_error + noise


def test_it_is_printed_and_saved(chain, tmp_path):
    *_, (_, _, prior) = chain[1]
    assert f"means may be off by {prior.mean_error:.2f} sd, and sds by" in str(prior)
    assert "after 3 links" in str(prior)
    prior.save(tmp_path / "prior")
    again = pf.FittedPrior.load(tmp_path / "prior")
    assert (again.mean_error, again.sd_error, again.links) == (prior.mean_error, prior.sd_error, 3)
    assert str(again) == str(prior)
    assert again().error == prior().error  # which further links take over


def test_a_large_error_warns(chain, monkeypatch):
    y, found = chain
    loc, precision, prior = found[-1]
    posterior = judged(y[:1], prior, *exact(y[:1], loc, precision))
    monkeypatch.setattr(fitted, "PRIOR_ERROR_MOST", 0.01)
    with pytest.warns(UserWarning, match=r"prior_from: means may be off by .* after 4 links.*prior\.refresh"):
        pf.prior_from(posterior, "mu", max_epochs=1)


def test_all_data_at_once_begin_anew(chain, monkeypatch):
    y, found = chain
    loc, precision, prior = found[-1]
    fresh = prior.refresh(line, y, VAGUE, progress=False, seed=1)
    assert (fresh.links, fresh.sites) == (1, ("mu",))
    assert fresh.mean_error < prior.mean_error
    z = fresh.flow.draw(100_000)[0].double()
    assert abs(float(z.mean()) - loc) * precision**0.5 < 0.03

    def other(y):
        pyro.sample("y", dist.Normal(pyro.sample("place", VAGUE()), 1.0).expand([len(y)]).to_event(1), obs=y)

    monkeypatch.setattr(fitted, "fit", lambda model, *args, **options: judged_other)
    judged_other = pf.diagnose(other, lambda y: pyro.sample("place", dist.Normal(loc, precision**-0.5)), y)
    with pytest.raises(ValueError, match="model: expected the latent sites mu, got place"):
        prior.refresh(other, y)

    def wide(y):
        mu = pyro.sample("mu", VAGUE().expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(mu.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    judged_other = pf.diagnose(wide, lambda y: pyro.sample("mu", VAGUE().expand([2]).to_event(1)), y)
    with pytest.warns(pf.UnreliableWarning), pytest.raises(ValueError, match=r"sites of the shapes \{'mu': \(\)\}"):
        prior.refresh(wide, y)


# what a link is made of -----------------------------------------------------------------------------------------------


def normal(dim, count, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_errors_of_moments_are_those_of_repeated_draws():
    """Of independent, weighted and correlated draws, and of weighted against plain means of the same draws."""
    kinds = {name: [] for name in ("plain", "weighted", "known", "chains")}
    within = torch.tensor([-9.0]), torch.tensor([9.0])
    for seed in range(60):
        z = normal(1, 400, seed).double()
        weights = torch.softmax(0.4 * z[:, 0], 0)
        walk = z.reshape(4, 100).clone()
        for place in range(1, 100):
            walk[:, place] = 0.6 * walk[:, place - 1] + 0.8 * walk[:, place]
        walk = walk.reshape(-1, 1)
        found = {
            "plain": moments(Sample.of(z, equal(z)), within),
            "weighted": moments(Sample(z, weights), within),
            "known": compared(Sample(z, weights), Sample(z, equal(z)), within, same=True),
            "chains": moments(Sample.of(walk, equal(walk), 4), within),
        }
        for name, (mean, sd, *noise) in found.items():
            known = name == "known"  # a difference in sds, which vary too
            both = (mean * found["weighted"].sd, sd) if known else (mean, sd.log())
            kinds[name].append([float(part) for part in (*both, *noise)])
    for name, rows in kinds.items():
        table = torch.tensor(rows)
        ratio = table[:, 2:].mean(0) / table[:, :2].std(0)
        assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4, (name, ratio)


def test_copies_of_a_draw_count_as_one():
    z = normal(2, 300)
    sample = Sample.of(z.repeat(3, 1), equal(z.repeat(3, 1)))
    assert len(sample.z) == 300
    once = moments(Sample.of(z, equal(z)), box(z))
    for part, other in zip(moments(sample, box(z)), once, strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.parametrize("own", [True, False])
def test_a_flow_is_moved_to_the_moments_of_weighted_draws(own):
    torch.manual_seed(0)
    flow = pf.realnvp(2, layers=2)
    z = flow.draw(20_000)[0].detach()
    weights = torch.softmax((0.3 * z[:, 0] - 0.1 * z[:, 1] ** 2).double(), 0)
    wanted = moments(Sample(z, weights), box(z))
    mean_error, sd_error, bound = matched(flow, Sample(z, weights), own=own)
    drawn = flow.draw(50_000)[0]
    found = moments(Sample(drawn, equal(drawn)), box(drawn))
    assert float(((found.mean - wanted.mean) / wanted.sd).abs().max()) < 0.025
    assert float((found.sd / wanted.sd).log().abs().max()) < 0.025
    assert 0.0 < max(mean_error, sd_error) < 0.06
    spread = float((20_000 * weights.square().sum() - 1.0).sqrt())
    assert bound == (pytest.approx(spread) if own else 0.0)
    assert spread > 0.2
    matched(flow, Sample(drawn, equal(drawn)), own=False)  # a second time, onto the map of the first
    again = flow.draw(50_000)[0]
    assert float(((again.mean(0) - wanted.mean) / wanted.sd).abs().max()) < 0.025
    assert len([layer for layer in flow.bijection.layers if hasattr(layer, "inverse_scale")]) == 1


def test_a_flow_of_narrow_modes_is_not_moved_off_them():
    """Their masses are a little off. Moments tell of these, and a move put a mode of sd .05 at .008 from its place."""
    torch.manual_seed(0)
    flow = with_mixture(pf.Flow(pf.transforms.LowerTriangularAffine(1)), components=2).double()
    flow.mixture.assign(torch.tensor([0.07, 0.93]).log(), torch.tensor([[-0.85], [0.85]]), torch.full((2, 1, 1), 22.0))
    before = copy.deepcopy(flow)
    z = normal(1, 20_000) / 22.0 + torch.where(torch.arange(20_000) < 1200, -0.85, 0.85)[:, None]
    stated = accumulated(matched(flow, Sample(z, equal(z)), own=False), 1, [])
    places = torch.linspace(-1.0, 1.0, 41)[:, None].double()
    assert torch.equal(flow.log_prob(places), before.log_prob(places))
    masses = torch.tensor([0.06, 0.07]).double()
    sds = (masses * (1.0 - masses) * 1.7**2 + 1.0 / 22.0**2).sqrt()
    assert stated.mean > 0.01 * 1.7 / float(sds[0])
    assert stated.sd > float((sds[1] / sds[0]).log())


def test_errors_add_up():
    own, two = accumulated((0.01, 0.02, 0.0), 1, []), accumulated((0.01, 0.02, 0.0), 20, [])
    assert own == PriorError(pytest.approx(0.01 * 2.2414, rel=1e-3), pytest.approx(0.02 * 2.2414, rel=1e-3), 1)
    assert two.mean > 1.3 * own.mean  # that all of twenty coordinates are within
    later = accumulated((0.0, 0.0, 0.1), 1, [PriorError(0.3, 0.2, 3), PriorError(0.4, 0.1, 1)])
    assert later.mean == pytest.approx(math.hypot(0.5, 0.196 / 2**0.5), rel=1e-3)
    assert later.sd == pytest.approx(math.hypot(0.05**0.5, 0.196 / 2), rel=1e-3)
    assert later.links == 4
    assert accumulated((0.0, 0.0, 0.0), 1, [errors.UNKNOWN]).mean == math.inf


def test_an_error_of_shape_is_covered_for_95_percent_of_further_data():
    """Skewness, which mean and sd do not show, under data as informative as those so far, that the model may make."""
    torch.manual_seed(0)
    z = torch.linspace(-7.0, 7.0, 701).double()
    right = torch.exp(-0.5 * z.square()) * (1.0 + 0.05 * (z**3 - 3.0 * z) / 6**0.5)
    x = torch.special.ndtri((torch.arange(20_000) + 0.5).double() / 20_000)
    weights = 1.0 + 0.05 * (x**3 - 3.0 * x) / 6**0.5
    flow = pf.Flow(pf.transforms.LowerTriangularAffine(1)).double()
    stated = accumulated(matched(flow, Sample(x[:, None], weights / weights.sum()), own=True), 1, [])
    y = torch.linspace(-5.0, 5.0, 401).double()[:, None]
    further = torch.exp(-0.5 * (y - z).square())
    predictive = (further * right).sum(1)
    found = []
    for density in (right, flow.log_prob(z[:, None]).exp()):
        given = further * density
        given = given / given.sum(1, keepdim=True)
        mean = (given * z).sum(1)
        found.append((mean, (given * (z - mean[:, None]).square()).sum(1).sqrt()))
    (mean, sd), (other, spread) = found
    for off, most in ((mean - other) / sd, stated.mean), ((spread / sd).log(), stated.sd):
        assert 0.95 < float(predictive[off.abs() < most].sum() / predictive.sum()) < 0.999


@pytest.mark.slow
def test_the_error_of_a_flow_whose_weights_are_poor_is_not_known():
    """Shapes that differ between axes: each marginal is normal, and so are the tilts along them."""
    count = 40

    def signs():
        theta = pyro.sample("theta", dist.Normal(torch.zeros(count), 1.0).to_event(1))
        pairs = theta.reshape(*theta.shape[:-1], -1, 2)
        pyro.factor("product", (3.0 * torch.tanh(pairs.prod(-1))).sum(-1))

    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(400_000, 2, generator=generator)
    kept = pool[torch.multinomial((3.0 * torch.tanh(pool.prod(1))).exp(), 4000 * count // 2, True, generator=generator)]
    drawn = kept.reshape(4, 1000, count)
    posterior = pf.from_mcmc({"theta": drawn}, signs)
    assert posterior.verdict.status == "ok"
    with pytest.warns(UserWarning, match="prior_from: its error is not known"):
        prior = pf.prior_from(posterior, max_epochs=1)
    assert prior.mean_error == math.inf


def test_draws_with_heavy_tails_have_moments():
    z = torch.from_numpy(np.random.default_rng(0).standard_cauchy((20_000, 1)))
    found = moments(Sample(z, equal(z)), box(z))
    assert abs(float(found.mean)) < 0.1
    assert float(found.mean_error) == pytest.approx(1 / math.sqrt(20_000), rel=0.05)
    assert float(found.sd_error) < 0.02


# other supports -------------------------------------------------------------------------------------------------------


def shares(counts, times, prior=None):
    """Shares on a simplex, a positive rate and a vector, with conjugate priors or one for all."""
    if prior is None:
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        place = pyro.sample("place", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    else:
        values = prior.sample()
        share, rate, place = values["share"], values["rate"], values["place"]
    pyro.sample("counts", dist.Multinomial(total_count=int(counts.sum()), probs=share), obs=counts)
    with pyro.plate("time", len(times)):
        pyro.sample("times", dist.Exponential(rate), obs=times)
    pyro.sample("seen", dist.Normal(place, 1.0).to_event(1), obs=times[:2])


@pytest.mark.slow
def test_a_chain_of_a_simplex_a_rate_and_a_vector_is_the_conjugate_posterior():
    generator = torch.Generator().manual_seed(1)
    prior, total, passed, seen = (
        None,
        torch.ones(3).double(),
        torch.tensor([2.0, 1.0]).double(),
        torch.zeros(2).double(),
    )
    for link in range(4):
        counts = torch.bincount(
            torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 15, True, generator=generator), minlength=3
        )
        times = -torch.rand(5, generator=generator).log() / 2.0
        posterior = pf.fit(shares, counts.float(), times, prior, progress=False, seed=link)
        prior = pf.prior_from(posterior)
        total += counts
        passed += torch.tensor([5.0, float(times.sum())])
        seen += times[:2]
    assert prior.links == 4
    drawn = prior.split(prior().sample((40_000,)))
    mean = total / total.sum()
    sd = (mean * (1 - mean) / (total.sum() + 1)).sqrt()
    assert float(((drawn["share"].double().mean(0) - mean) / sd).abs().max()) < 0.15
    rate = float(passed[0] / passed[1])
    assert abs(float(drawn["rate"].double().mean()) - rate) / (rate / float(passed[0]) ** 0.5) < 0.15
    assert float(((drawn["place"].double().mean(0) - seen / 5.0) * 5.0**0.5).abs().max()) < 0.15
    for got, right in ((drawn["share"].std(0), sd), (drawn["place"].std(0), torch.full((2,), 5.0**-0.5))):
        assert float((got.double() / right).log().abs().max()) < 0.14
    assert prior.mean_error < 0.15


def pair_of(chain):
    """A prior of two sites, both of the first link's support."""
    part = chain[1][0][2].parts[0]
    pair = [part, type(part)("nu", part.shape, part.support, part.dims)]
    return pf.FittedPrior(pf.realnvp(2, layers=2), pair, status="ok", verdict="ok", error=PriorError(0.1, 0.1, 2))


def test_several_sites_go_on_by_their_own_names(chain):
    def both(y, prior):
        values = prior.sample()
        pyro.sample("y", dist.Normal(values["mu"] + values["nu"], 1.0).expand([len(y)]).to_event(1), obs=y)

    posterior = pf.diagnose(both, lambda y, prior: pyro.sample("prior", prior()), chain[0], pair_of(chain))
    assert pf.prior_from(posterior, ["nu", "mu"], max_epochs=1).sites == ("mu", "nu")
    with pytest.raises(ValueError, match=r"sites: expected all sites of the prior 'prior' \(mu, nu\), got mu"):
        pf.prior_from(posterior, "mu")


def test_an_event_of_another_shape_is_refused(chain):
    with pytest.raises(ValueError, match=r"value: expected an event of shape \(2,\), of mu, nu, got \(3,\)"):
        pair_of(chain)().log_prob(torch.zeros(3))


def test_several_sites_in_a_plate_are_refused(chain):
    y = chain[0]

    def twice(y, prior):
        with pyro.plate("copy", 2):
            both = pyro.sample("both", prior())
        pyro.sample("y", dist.Normal(both.sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    prior = pair_of(chain)
    guide = lambda y, prior: pyro.sample("both", prior().expand([2]))  # noqa: E731
    posterior = pf.diagnose(twice, guide, y, prior)
    with pytest.raises(ValueError, match="'both' is a prior of several sites inside of a plate"):
        pf.prior_from(posterior, "both")
