"""The benchmark of conditional densities: each method on a small set, its rows and its table."""

import math

import numpy as np
import pytest
import torch

from benchmarks.density import conditional


@pytest.fixture
def small(monkeypatch):
    """A linear set with normal noise, under the name of bimodal."""

    def make(rng, count):
        x = rng.normal(size=(count // 10, 2))
        return (x[:, :1] + 0.5 * rng.normal(size=(count // 10, 1))), x

    monkeypatch.setitem(conditional.PROBLEMS, "bimodal", conditional._synthetic(make))


@pytest.mark.parametrize("method", [conditional.OURS, conditional.NETWORK, conditional.LINEAR])
def test_methods_score_on_the_scale_of_the_outputs(small, method):
    found = conditional.run("bimodal", method, 0, 0.8)
    best = -0.5 * math.log(2.0 * math.pi * math.e * 0.25)
    assert best - 0.5 < found["test"] < best + 5 * found["error"]
    if method != conditional.NETWORK:
        least = 0.337 * 0.5 / math.sqrt(1.25)  # of normal noise, in sds of the outputs
        assert 0.9 * least < found["pinball"] < 1.15 * least


def test_forests_and_boosting(small):
    pytest.importorskip("sklearn")
    best = -0.5 * math.log(2.0 * math.pi * math.e * 0.25)
    assert best - 0.5 < conditional.run("bimodal", conditional.FOREST, 0, 1.0)["test"] < best + 0.1
    assert conditional.run("bimodal", conditional.BOOSTED, 0, 1.0)["pinball"] < 0.2


def test_sets_differ_by_seed_and_their_pinball_loss_is_least_at_the_quantiles():
    for name in ("bimodal", "heteroscedastic", "heavy tail", "two outputs"):
        first, second = (conditional.PROBLEMS[name](seed)[0] for seed in (0, 1))
        assert first.y.shape == second.y.shape
        assert not torch.equal(first.y, second.y)
    y = torch.from_numpy(np.random.default_rng(0).normal(size=2000))
    right = torch.special.ndtri(conditional.LEVELS).expand(2000, 9)
    assert conditional.pinball(y, right) < min(conditional.pinball(y, right + off) for off in (-0.2, 0.2))
