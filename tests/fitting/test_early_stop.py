"""A fit ends as soon as its weights leave nothing to see, and not before."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting import methods
from pyro_flows.fitting import rounds as samples
from pyro_flows.inference.training.convergence import Monitor
from pyro_flows.inference.training.loop import COOL
from pyro_flows.inference.verdict.deciding import shift_is_noise
from pyro_flows.inference.verdict.methods import MIXTURE
from tests.fitting.test_rounds import real, round_of

Y = torch.tensor([0.3, -1.2, 2.0, 0.4], dtype=torch.float64)


def normal(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 5.0).to_event(1))
    pyro.sample("y", dist.Normal(mu.sum(), 1.0).expand(y.shape).to_event(1), obs=y)


def skewed(y):
    """A rate of a Poisson count: log rate has skewness -0.8 at four events."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(1.0).double(), 0.1))
    level = pyro.sample("level", dist.Normal(torch.tensor(0.0).double(), 1.0))
    pyro.sample("count", dist.Poisson(rate), obs=torch.tensor(3.0).double())
    pyro.sample("y", dist.Normal(level, 1.0).expand(y.shape).to_event(1), obs=y)


def fitted(model, **options):
    found = pf.fit(model, Y, layers=4, progress=False, **options)  # who asks for layers gets a flow, and no slices
    return found, [stage for stage in found.history if stage["stage"] == "first round"]


def test_a_normal_posterior_needs_no_training():
    found, (only,) = fitted(normal)
    assert found.verdict.status == "ok"
    assert only["steps"] == 0
    assert "at the start" in only["why"]
    z = found.z.double()
    exact = torch.linalg.inv(torch.full((2, 2), 4.0) + torch.eye(2) / 25.0).double()
    torch.testing.assert_close(torch.cov(z.mT) / exact, torch.ones(2, 2).double(), atol=0.06, rtol=0.0)
    assert len(found.losses) == 0


@pytest.mark.slow
def test_a_skewed_posterior_needs_some_and_is_right():
    """Gamma(4, 1.1): mean 3.64, sd 1.82; standard errors with 10,000 draws .018 and about .016."""
    found, rounds = fitted(skewed, draws=10_000)
    assert found.verdict.status == "ok"
    assert 0 < rounds[0]["steps"] < 1000, "less than the least of a training that stops by itself"
    rate = found.samples["rate"]
    assert float(rate.mean()) == pytest.approx(4.0 / 1.1, abs=0.1)
    assert float(rate.std()) == pytest.approx(2.0 / 1.1, rel=0.06)


@pytest.mark.slow
def test_a_training_that_ended_too_early_goes_on(monkeypatch):
    looks = []

    def unsure(weighing):
        looks.append(weighing)
        return len(looks) == 3  # two looks at the start, and the first one while training

    monkeypatch.setattr(methods, "shift_is_noise", unsure)
    found, rounds = fitted(skewed)
    assert [stage["steps"] for stage in rounds[:1]] == [160 + COOL // 3]
    assert rounds[1]["steps"] >= 1000
    assert len(looks) == 4, "the second time no look ends it"
    assert found.verdict.status == "ok"


@pytest.mark.parametrize(("refine", "count"), [("auto", 1), pytest.param(False, 2, marks=pytest.mark.slow)])
def test_training_does_not_go_on_for_the_tail_of_even_weights(monkeypatch, refine, count):
    """A look that ends it, and a sample whose k-hat says no, though its weights are all alike: chains are cheaper."""
    looks = []

    def sure_once(weighing):
        looks.append(weighing)
        return len(looks) == 3

    def tail_in_doubt(name, trainer, training):
        found = assess(name, trainer, training)
        return replace(found, weighing=replace(found.weighing, k_hat=0.9, ess=0.97 * len(found.weighing.log_weights)))

    assess = methods.assess
    monkeypatch.setattr(methods, "shift_is_noise", sure_once)
    monkeypatch.setattr(methods, "assess", tail_in_doubt)
    found, rounds = fitted(skewed, refine=refine)
    assert len(rounds) == count
    if refine:
        assert found.verdict.status == "refined"
        assert not any(stage["stage"] == MIXTURE for stage in found.history)


class TrainingBegins(Exception):
    """Raised where training would begin."""


@pytest.mark.parametrize(("steps", "glances"), [(2, 1), (200, 0)])
def test_no_glance_at_the_modes_of_a_long_model(monkeypatch, steps, glances):
    """A survey takes hundreds of evaluations, and 200 steps of a recursion are as dear as many numbers."""
    seen = []

    def multimodal(density, *given, barrier, **told):
        seen.extend([density.dim] if barrier else [])

    def first_round(*_):
        raise TrainingBegins

    monkeypatch.setattr(methods, "multimodal", multimodal)
    monkeypatch.setattr(methods, "_first_round", first_round)

    def recursion(y):
        rate = pyro.sample("rate", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        level = y.new_zeros(())
        for _ in range(steps):
            level = torch.tanh(0.9 * level + rate[..., 0] + 0.5 * rate[..., 1])
        pyro.sample("y", dist.Normal(level, 1.0).expand(y.shape).to_event(1), obs=y)

    with pytest.raises(TrainingBegins):
        pf.fit(recursion, Y, max_steps=100, draws=400, progress=False)
    assert len(seen) == glances


INVISIBLE = [
    ({}, True),
    ({"ess": 1000.0, "mean_shift": real(0.0, 0.039)}, True),
    ({"ess": 1000.0, "mean_shift": real(0.0, 0.041)}, False),
    ({"ess": 1000.0, "sd_shift": real(0.039, 0.0)}, True),
    ({"ess": 1000.0, "sd_shift": real(0.041, 0.0)}, False),
    ({"ess": 1000.0, "quantile_shift": 0.039}, True),
    ({"ess": 1000.0, "quantile_shift": 0.041}, False),
    ({"ess": 500.0, "quantile_shift": 0.134}, True),  # 0.04 and three standard errors of 1 / sqrt(1000)
    ({"ess": 500.0, "quantile_shift": 0.135}, False),
    ({"log_evidence": 0.041}, False),
    ({"k_hat": 0.6}, False),
]


@pytest.mark.parametrize(("changes", "wanted"), INVISIBLE)
def test_invisible_from_both_sides(changes, wanted):
    assert shift_is_noise(round_of(**changes).weighing) is wanted


EVEN = [({"ess": 985.0}, True), ({"ess": 975.0}, False), ({"ess": 985.0, "k_hat": 0.5}, False),
        ({"ess": 985.0, "broken": 1}, False)]  # fmt: skip


@pytest.mark.parametrize(("changes", "wanted"), EVEN)
def test_even_weights_from_both_sides(changes, wanted):
    assert round_of(**changes).nearly_uniform is wanted


@pytest.mark.slow
def test_wanderers_are_left_out_only_where_weights_are_even(monkeypatch):
    asked = []
    original = pf.fitting.combine.missed_modes

    def missed_modes(*args, **options):
        asked.append(options["wandering"])
        return original(*args, **options)

    monkeypatch.setattr("pyro_flows.fitting.combine.missed_modes", missed_modes)
    fitted(normal)
    monkeypatch.setattr(samples, "ESS_SHARE_EVEN", 1.0)
    fitted(normal)
    assert asked == [False, True]


def monitor(*elbos, gap=0.01):
    return Monitor(elbos=list(elbos), gaps=[gap] * len(elbos))


def test_what_promises_enough_from_both_sides():
    assert monitor(-1.0, -0.5, -0.5, -0.5, -0.5).promises(0.04)
    assert not monitor(-0.5, -0.5, -0.5).promises(0.04), "too few checks"
    assert not monitor(-0.5, -0.5, -0.5, -0.5, gap=0.041).promises(0.04)
    assert monitor(-0.5, -0.5, -0.481, -0.481).promises(0.04)
    assert not monitor(-0.5, -0.5, -0.479, -0.479).promises(0.04), "the ELBO rises by more than .02 nats"
    assert monitor(-0.5, -0.5, -0.441, -0.441).promises(0.24), "in many dimensions, a quarter of the gap"


def test_the_gap_of_a_check_is_that_of_its_weights():
    watched = Monitor()
    log_weights = torch.tensor([0.0, 1.0, 2.0])
    watched.add(torch.zeros(3, 1), log_weights)
    assert watched.gaps == [pytest.approx(float(log_weights.exp().mean().log() - 1.0))]
    watched.add(torch.zeros(3, 1), replace_first(log_weights, -torch.inf))
    assert watched.gaps[-1] > 1e300


def replace_first(values, value):
    return torch.cat([torch.tensor([value]), values[1:]])


@pytest.mark.slow
def test_a_cool_down_is_tried_where_the_elbo_is_level():
    """Steps of full size keep the weights of fifty-six coordinates uneven; a short cool-down shows what is learned."""

    def correlated():
        z = pyro.sample("z", dist.Normal(torch.zeros(56).double(), 1.0).to_event(1))
        pyro.factor("bend", -0.5 * (z[1:] - 0.3 * z[:-1].square()).square().sum())

    posterior = pf.fit(correlated, progress=False, refine=False, escalate=False, draws=1000)
    (first, *_) = (stage for stage in posterior.history if stage["stage"] == "first round")
    assert COOL // 2 < first["steps"] < COOL + 400, first
    assert "weighting changes no result" in first["why"]


@pytest.mark.parametrize(("rise", "level"), [(0.0, True), (0.039, True), (0.041, False)])
def test_level_from_both_sides(rise, level):
    """Six checks: the mean of the last three against that of the three before."""
    monitor = Monitor(elbos=[0.0, 0.1, 0.2, rise, 0.1 + rise, 0.2 + rise])
    assert monitor.level() is level
    assert not Monitor(elbos=[0.0] * 5).level()


@pytest.mark.parametrize(("shift", "far"), [(0.0, False), (1.0, False), (30.0, True), (math.inf, True)])
def test_a_glance_tells_flows_whose_weights_would_not_do(shift, far):
    """A normal distribution and a posterior that is so many sds away, or nowhere at all."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("away", shift * x[0] if math.isfinite(shift) else -torch.inf * torch.ones_like(x[0]))

    flow = pf.Flow(pf.transforms.LowerTriangularAffine(2), base="normal").double()
    torch.manual_seed(0)
    assert samples.weights_collapse(flow, pf.LogDensity(model)) is far
