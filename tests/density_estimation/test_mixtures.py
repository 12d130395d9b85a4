"""Gaussian mixtures: expectation maximization, the number of parts, and the flow that begins at one."""

import math
import warnings

import pytest
import torch

import pyro_flows as pf
from pyro_flows.density_estimation.mixtures import STRENGTHS, choose, maximize

CENTERS = torch.tensor([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 6.0, 0.0], [6.0, 6.0, 3.0]])


def clusters(count, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(4, (count,), generator=generator)
    noise = torch.randn(count, 3, generator=generator) * torch.tensor([0.3, 1.0, 0.6])
    return CENTERS[places] + noise


def white(x):
    return (x - x.mean(0)) / x.std(0)


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
    assert parts.score(test) == pytest.approx(float(best.log_prob(test).mean()), abs=0.05)


@pytest.mark.parametrize("count", [300, 3000])
def test_the_number_of_parts_is_chosen(count):
    torch.manual_seed(0)
    x = white(clusters(count, 0))
    parts = choose(x, white(clusters(1000, 1)) if count > 1000 else None)
    assert 4 <= len(parts.log_weights) <= 20
    few = maximize(x, 2, strength=0.1, steps=50, over=lambda: False)
    assert parts.score(white(clusters(2000, 2))) > few.score(white(clusters(2000, 2))) + 0.1
    assert len(choose(torch.randn(500, 3), None).log_weights) <= 2
    assert len(parts.split(20).log_weights) >= 20
    assert parts.split(20).score(x) == pytest.approx(parts.score(x), abs=0.03)
    assert len(choose(torch.randn(2, 3), None).log_weights) == 1


def test_few_points_of_many_coordinates_have_a_proper_covariance():
    torch.manual_seed(0)
    parts = maximize(torch.randn(30, 40), 2, strength=STRENGTHS[0], steps=20, over=lambda: False)
    assert all(bool(torch.isfinite(part).all()) for part in parts)
    assert parts.score(torch.randn(100, 40)) > -120.0


def test_most_values_may_be_equal():
    """The variance of a part of equal values was a difference of squares below zero in single precision."""
    torch.manual_seed(0)
    x = white(torch.where(torch.rand(1500, 1) < 0.4, 0.0, torch.rand(1500, 1).log().abs()))
    parts = maximize(x, 60, strength=0.1, steps=25, over=lambda: False)
    assert math.isfinite(parts.score(x))


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
    parts = choose((x - loc) / scale, (held_out - loc) / scale)
    for points, slack in ((held_out, 0.02), (test, 0.1)):
        alone = parts.score((points - loc) / scale) - float(scale.log().sum())
        assert found.nats(points) > alone - slack


def test_a_mixture_is_saved_loaded_and_resumed(tmp_path):
    x = clusters(300, 0)
    first = pf.fit_density(x, max_epochs=4, learning_rate=0.003, progress=False)
    first.save(tmp_path / "density")
    again = pf.DensityFit.load(tmp_path / "density")
    assert torch.equal(again.log_prob(x), first.log_prob(x))
    assert torch.equal(again.sample(5, seed=0), first.sample(5, seed=0))
    options = {"max_epochs": 4, "learning_rate": 0.003, "progress": False, "checkpoint": tmp_path / "run"}
    whole = pf.fit_density(x, **options)
    resumed = pf.fit_density(x, **options)
    assert torch.equal(whole.log_prob(x), resumed.log_prob(x))
    with pytest.raises(ValueError, match="temperature"):
        first.sample(3, temperature=0.5)
