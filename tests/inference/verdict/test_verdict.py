"""The verdict: each threshold from both sides, moments and quantiles by hand, and which draws are used."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyro_flows.inference.verdict import deciding
from pyro_flows.inference.verdict import weighing as module
from pyro_flows.inference.verdict.deciding import decide, judge
from pyro_flows.inference.verdict.verdict import next_step
from pyro_flows.inference.verdict.weighing import Weighing, heavy_tails, resample, weigh
from tests.registry import normal

S = 20_000
NAMES = ("a", "b")


def pair(first, second=0.0):
    return torch.tensor([first, second], dtype=torch.float64)


def weighing(count=S, **changes):
    """Draws about which there is nothing to say, but for the ``changes``; ``ess`` is a share of the draws."""
    given = {"k_hat": 0.1, "elbo": 0.0, "log_evidence": 0.02, "mean_shift": pair(0.02), "sd_shift": pair(0.02)}
    given |= {"widening": 0.0, "distance": 0.02, "broken": 0} | changes
    return Weighing(log_weights=torch.zeros(count), **given | {"ess": changes.get("ess", 0.95) * count})


# judge ----------------------------------------------------------------------------------------------------------------

MOVED = {"mean_shift": pair(0.02, 0.3), "distance": 0.3}
NARROW = {"sd_shift": pair(0.3)}
TABLE = [
    ({}, "ok", ""),
    # k-hat, whose threshold depends on the number of draws
    ({"k_hat": 0.699}, "ok", ""),
    ({"k_hat": 0.7}, "unreliable", "k-hat 0.70 is not below its threshold 0.70"),
    ({"k_hat": 0.66, "count": 1000}, "ok", ""),
    ({"k_hat": 0.67, "count": 1000}, "unreliable", "k-hat 0.67 is not below its threshold 0.67"),
    ({"k_hat": math.inf}, "unreliable", "k-hat inf"),
    ({"k_hat": math.nan}, "unreliable", "k-hat nan"),
    # the effective sample size
    ({"ess": 0.1}, "ok", ""),
    ({"ess": 0.0999}, "unreliable", "ESS/S 0.100 is below 0.1"),
    # what weighting changes
    ({"mean_shift": pair(0.0, 0.1)}, "ok", ""),
    ({"mean_shift": pair(0.0, 0.101)}, "corrected", "changes the mean of b by 0.10 sd"),
    ({"mean_shift": pair(math.nan)}, "unreliable", "a mean or an sd of a is not a number"),
    ({"sd_shift": pair(0.1)}, "ok", ""),
    ({"sd_shift": pair(0.101)}, "corrected", "changes the sd of a by a factor 1.11"),
    ({"sd_shift": pair(0.0, 0.11)}, "corrected", "changes the sd of b by a factor 1.12"),
    ({"sd_shift": pair(0.0, math.nan)}, "unreliable", "a mean or an sd of b is not a number"),
    # a k-hat at which weights correct nothing, if there is something to correct
    ({**MOVED, "k_hat": 0.499}, "corrected", "changes the mean of b"),
    ({**MOVED, "k_hat": 0.5}, "unreliable", "k-hat 0.50 is not below 0.5 and weighting changes the results"),
    ({**NARROW, "k_hat": 0.499}, "corrected", "changes the sd of a"),
    ({**NARROW, "k_hat": 0.5}, "unreliable", "the weights have infinite variance"),
    ({**NARROW, "k_hat": 0.5, "ess": 0.979}, "unreliable", "the weights have infinite variance"),
    ({**NARROW, "k_hat": 0.5, "ess": 0.981}, "corrected", "changes the sd of a by a factor"),  # far draws go
    ({**NARROW, "k_hat": 0.7, "ess": 0.981}, "unreliable", "k-hat 0.70"),
    ({**NARROW, "k_hat": 0.5, "ess": 0.981, "widening": 0.101}, "unreliable", "the weights have infinite variance"),
    ({**MOVED, "k_hat": 0.5, "ess": 0.981}, "unreliable", "the weights have infinite variance"),
    ({"k_hat": 0.5}, "ok", ""),
    # more than weights can correct
    ({"sd_shift": pair(0.69), "widening": 0.69}, "corrected", "factor 1.99"),
    ({"sd_shift": pair(0.70), "widening": 0.70}, "unreliable", "widens the sd of a 2.01 times, too much to correct"),
    ({"sd_shift": pair(0.90), "widening": -0.9}, "corrected", "factor 2.46"),  # narrowing is another thing
    ({"mean_shift": pair(1.0), "distance": 1.0}, "corrected", "changes the mean of a by 1.00 sd"),
    (
        {"mean_shift": pair(1.0), "distance": 1.001},
        "unreliable",
        "changes the mean of a by 1.00 sd, too much to correct",
    ),
    ({"distance": math.nan}, "unreliable", "too much to correct"),
    # draws that are impossible
    ({"broken": 1}, "corrected", "1 draws have no finite log density"),
    ({"broken": 1, "k_hat": 0.6}, "corrected", "1 draws have no finite log density"),
]


def check_table(rows=None):
    for changes, status, reason in TABLE if rows is None else rows:
        found = judge(weighing(**changes), NAMES)
        assert found.status == status, (changes, str(found))
        assert reason in "; ".join(found.reasons), (changes, found.reasons)
        assert bool(found.reasons) == (status != "ok")


@pytest.mark.parametrize("row", TABLE, ids=[str(number) for number in range(len(TABLE))])
def test_each_threshold_from_both_sides(row):
    check_table([row])


def test_what_the_fit_says():
    fine = weighing()
    warned = judge(fine, NAMES, warnings=["cut short"])
    assert (warned.status, warned.reasons) == ("corrected", ("cut short",))
    assert judge(replace(fine, k_hat=0.6), NAMES, warnings=["cut short"]).status == "corrected"
    failed = judge(fine, NAMES, failures=["a mode is missing"], warnings=["cut short"])
    assert (failed.status, failed.reasons) == ("unreliable", ("a mode is missing", "cut short"))
    assert "Do not use the draws. Why: a mode is missing; cut short. Next step: " in str(failed)
    noted = judge(fine, NAMES, notes=["no search was made"])
    assert noted.status == "ok"
    assert str(noted).endswith("Note: no search was made.")


@pytest.mark.parametrize(("factor", "status"), [("0.84", "corrected"), ("1.15", "unreliable")])
def test_values_that_widen_are_not_corrected_by_weights_of_infinite_variance(factor, status):
    """An sd of exp(z) was widened by such weights, and `corrected`, where that of z was hardly moved."""
    changed = [f"importance weighting changes the sd of the values of v by a factor {factor}"]
    for moved in ({}, NARROW):
        assert judge(weighing(**moved, k_hat=0.55, ess=0.985), NAMES, changed=changed).status == status


def test_the_figures_of_a_verdict():
    found = judge(weighing(mean_shift=pair(0.01, 0.04), sd_shift=pair(0.03)), NAMES)
    assert (found.mean_shift, found.sd_shift, found.where) == (0.04, 0.03, "b")
    assert (found.k_hat, found.k_threshold, found.ess_ratio) == (0.1, 0.7, pytest.approx(0.95))


# weigh ----------------------------------------------------------------------------------------------------------------


def gauss(z, loc, sd):
    return torch.distributions.Normal(loc, torch.as_tensor(sd, dtype=torch.float64)).log_prob(z).sum(-1)


def check_weigh():
    """Draws of N(0, 1) weighted to N((.5, 0), (1, 1)): shifts, evidence, ELBO and sample size in closed form."""
    z, target = normal(S, 2, seed=1), pair(0.5)
    found = weigh(z, gauss(z, target, 1.0) + 3.0, gauss(z, 0.0, 1.0))
    # standard errors: .009 for the shift, .0038 for log evidence and ELBO, .006 for the sample size
    assert float(found.mean_shift[0]) == pytest.approx(0.5, abs=0.04)
    assert float(found.mean_shift[1]) < 0.04
    assert found.log_evidence == pytest.approx(3.0, abs=0.016)
    assert found.elbo == pytest.approx(3.0 - 0.125, abs=0.016)
    assert found.ess / S == pytest.approx(math.exp(-0.25), abs=0.024)
    assert found.distance == pytest.approx(float(found.mean_shift.max()))
    assert found.k_hat < 0.4


def test_moments_of_weighted_draws():
    check_weigh()


@pytest.mark.parametrize("wider", [1.3, 0.8])
def test_spreads_of_weighted_draws(wider):
    z = normal(S, 1, seed=2)
    found = weigh(z, gauss(z, 0.0, wider), gauss(z, 0.0, 1.0))
    assert float(found.sd_shift) == pytest.approx(abs(math.log(wider)), abs=0.05)
    assert found.widening == pytest.approx(math.log(wider), abs=0.05)


def test_equal_weights_have_no_tail():
    z = normal(1000, 2, seed=3)
    found = weigh(z, gauss(z, 0.0, 1.0), gauss(z, 0.0, 1.0))
    assert (found.k_hat, found.ess, found.broken) == (0.0, pytest.approx(1000), 0)
    level = torch.where(torch.arange(1000) % 100 == 0, math.log(1.4), 0.0)
    assert weigh(z, level, torch.zeros(1000)).k_hat <= 0.0
    assert weigh(z, 3.0 * z[:, 0] ** 2, torch.zeros(1000)).k_hat > 0.5


def test_impossible_draws_count_as_draws():
    z = normal(1000, 2, seed=4)
    log_q = gauss(z, 0.0, 1.0)
    log_p = torch.where(z[:, 0] > 0, log_q, -torch.inf)
    found = weigh(z, log_p, log_q)
    half = int((z[:, 0] > 0).sum())
    assert found.broken == 1000 - half
    assert found.log_evidence == pytest.approx(math.log(half / 1000))
    assert found.elbo == pytest.approx(0.0)
    assert found.distance < 1e-6 < float(found.mean_shift[0])  # possible draws are where they should be
    for bad in (torch.full_like(log_q, -torch.inf), torch.full_like(log_q, torch.nan)):
        none = weigh(z, bad, log_q)
        assert (none.broken, none.k_hat, none.ess) == (1000, math.inf, 0.0)
        assert judge(none, NAMES).status == "unreliable"


# heavy tails ----------------------------------------------------------------------------------------------------------

COLUMNS = 100


@functools.cache
def columns(name):
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(16_000, COLUMNS, generator=generator, dtype=torch.float64)
    bell = torch.randn(16_000, COLUMNS, generator=generator, dtype=torch.float64)
    if name == "t2":  # by the inverse of its distribution function
        return (2 * uniform - 1) * (2 / (4 * uniform * (1 - uniform))).sqrt()
    made = {"normal": bell, "exponential": -uniform.log(), "lognormal": (0.5 * bell).exp()}
    made |= {"cauchy": torch.tan(math.pi * (uniform - 0.5)), "left": -(uniform**-0.9), "uniform": uniform}
    return made[name]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("uniform", 0.0, 0.0),
        ("normal", 0.0, 0.0),
        ("exponential", 0.0, 0.02),
        ("lognormal", 0.0, 0.03),
        ("t2", 0.9, 1.0),
        ("cauchy", 1.0, 1.0),
        ("left", 1.0, 1.0),
    ],
)
def test_heavy_tails_by_their_share_in_a_hundred_samples(name, least, most):
    share = float(heavy_tails(columns(name)).double().mean())
    assert least <= share <= most, share


def test_few_draws_say_nothing_about_tails():
    assert not bool(heavy_tails(columns("cauchy")[:90]).any())


def check_quantile_shifts():
    """Against numpy's interpolation between the middles of weights, and its quantiles where weights are equal."""
    points = columns("cauchy")[:4000, :3]
    weights = torch.softmax(torch.tanh(points[:, 0]) + 0.3 * normal(4000, seed=6), 0)
    moved, narrowed = module._quantile_shifts(points, weights)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    for column in range(3):
        x = points[:, column].numpy()
        raw = np.quantile(x, levels)
        order = np.argsort(x)
        middles = np.cumsum(weights.numpy()[order]) - 0.5 * weights.numpy()[order]
        weighted = np.interp(levels, (middles - middles[0]) / (middles[-1] - middles[0]), x[order])
        scale = (weighted[3] - weighted[1]) / 1.349
        assert float(moved[column]) == pytest.approx(np.abs(raw - weighted)[1:4].max() / scale, rel=1e-6)
        ratios = [math.log((raw[j] - raw[i]) / (weighted[j] - weighted[i])) for i, j in ((0, 4), (1, 3))]
        assert float(narrowed[column]) == pytest.approx(max(ratios, key=abs), rel=1e-6)
    for none in module._quantile_shifts(points[:400], torch.full((400,), 1.0 / 400, dtype=torch.float64)):
        assert float(none.abs().max()) < 1e-9


def test_quantile_shifts():
    check_quantile_shifts()


@pytest.mark.parametrize(
    ("values", "weights", "median"),
    [
        ([0.0, 1.0, 5.0, 9.0], [0.5, 0.0, 0.0, 0.5], 4.5),
        ([0.0, 1.0, math.inf], [0.5, 0.5, 0.0], 0.5),
        ([3.0], [1.0], 3.0),
    ],
)
def test_values_without_weight_leave_quantiles_as_they_are(values, weights, median):
    rows = torch.tensor([values], dtype=torch.float64)
    weights, level = torch.tensor(weights, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert float(module.weighted_quantiles(rows, rows.argsort(1), weights, level)) == median


def test_columns_with_heavy_tails_are_judged_by_quantiles():
    """The weights are equal, but for noise: means of a Cauchy distribution would differ by many sds or none."""
    z = torch.stack([columns("cauchy")[:, 0], columns("normal")[:, 0]], 1)
    noise = 0.2 * normal(len(z), seed=7)
    found = judge(weigh(z, noise, torch.zeros(len(z))), NAMES)
    assert found.status == "ok"
    said = "a: heavy tails where unconstrained, so quantiles were compared; means and sds there may not exist"
    assert found.notes == (said,)
    moved = judge(weigh(z, 0.5 * torch.tanh(z[:, 0]), torch.zeros(len(z))), NAMES)
    assert moved.status == "corrected"
    assert "mean of a" in moved.reasons[0]


def test_far_draws_of_no_weight_are_no_heavy_tail():
    """A twentieth of the draws is from a Cauchy distribution, where the posterior is normal."""
    z = normal(S, 1, seed=4).double()
    z[::20] = torch.distributions.Cauchy(0.0, 5.0).icdf(torch.linspace(0.001, 0.999, S // 20).double())[:, None]
    main, far = torch.distributions.Normal(0.0, 1.0), torch.distributions.Cauchy(0.0, 5.0)
    log_q = torch.logaddexp(math.log(0.95) + main.log_prob(z), math.log(0.05) + far.log_prob(z)).sum(1)
    assert bool(heavy_tails(z).all())
    found = judge(weigh(z, main.log_prob(z).sum(1), log_q), ["a"])
    assert not found.notes
    assert found.status == "corrected"
    assert found.reasons[0].startswith("importance weighting changes the sd of a by a factor ")


def test_many_columns_with_heavy_tails_are_counted():
    z = columns("cauchy")[:, :5]
    found = judge(weigh(z, torch.zeros(len(z)), torch.zeros(len(z))), "abcde")
    assert found.notes[0].startswith("a, b, c and 2 more: heavy tails")


# decide ---------------------------------------------------------------------------------------------------------------


def decision(shift, again=None, **options):
    """Draws of N(0, 1), of which the model says N(shift, 1)."""

    def draw(count):
        z = normal(count, 1, seed=8)
        return z, gauss(z, 0.0, 1.0)

    return decide(draw, lambda z: gauss(z, shift, 1.0), NAMES, draws=1000, seed=0, again=again, **options)


def never():
    raise AssertionError("a second pool is drawn only where draws are to be corrected")


def test_draws_that_are_fine_are_used_as_they_are():
    found = decision(0.0, never)
    assert found.verdict.status == "ok"
    assert torch.equal(found.used, found.z)
    assert torch.equal(found.z, normal(4000, 1, seed=8)[:1000])
    assert len(found.weighing.log_weights) == 4000


def check_resampled():
    """Draws that are off by .3 sd are moved to where they belong, and each keeps its own densities."""
    found = decision(0.3, lambda: weighing(mean_shift=pair(0.3), distance=0.3))
    assert found.verdict.status == "corrected"
    assert float(found.used.mean()) == pytest.approx(0.3, abs=0.12)  # standard error .033
    assert float(found.z.mean()) == pytest.approx(0.0, abs=0.12)
    torch.testing.assert_close(found.used_log_p, gauss(found.used, 0.3, 1.0))
    torch.testing.assert_close(found.used_log_q, gauss(found.used, 0.0, 1.0))
    torch.testing.assert_close(found.log_weights.exp().sum(), torch.ones((), dtype=torch.float64))
    assert len(found.used) == len(found.z) == 1000


def test_draws_that_miss_are_resampled():
    check_resampled()


@pytest.mark.parametrize(
    ("second", "status"),
    [(weighing(), "corrected"), (weighing(**MOVED, k_hat=0.45), "corrected"), (weighing(k_hat=0.75), "unreliable")],
)
def test_a_second_pool_has_to_be_no_worse(second, status):
    found = decision(0.3, lambda: second)
    assert found.verdict.status == status
    assert torch.equal(found.used, found.z) == (status == "unreliable")
    if status == "unreliable":
        assert (
            found.verdict.reasons[0]
            == "a second sample from the guide fails the check (k-hat 0.75 is not below its threshold 0.70)"
        )


def test_an_invalid_model_is_no_posterior():
    seen = []
    found = decision(0.0, complaint=lambda z: seen.append(len(z)) or "a scale of -1")
    assert seen == [deciding.CHECKED]
    assert found.verdict.status == "unreliable"
    assert found.verdict.reasons == ("the model is invalid at some draws: a scale of -1",)


def test_few_draws_tell_nothing():
    for count, few in ((8, True), (99, True), (100, False)):
        found = judge(weighing(count, k_hat=math.inf), NAMES, warnings=("stopped at max_seconds=1",))
        assert found.status == "unreliable"
        assert math.isnan(found.k_hat) == few
        assert (f"too few draws to judge ({count})" in found.reasons) == few
        assert ("k-hat" not in str(found)) == few
        assert found.next_step == "give a larger max_seconds"


@pytest.mark.parametrize("method", [None, "guide"])
def test_the_time_comes_before_what_is_met_for_lack_of_it(method):
    reasons = ("the model is invalid at some draws: a scale of -1", "stopped at max_seconds=3 before training")
    assert next_step(reasons, method) == "give a larger max_seconds"
    assert next_step(reasons[:1], method) == "check the data and the priors"
    earlier = "the posterior seems to be improper: along x, whose prior is improper (give `x` a proper prior)"
    assert next_step((earlier,), method) == "give `x` a proper prior"


def test_resampling_is_systematic():
    """Each draw comes as often as its weight says, up to one; in random order; by the seed alone."""
    log_weights = torch.log_softmax(2.0 * normal(50, seed=9), 0)
    index = resample(log_weights, 1000, seed=3)
    counts = torch.bincount(index, minlength=50)
    assert float((counts - 1000 * log_weights.exp()).abs().max()) < 1.0 + 1e-9
    assert not torch.equal(index, index.sort().values)
    assert torch.equal(index, resample(log_weights, 1000, seed=3))
    assert not torch.equal(index, resample(log_weights, 1000, seed=4))
    assert not bool((resample(torch.tensor([0.0, -torch.inf]), 100, seed=0) == 1).any())
