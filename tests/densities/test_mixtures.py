"""Gaussian mixtures: expectation maximization, the number of parts, and the flow that begins at one."""

import math
import warnings

import pytest
import torch

import pyro_flows as pf
from pyro_flows.densities import mixtures
from pyro_flows.densities.mixtures import STRENGTHS, choose, maximize

CENTERS = torch.tensor([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 6.0, 0.0], [6.0, 6.0, 3.0]])


def clusters(count, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 3, generator=generator) * torch.tensor([0.3, 1.0, 0.6])
    return CENTERS[places] + noise


def white(x):
    return (x - x.mean(0)) / x.std(0)


def height(parts, x):
    """The mean log density of points."""
    return float(parts.log_prob(x).mean())


SCALES = torch.tensor([0.001, 1.0, 100.0])


def of_many_scales(count, seed):
    """Points (N, 2) of three clusters of far different scales, and the mean of their log density."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (count,), generator=generator)
    loc = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-300.0, 200.0]])
    x = loc[kind] + SCALES[kind, None] * torch.randn(count, 2, generator=generator)
    return x, -math.log(3.0) - math.log(2.0 * math.pi) - 1.0 - 2.0 * float(SCALES.log().mean())


def test_expectation_maximization_finds_the_clusters():
    torch.manual_seed(0)
    x = clusters(2000, 0)
    parts = maximize(x, 4, strength=0.01, steps=50, over=lambda: False)
    away = torch.cdist(CENTERS, parts.loc)
    assert bool((away.amin(1) < 0.2).all())
    assert torch.allclose(parts.log_weights.exp(), torch.full((4,), 0.25), atol=0.05)
    covariance = torch.linalg.inv(parts.factor.mT @ parts.factor)
    wanted = torch.tensor([0.09, 1.0, 0.36]).diag().expand(4, 3, 3)
    assert torch.allclose(covariance, wanted, atol=0.15)
    best = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(4)),
        torch.distributions.Independent(torch.distributions.Normal(CENTERS, torch.tensor([0.3, 1.0, 0.6])), 1),
    )
    test = clusters(4000, 1)
    assert height(parts, test) == pytest.approx(float(best.log_prob(test).mean()), abs=0.05)


@pytest.mark.parametrize("count", [300, 3000])
def test_the_number_of_parts_is_chosen(count):
    torch.manual_seed(0)
    x = white(clusters(count, 0))
    parts = choose(x, white(clusters(1000, 1)) if count > 1000 else None)[0]
    assert 4 <= len(parts.log_weights) <= 20
    few = maximize(x, 2, strength=0.1, steps=50, over=lambda: False)
    assert height(parts, white(clusters(2000, 2))) > height(few, white(clusters(2000, 2))) + 0.1
    assert len(choose(torch.randn(500, 3), None)[0].log_weights) <= 2
    assert len(parts.split(20).log_weights) >= 20
    assert height(parts.split(20), x) == pytest.approx(height(parts, x), abs=0.03)
    assert len(choose(torch.randn(2, 3), None)[0].log_weights) == 1


@pytest.mark.parametrize("count", [1500, 2500])
def test_narrow_parts_are_a_second_mixture_where_points_ask_for_it(count):
    """The prior of covariances gave each part some of the spread of all points: .5 nats behind a plain mixture."""
    torch.manual_seed(0)
    x, exact = of_many_scales(count, 0)
    scale = x.std(0)
    held_out = of_many_scales(800, 1)[0] / scale if count > 2000 else None
    wide, narrow = choose(x / scale, held_out, narrow=True)
    test, exact = of_many_scales(4000, 2)[0] / scale, exact + float(scale.log().sum())
    assert height(wide, test) < exact - 3.0
    assert height(narrow, test) > exact - 1.5
    assert len(choose(x / scale, held_out)) == len(choose(white(clusters(count, 0)), None, narrow=True)) == 1


def test_few_points_of_many_coordinates_have_a_proper_covariance():
    torch.manual_seed(0)
    parts = maximize(torch.randn(30, 40), 2, strength=STRENGTHS[0], steps=20, over=lambda: False)
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    assert height(parts, torch.randn(100, 40)) > -120.0


def test_most_values_may_be_equal():
    """The variance of a part of equal values was a difference of squares below zero in single precision."""
    torch.manual_seed(0)
    x = white(torch.where(torch.rand(1500, 1) < 0.4, 0.0, torch.rand(1500, 1).log().abs()))
    parts = maximize(x, 60, strength=0.1, steps=25, over=lambda: False)
    assert math.isfinite(height(parts, x))


def test_the_default_begins_at_a_mixture_and_does_not_end_behind_it():
    x, held_out, test = clusters(1500, 0), clusters(400, 1), clusters(4000, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pf.fit_density(x, validation=held_out, max_epochs=6, progress=False)
    kind, about = found.flow.recipe.around[0]
    assert kind == "mixture"
    assert about["components"] >= 3
    torch.manual_seed(0)
    loc, scale = x.mean(0), x.std(0)
    (parts,) = choose((x - loc) / scale, (held_out - loc) / scale, narrow=True)
    for points, slack in ((held_out, 0.02), (test, 0.1)):
        alone = height(parts, (points - loc) / scale) - float(scale.log().sum())
        assert found.nats(points) > alone - slack


@pytest.mark.parametrize("points", ["many scales", "integers"])
def test_narrow_parts_have_a_share_of_the_density(points):
    """Of both data sets, a mixture of Gaussians with a weak prior was ahead of the density, by up to .95 nats."""
    x = of_many_scales(1900, 0)[0]
    if points == "integers":
        x = torch.stack([x[:, 0] / x[:, 0].std(), torch.poisson(2.0 + torch.randn(len(x)).exp())], 1)
    train, test = x[:900], x[900:]
    found = pf.fit_density(train[90:], validation=train[:90], max_epochs=6, progress=False)
    share, base = found.settings["share_of_mixture"], found.flow.mixture
    assert f"a share of {share:.2g} of the density is a mixture that was not trained" in found.summary()
    assert 1.0 / 92.0 <= share <= 1.0
    assert float(base.share) == pytest.approx(share)
    u, ladj = found.flow.bijection.inverse_and_ladj(test)
    moved, narrow = (float((term + ladj).mean().detach()) for term in base().terms(u))
    assert narrow > moved + 0.3
    assert found.nats(test) > narrow - 0.02
    assert bool(torch.isfinite(found.sample(500, seed=0)).all())


def test_a_fitted_density_is_fitted_again_and_its_mixture_weighed_anew():
    """The mixture kept its share and its place, and so the flow hardly moved: 1.9 nats were lost in other units."""
    generator = torch.Generator().manual_seed(0)
    first, noise, other = torch.randn(3, 800, generator=generator)
    x = torch.where(torch.arange(800) % 2 == 0, first, 5.0 + 0.01 * first)
    x = torch.stack([x, x.square() + 0.1 * noise], 1)[other.argsort()]
    found = pf.fit_density(x[80:], validation=x[:80], max_epochs=5, progress=False)
    again = pf.fit_density(found.flow, 3.0 * x + 7.0, max_epochs=5, progress=False)
    assert again.nats(3.0 * x + 7.0) > found.nats(x) - 2.0 * math.log(3.0) - 0.5
    assert 0.0 < again.settings["share_of_mixture"] < 1.0
    unwatched = pf.fit_density(found.flow, x, validation=None, max_epochs=1, progress=False)
    assert "share_of_mixture" not in unwatched.settings
    assert unwatched.flow.mixture.components == found.flow.mixture.mixture.components


@pytest.mark.parametrize("context", [None, torch.linspace(-1.0, 1.0, 500)[:, None]])
def test_a_held_out_point_that_no_density_reaches(context):
    """Its gain was inf - inf, and so each density NaN."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    held_out = x[:50].clone()
    held_out[3] = 1e25
    validation = held_out if context is None else (held_out, context[:50])
    found = pf.fit_density(x, context=context, validation=validation, max_epochs=2, progress=False)
    assert found.nats(x, context) > -4.0


@pytest.mark.parametrize("narrow", [False, True])
def test_a_mixture_is_saved_loaded_and_resumed(tmp_path, monkeypatch, narrow):
    x = of_many_scales(600, 0)[0] if narrow else torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    first = pf.fit_density(x[60:], validation=x[:60], max_epochs=4, learning_rate=0.003, progress=False)
    first.save(tmp_path / "density")
    again = pf.DensityFit.load(tmp_path / "density")
    assert again.settings["share_of_mixture"] == first.settings["share_of_mixture"] > 0.0
    assert again.flow.mixture.fixed.components > 20 * narrow
    assert torch.equal(again.log_prob(x), first.log_prob(x))
    assert torch.equal(again.sample(5, seed=0), first.sample(5, seed=0))
    options = {"max_epochs": 4, "learning_rate": 0.003, "progress": False, "checkpoint": tmp_path / "run"}
    whole = pf.fit_density(x, **options)
    resumed = pf.fit_density(x, **options)
    assert torch.equal(whole.log_prob(x), resumed.log_prob(x))
    monkeypatch.setattr(mixtures, "WEAK", (0.5,))  # as if the clock had ended the search earlier
    later = pf.fit_density(x, **options)
    assert torch.equal(whole.log_prob(x), later.log_prob(x))
    with pytest.raises(ValueError, match="temperature"):
        first.sample(3, temperature=0.5)
