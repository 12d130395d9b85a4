"""What a log density makes of its data: missing entries, dtypes, random draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch.distributions import constraints

import pyro_flows as pf
from tests.invariants import close
from tests.model.test_log_density_runs import numbers, takes_item
from tests.models import GAPS, NAN, gauss, missing, mixture, normal, real

Y = real(1.0)


# missing data ---------------------------------------------------------------------------------------------------------


def test_only_missing_entries_are_coordinates():
    density = pf.LogDensity(missing, (GAPS,))
    (site,) = [latent for latent in density.structure.latents if latent.name == "y_unobserved"]
    assert site.shape == (4,)
    assert site.size == 2
    assert site.free.tolist() == [1, 3]


@pytest.mark.parametrize("placeholder", [NAN, -999.0, float("inf")])
def test_gradients_do_not_see_what_stands_for_missing_data(placeholder):
    """NaN, or a number outside of the support: masked out in the value, it would still make the gradient NaN."""
    mask = ~GAPS.isnan()

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        sd = pyro.sample("sd", dist.HalfNormal(real(1.0)))
        with pyro.plate("n", 4), poutine.mask(mask=mask):
            pyro.sample("y", dist.LogNormal(mu, sd), obs=y)

    density, clean = (
        pf.LogDensity(model, (torch.where(mask, GAPS, real(value)),)) for value in (placeholder, 1.0)
    )  # fmt: skip
    z = normal(3, 2, seed=33)
    for ours, expected in zip(density.value_and_grad(z), clean.value_and_grad(z), strict=True):
        assert torch.isfinite(ours).all()
        close(ours, expected, 1e-12)


def test_missing_vectors():
    """The mask goes over the batch: a vector with one missing entry is missing as a whole."""
    y = torch.stack([real(1.0, 2.0), real(NAN, 3.0), real(0.0, -1.0)])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=torch.float64), 5.0).to_event(1))
        with pyro.plate("n", 3):
            likelihood = dist.MultivariateNormal(mu, torch.eye(2, dtype=torch.float64))
            pyro.sample("y", likelihood, obs=y, obs_mask=~y.isnan().any(-1))

    density = pf.LogDensity(model, (y,))
    assert density.dim == 4
    z = normal(2, 4, seed=34)
    every = y.repeat(2, 1, 1)
    every[:, 1] = z[:, 2:]
    close(
        density(z),
        torch.stack([gauss(r[:2], 0.0, 5.0) + gauss(e, r[:2], 1.0) for r, e in zip(z, every, strict=True)]),
        1e-9,
    )
    assert torch.isfinite(density.value_and_grad(z)[1]).all()


def test_sites_masked_out_as_a_whole_are_no_coordinates():
    """By ``mask=False``, or by a mask of data that are all there: such a site would have a flat, improper density."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with poutine.mask(mask=False):
            pyro.sample("unused", dist.HalfNormal(real(1.0)))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=torch.tensor([True, True]))

    y = real(0.3, 1.2)
    density = pf.LogDensity(model, (y,))
    assert density.dim == 1
    z = normal(3, 1, seed=35)
    close(density(z), torch.stack([gauss(mu, 0.0, 5.0) + gauss(y, mu, 1.0) for mu in z]), 1e-9)
    assert density.constrain(z)["unused"].shape == (3,)
    guide = pf.AutoRealNVP(model, layers=2).initialize(y)
    assert guide.sample_posterior(4)["y_unobserved"].shape == (4, 2)


def padded(y, present):
    """Two of three rows have an effect with a prior, the third one a flat one; where a row ends, y is padded."""
    with poutine.mask(mask=False):
        share = pyro.sample("share", dist.Dirichlet(real(1.0, 1.0)))
        pyro.sample("unused", dist.HalfNormal(real(1.0)))
    row = pyro.plate("row", 3, dim=-1)
    with row, poutine.mask(mask=torch.tensor([True, False, True])):
        effect = pyro.sample("effect", dist.Normal(real(0.0), 2.0))
    with pyro.plate("column", 2, dim=-2), row, poutine.mask(mask=present):
        pyro.sample("y", dist.Normal(effect + share[0], 1.0), obs=y)


@pytest.mark.parametrize("rows", [3, 1])
def test_what_a_mask_leaves_without_a_prior_is_flat_where_the_rest_uses_it(rows):
    """Pyro's joint density has no prior there. Where the likelihood does not use it either, it is no coordinate."""
    y, present = normal(2, 3, seed=36), torch.arange(3) < rows
    density = pf.LogDensity(padded, (y, present.expand(2, 3)))
    assert density.names == ("share", "unused", "effect")
    assert [latent.size for latent in density.structure.latents] == [1, 0, 3 if rows == 3 else 2]
    z = normal(4, density.dim, seed=37)
    share = torch.sigmoid(z[:, :1])
    effect = z[:, 1:] if rows == 3 else torch.stack([z[:, 1], torch.zeros(4), z[:, 2]], 1)
    flat = torch.log(share * (1.0 - share))[:, 0]
    prior = torch.stack([gauss(row[[0, 2]], 0.0, 2.0) for row in effect])
    likelihood = torch.stack([gauss(y[:, :rows], e[:rows], 1.0) for e in (effect + share)])
    close(density(z), flat + prior + likelihood, 1e-9)


@pytest.mark.parametrize("way", ["plate", "distribution", "event"])
def test_masks_inside_of_a_prior_are_masks(way):
    """An entry that nothing uses was a flat coordinate, and the search for modes failed."""
    keep, y = torch.tensor([True, True, False]), real(0.3, -0.2, 1.0)

    def model():
        with pyro.plate("n", 3):
            if way == "plate":
                with poutine.mask(mask=keep):
                    x = pyro.sample("x", dist.Normal(real(0.0), 1.0))
            else:
                prior = dist.Normal(real(0.0), 1.0).expand([3])
                prior = (
                    dist.Normal(real(0.0), 1.0).expand([3, 2]).mask(keep[:, None]).to_event(1)
                    if way == "event"
                    else prior.mask(keep)
                )
                x = pyro.sample("x", prior)
                x = x.sum(-1) if way == "event" else x
            pyro.sample("y", dist.Normal(x, 1.0).mask(keep), obs=y)

    density = pf.LogDensity(model)
    width = 2 if way == "event" else 1
    assert [latent.size for latent in density.structure.latents] == [2 * width]
    assert density.structure.improper == []
    z = normal(4, 2 * width, seed=38)
    x = z.view(4, 2, width)
    expected = [gauss(row, 0.0, 1.0) + gauss(y[:2], row.sum(-1), 1.0) for row in x]
    close(density(z), torch.stack(expected), 1e-9)


@pytest.mark.parametrize("rows", [[True, True], [True, False]])
def test_a_mask_may_be_wider_than_a_site(rows):
    """Pyro counts the prior of an element as often as its mask is true."""
    mask = torch.tensor(rows)[:, None].expand(2, 3)

    def model():
        with poutine.mask(mask=mask), pyro.plate("outer", 2, dim=-2):
            pyro.sample("x", dist.Normal(real(0.0), 1.0))

    density = pf.LogDensity(model)
    assert density.dim == sum(rows)
    z = normal(4, density.dim, seed=39)
    close(density(z), 3.0 * dist.Normal(real(0.0), 1.0).log_prob(z).sum(1), 1e-9)


def test_entries_of_an_event_without_a_prior_are_improper():
    keep = torch.tensor([True, False, True])
    density = pf.LogDensity(lambda: pyro.sample("x", dist.Normal(real(0.0), 1.0).expand([3]).mask(keep).to_event(1)))
    assert [latent.improper for latent in density.structure.latents] == [(1,)]


def test_a_flat_prior_by_a_mask_is_fitted():
    def model(y):
        with poutine.mask(mask=False):
            mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = pf.fit(model, real(5.0, 6.0, 7.0, 8.0), seed=0, progress=False)
    assert posterior.verdict.status == "ok"
    assert abs(float(posterior.samples["mu"].mean()) - 6.5) < 0.05
    assert posterior.density.structure.improper == ["mu"]
    assert abs(float(posterior.samples["mu"].std()) - 0.5) < 0.03


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_data(dtype):
    y = real(0.3, -0.2, 1.7).to(dtype)
    density = pf.LogDensity(numbers, (y,))
    z = normal(4, 1, seed=36, dtype=dtype)
    by_hand = torch.stack([gauss(mu, 0.0, 5.0) + gauss(y, mu, 1.0) for mu in z])
    value, gradient = density.value_and_grad(z)
    assert {density.dtype, value.dtype, gradient.dtype, density(z).dtype, density.constrain(z)["mu"].dtype} == {dtype}
    close(value, by_hand.to(dtype), 1e-5 if dtype == torch.float32 else 1e-6)  # 5.0 and 1.0 reach Pyro as float32
    assert density.predictive(z)["y"].dtype == dtype
    assert pf.AutoRealNVP(numbers, layers=2).initialize(y).sample_posterior(2)["mu"].dtype == dtype


# random numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.falls_back
@pytest.mark.parametrize("model", [numbers, missing, takes_item, mixture])
def test_draws_are_seeded_and_leave_the_global_state_alone(model):
    y = {"missing": GAPS, "takes_item": Y}.get(model.__name__, real(0.3, -0.2, 1.7))
    density = pf.LogDensity(model, (y,))
    z = normal(5, density.dim, seed=40, dtype=density.dtype)
    state = torch.random.get_rng_state()
    first, again, other = (density.predictive(z, seed=seed) for seed in (1, 1, 2))
    prior, prior_again, prior_other = (density.prior(5, seed=seed) for seed in (1, 1, 2))
    density.unconstrain({name: prior[name] for name in density.names})
    assert torch.equal(torch.random.get_rng_state(), state)
    for draws, same, different in ((first, again, other), (prior, prior_again, prior_other)):
        for name in draws:
            torch.testing.assert_close(draws[name], same[name], rtol=0, atol=0, equal_nan=True)
        moved = [name for name in draws if not torch.equal(draws[name], different[name])]
        assert set(moved) == set(draws)
    assert len(first) == len(density.structure.observed)
    assert next(iter(first.values())).unique().numel() > 4, "one draw for all rows"


def test_predictive_draws_have_the_likelihoods_moments():
    """20,000 draws; five standard errors: failure rate below 1e-6 each."""
    density = pf.LogDensity(numbers, (real(0.3, -0.2, 1.7),))
    y = density.predictive(real([2.0]).expand(20_000, 1))["y"]
    assert y.shape == (20_000, 3)
    assert (y.mean(0) - 2.0).abs().max() < 5 / 20_000**0.5
    assert (y.var(0) - 1.0).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert torch.corrcoef(y.T).triu(1).abs().max() < 5 / 20_000**0.5
    mu = density.prior(20_000)["mu"]
    assert abs(mu.std() - 5.0) < 5 * 5.0 / 40_000**0.5


def test_predictive_draws_one_number_for_each_observed_value():
    """Without a plate, one distribution scores all of the data."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    density = pf.LogDensity(model, (real(0.3, -0.2, 1.7),))
    for draws in (density.predictive(real([[0.0], [1.0]]))["y"], density.prior(2)["y"]):
        assert draws.shape == (2, 3)
        assert draws.unique().numel() == 6


def test_improper_priors_have_no_draws():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    density = pf.LogDensity(model, (Y,))
    assert density.prior(3) is None
    assert density.predictive(real([[0.0]]))["y"].shape == (1,)


def test_dependent_supports_beside_enumerated_sites():
    @config_enumerate
    def model(y):
        alpha = pyro.sample("alpha", dist.Uniform(real(0.0), 1.0))
        beta = pyro.sample("beta", dist.Uniform(real(0.0), 1.0 - alpha))
        k = pyro.sample("k", dist.Bernoulli(alpha))
        pyro.sample("y", dist.Normal(k, beta), obs=y)

    density = pf.LogDensity(model, (Y,))
    z = normal(3, 2, seed=41)
    values = density.constrain(z)
    state = torch.random.get_rng_state()
    close(density.unconstrain(values), z, 1e-9)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_mask_may_be_wider_than_a_scalar():
    def model():
        with poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("x", dist.Normal(real(0.0), 1.0))

    density = pf.LogDensity(model)
    assert density.dim == 1
    z = normal(4, 1, seed=40)
    close(density(z), 2.0 * dist.Normal(real(0.0), 1.0).log_prob(z).sum(1), 1e-9)
