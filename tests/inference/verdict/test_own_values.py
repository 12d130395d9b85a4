"""What weighting changes in the model's own values."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_flows.inference.verdict.deciding import decide
from pyro_flows.inference.verdict.weighing import changed_values
from tests.registry import normal

S = 16_000


def exponential(rate, seed):
    return -torch.rand(S, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log() / rate


def even():
    return torch.full((S,), -math.log(S), dtype=torch.float64)


def test_a_tail_that_the_coordinate_hardly_shows_shows_in_its_exponential():
    """One draw in 500 of q has the rate 1 in place of 12: the sd of u is 5 % larger, and that of exp(u) 20 times."""
    u, far = exponential(12.0, seed=1), exponential(1.0, seed=2)
    u = torch.where(torch.arange(S) % 500 == 0, far + 1.0, u)
    log_p, log_q = 12.0 * -u, torch.logaddexp(12.0 * -u + math.log(0.998), -(u - 1.0) - 8.7)
    weights = torch.log_softmax(log_p - log_q, 0)
    (said,) = changed_values({"theta": u.exp()}, weights)
    assert said.startswith("importance weighting changes the sd of the values of theta by a factor 0.")
    assert changed_values({"theta": exponential(12.0, seed=3).exp()}, even()) == []


@pytest.mark.parametrize(("power", "found"), [(0.05, False), (0.3, True)])
def test_a_mean_that_weighting_moves(power, found):
    x = normal(S, 2, 3, seed=4)
    weights = torch.log_softmax(power * x[:, 1, 2], 0)
    said = changed_values({"x": x}, weights)
    assert bool(said) is found
    if found:
        assert said[0].startswith("importance weighting changes the mean of the values of x[1,2] by 0.")


def test_of_values_without_fourth_moments_quantiles_are_compared_and_whole_numbers_are_left_out():
    heavy = exponential(2.0, seed=5).exp()  # a Pareto distribution of index 2
    few = torch.log_softmax(-(heavy > 50.0).double(), 0)
    assert changed_values({"heavy": heavy, "k": torch.arange(S)}, few) == []
    assert changed_values({"none": torch.zeros(S, 0).double()}, even()) == []
    (said,) = changed_values({"fine": normal(S, seed=6), "heavy": heavy}, torch.log_softmax(0.3 * heavy.log(), 0))
    assert said.startswith("importance weighting changes the 95 % quantile of the values of heavy by ")


def test_a_long_tail_of_the_draws_to_use_is_held_to_all_draws():
    """A lie of the zoo: 3 % of the draws to use in place of 5, where a flow had 4 %. They were 1.7 sds short."""
    heavy, draws = exponential(2.0, seed=5).exp(), S // 4
    assert changed_values({"tau": heavy}, even(), draws) == []
    far = heavy > heavy.quantile(0.95)
    unlucky = torch.where(far[:draws], torch.arange(draws) % 5 < 3, True)
    heavy = torch.cat([heavy[:draws][unlucky], heavy[draws:], heavy[:draws][~unlucky]])
    (said,) = changed_values({"tau": heavy}, even(), int(unlucky.sum()))
    assert said.startswith("importance weighting changes the 95 % quantile of the values of tau by ")


def test_a_small_change_of_an_sd_that_weights_tell_exactly_shows():
    """Draws and weighted draws are the same ones: taken as independent, an sd 15 % too large passed for chance."""
    u = 0.434 + 0.64 * normal(S // 2, seed=10)  # for a generalized inverse Gaussian exp(u)
    weights = torch.log_softmax(u - u.exp() - (-u).exp() + 0.5 * ((u - 0.434) / 0.64) ** 2, 0)
    (said,) = changed_values({"x": u.exp()}, weights)
    assert said.startswith("importance weighting changes the sd of the values of x by a factor 0.8")


@pytest.mark.parametrize("seed", range(30, 34))
def test_an_sd_that_is_short_by_more_than_chance_shows(seed):
    """Three errors and .1 were added up: in one of ten fits of counts, an sd 20 % too small was ok."""
    values = exponential(1.25, seed)[:1000]
    assert changed_values({"x": values}, torch.log_softmax(0.0 * values, 0)) == []
    (said,) = changed_values({"x": values}, torch.log_softmax(0.15 * values, 0))
    assert said.startswith("importance weighting changes the ")


def test_a_few_draws_without_weight_do_not_widen_the_draws_to_use():
    """A lie found by hand: three draws had weights of e^-9, and the sd of an inverse-gamma site was 24 % too large."""
    u = -0.63 + 0.72 * normal(S, seed=11)
    u[:5] = torch.tensor([2.728, 2.785, 2.808, 2.728, 2.785])
    log_p = -0.5 * u - 0.5 * (-u).exp() - u.exp()
    weights = torch.log_softmax(log_p + 0.5 * ((u + 0.63) / 0.72) ** 2, 0)
    calm = torch.cat([u[5:], u[:5]])
    assert changed_values({"t": calm.exp()}, weights.roll(-5), S // 4) == []
    (said,) = changed_values({"t": u.exp()}, weights, S // 4)
    assert said.startswith("importance weighting changes the sd of the values of t by a factor 0.")


def test_the_worst_of_several_is_named():
    a, b = normal(S, seed=6), normal(S, seed=7)
    weights = torch.log_softmax(0.2 * a + 0.5 * b, 0)
    (said,) = changed_values({"a": a, "b": b}, weights)
    assert " b " in said


def test_an_sd_that_becomes_smaller_does_not_hide_one_that_becomes_larger():
    """The verdict minds it less: weights of infinite variance may take far draws away."""
    a, b = normal(S, seed=6), normal(S, seed=7)
    weights = torch.log_softmax(-0.5 * a.square() + 0.15 * b.square(), 0)
    for values in ({"a": a, "b": b}, {"both": torch.stack([a, b], 1)}, {"b": b, "a": a}):
        (said,) = changed_values(values, weights)
        assert said.split(" of the values of ")[1].startswith(("b by a factor 1.", "both[1] by a factor 1."))
    (said,) = changed_values({"a": a}, weights)
    assert said.endswith("a by a factor 0.71")


def test_what_weighting_changes_besides_is_corrected():
    z, said = normal(S, 1, seed=8), []

    def changed(pool, log_weights):
        said.append((pool.shape, log_weights.shape))
        return ["importance weighting changes the sd of the values of theta by a factor 0.23"]

    given = (lambda n: (z[:n], z[:n, 0] * 0.0), lambda points: points[:, 0] * 0.0, ["theta"])
    found = decide(*given, draws=S // 4, seed=0, changed=changed)
    assert said == [((S, 1), (S,))]
    assert found.verdict.status == "corrected"
    assert found.verdict.reasons == ("importance weighting changes the sd of the values of theta by a factor 0.23",)
    assert decide(*given, draws=S // 4, seed=0).verdict.status == "ok"
