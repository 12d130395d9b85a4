"""The benchmark of crossed effects: the model, its density by sparse matrices, the long run, errors, the table."""

import json

import numpy as np
import pyro
import pytest
import torch

from benchmarks.crossed import exact, models
from benchmarks.crossed.reference import EFFECTS, REFERENCE
from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.crossed import Crossed
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.model.reading import read_structure
from pyro_flows.model.start import initial_value

LONG = json.loads(REFERENCE.read_text(encoding="utf-8"))
THETA = np.array([[3.0, -0.2, -1.0, -0.5, -2.0, 0.2], [2.5, 0.1, -0.3, -0.9, -1.0, -0.1]])


def small():
    rng = np.random.default_rng(0)
    numbers = {name: rng.permutation(np.arange(60) % n) for name, n in zip(EFFECTS, (7, 5, 3), strict=True)}
    return {**numbers, "service": rng.integers(2, size=60).astype(float), "rating": rng.normal(3.0, 1.0, 60)}


def test_the_density_by_sparse_matrices_is_that_of_dense_ones_and_of_the_model():
    given = small()
    design = np.concatenate([np.eye(n)[given[name]] for name, n in zip(EFFECTS, (7, 5, 3), strict=True)], 1)
    density, found, expected = exact.Ratings(given), [], []
    for theta in THETA:
        tau, sigma = np.exp(theta[2:5]), np.exp(theta[5])
        prior = np.repeat(tau**2, (7, 5, 3))
        whole = (design * prior) @ design.T + sigma**2 * np.eye(60)
        left = given["rating"] - theta[0] - theta[1] * given["service"]
        normal = torch.distributions.MultivariateNormal(torch.zeros(60).double(), torch.from_numpy(whole))
        log_prior = -0.5 * (theta[0] ** 2 / 25.0 + theta[1] ** 2 + (tau**2).sum() + sigma**2 / 4.0) + theta[2:].sum()
        expected.append(float(normal.log_prob(torch.from_numpy(left))) + log_prior)
        value, mean, variance = density(theta, moments=True)
        found.append(value)
        gain = (design * prior).T @ np.linalg.inv(whole)
        assert np.allclose(mean, gain @ left)
        assert np.allclose(variance, np.diag(np.diag(prior) - gain @ (design * prior)))
    assert np.allclose(found, expected)
    args = tuple(torch.as_tensor(value) for value in given.values())
    latents = read_structure(pyro.poutine.block(models.ratings, hide=EFFECTS), args, {}, initial_value).latents
    assert [latent.name for latent in latents] == list(models.GLOBALS)
    rows = Rows(models.ratings, latents, EFFECTS, (*args, 20), {})
    values = CrossedMarginal(Crossed(rows, torch.zeros(6).double()), 0)(torch.from_numpy(THETA))
    assert float(values[1] - values[0]) == pytest.approx(found[1] - found[0], abs=1e-8)


def test_importance_sampling_comes_to_the_moments_of_a_normal(monkeypatch):
    def normal(theta, *, moments=False):
        return -0.5 * float(((theta - 1.0) ** 2).sum()), theta[:2] * 2.0, np.full(2, 0.25)

    found = exact.weighted(normal, np.ones(6), np.eye(6), 4000)
    assert np.allclose(found["mean"][:2], 1.0, atol=0.07)
    assert np.allclose(found["sd"][:2], 1.0, atol=0.07)
    assert np.allclose(found["effect_sds"], np.sqrt(4.25), rtol=0.15)
    assert found["ess"] > 2000


def test_the_long_run_is_good_and_of_all_latents():
    counts = [len(LONG["sites"][name]["mean"]) for name in EFFECTS]
    assert counts == [2972, 1128, 14]
    assert LONG["r_hat"] < 1.02
    assert LONG["ess"] > 400
    assert LONG["divergent"] == 0


def test_errors_are_in_units_of_the_long_run():
    def draws(names, off):
        found = {}
        for name in names:
            mean, sd = (torch.tensor(LONG["sites"][name][what], dtype=torch.float64) for what in ("mean", "sd"))
            signs = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(500)
            found[name] = mean + sd * (off + signs.reshape(-1, *[1] * mean.dim()))
        return found

    off = models.errors(draws(models.GLOBALS, 0.2), draws(EFFECTS, 0.1))
    assert off.means == pytest.approx(0.2, abs=1e-6)
    assert off.effects == pytest.approx(0.1, abs=1e-6)
    assert max(off.sds, off.effect_sds) < 1e-3
