"""A few coordinates held, all others normal given these: before coordinates are chosen, and who gets something else."""

from dataclasses import replace
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.fitting import methods
from pyro_flows.fitting.methods import AS_READ, METHODS, conditionals_at_start, conditionals_flow
from pyro_flows.fitting.rounds import untrained
from pyro_flows.fitting.state import FitState, Run
from pyro_flows.inference.verdict.methods import CONDITIONALS, MCMC
from pyro_flows.model.dims import coordinate_names
from pyro_flows.model.log_density import LogDensity
from pyro_flows.support.process.clock import unbounded
from pyro_flows.support.process.seeding import seeded
from pyro_flows.support.process.stages import PARAMETERIZATION

STAGE = "Gaussian conditionals"  # as the history calls it
SIZE, NOISE = 20, 0.5
GENERATOR = torch.Generator().manual_seed(5)
PLACES = 1.0 + torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
Y = 2.0 * PLACES + 0.4 * torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
X = PLACES + NOISE * torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)


def errors(x, y):
    """A line through points whose places were measured with errors."""
    zero = x.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 5.0))
    b = pyro.sample("b", dist.Normal(zero, 5.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 5.0))
    with pyro.plate("n", len(x)):
        at = pyro.sample("at", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(at, NOISE), obs=x)
        pyro.sample("y", dist.Normal(b * at, s), obs=y)


def exact_means():
    """Means of tau, b and log s on a grid of the marginal: pairs of data are normal given these and mu."""
    sides = [torch.linspace(low, high, 41).double() for low, high in ((0.3, 2.8), (1.0, 4.0), (-7.0, 1.2))]
    tau, b, log_s = torch.cartesian_prod(*sides).T
    one = torch.ones(len(tau)).double()
    covariance = torch.stack([tau**2 + NOISE**2, b * tau**2, b * tau**2, (b * tau) ** 2 + (2 * log_s).exp()], 1)
    precision = torch.linalg.inv(covariance.view(-1, 2, 2))
    slope, data = torch.stack([one, b], 1), torch.stack([X, Y])
    weight = SIZE * torch.einsum("gi,gij,gj->g", slope, precision, slope) + 1.0 / 25.0
    pull = torch.einsum("gi,gij,j->g", slope, precision, data.sum(1))
    square = torch.einsum("in,gij,jn->g", data, precision, data)
    height = 0.5 * SIZE * torch.logdet(precision) - 0.5 * (square - pull**2 / weight + weight.log())
    height = height - 0.5 * ((tau / 5.0) ** 2 + (b / 5.0) ** 2 + (log_s.exp() / 5.0) ** 2) + log_s
    mass = torch.softmax(height, 0)
    return [float(mass @ each) for each in (tau, b, log_s)]


def stages(posterior):
    return [stage["stage"] for stage in posterior.history]


@pytest.mark.slow
def test_errors_of_measurement_take_no_training():
    posterior = pf.fit(errors, X, Y, progress=False)
    assert STAGE in stages(posterior)
    held = next(stage for stage in posterior.history if stage["stage"] == STAGE)["details"]["held"]
    assert held == ["tau", "b", "s"]
    assert posterior.verdict.status == "ok"
    assert len(posterior.losses) == 0
    tau, b, log_s = exact_means()
    assert posterior.samples["tau"].mean() == pytest.approx(tau, abs=0.02)
    assert posterior.samples["b"].mean() == pytest.approx(b, abs=0.03)
    assert posterior.samples["s"].log().mean() == pytest.approx(log_s, abs=0.1)


STEPS = 12
LEVELS = torch.randn(STEPS, generator=GENERATOR, dtype=torch.float64).cumsum(0)
SERIES = LEVELS + 0.6 * torch.randn(STEPS, generator=GENERATOR, dtype=torch.float64)


def walk(y):
    """A random walk that was observed with noise, its steps standardized by hand: no structure tells its scale."""
    zero = y.new_zeros(())
    step = pyro.sample("step", dist.HalfNormal(zero + 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(zero + 1.0))
    raw = pyro.sample("raw", dist.Normal(zero, 1.0).expand([len(y)]).to_event(1))
    with pyro.plate("t", len(y)):
        pyro.sample("y", dist.Normal(step * raw.cumsum(-1), noise), obs=y)


def walk_means():
    """Means of both log scales on a grid: the series is normal given these."""
    sides = torch.linspace(-6.0, 1.5, 151).double(), torch.linspace(-4.0, 1.5, 151).double()
    log_step, log_noise = torch.cartesian_prod(*sides).T
    sums = torch.ones(STEPS, STEPS).double().tril()
    covariance = (2 * log_step).exp()[:, None, None] * (sums @ sums.T)
    covariance = covariance + (2 * log_noise).exp()[:, None, None] * torch.eye(STEPS).double()
    height = dist.MultivariateNormal(torch.zeros(STEPS).double(), covariance).log_prob(SERIES)
    height = height - 0.5 * ((2 * log_step).exp() + (2 * log_noise).exp()) + log_step + log_noise
    mass = torch.softmax(height, 0)
    return [float(mass @ each) for each in (log_step, log_noise)]


@pytest.mark.parametrize(
    ("hierarchical", "dim", "place"),
    [(True, 14, 1), (False, 14, 7), (False, 100, 7), (False, 101, 9), (True, 101, 9)],
)
def test_few_coordinates_are_held_before_chains_and_many_after(hierarchical, dim, place):
    """Small hierarchical models are looked at as they are read, before coordinates are chosen."""
    density = SimpleNamespace(dim=dim, structure=SimpleNamespace(hierarchical=("x",) if hierarchical else ()))
    run = SimpleNamespace(density=density, state=SimpleNamespace(as_read=density), from_scratch=True)
    asked = [number for number, method in enumerate(METHODS) if method.name == CONDITIONALS and method.applies(run)]
    assert asked == [place]
    before = [method.name for method in METHODS[:place]]
    assert (MCMC in before) == (dim > 100)
    assert (METHODS[place].when == AS_READ) == (place == 1)


@pytest.mark.slow
def test_a_model_that_is_non_centered_by_hand_holds_its_scales():
    """Whether a fit takes these draws depends on its seed: a scale may be near zero, so k-hat is near its threshold."""
    density = LogDensity(walk, (SERIES,))
    with seeded(1):
        flow, held = conditionals_flow(density, seed=1)
        z, log_q = flow.draw(4000)
    weights = torch.softmax(density(z) - log_q, 0)
    assert [coordinate_names(density.structure)[number] for number in held] == ["step", "noise"]
    assert float(1.0 / weights.square().sum()) > 0.95 * len(z)
    assert (weights @ z[:, held]).tolist() == pytest.approx(walk_means(), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("k_hat", "accepted"), [(0.2, True), (0.9, False)])
def test_conditionals_with_a_far_draw_are_accepted_if_weights_correct_them(k_hat, accepted, monkeypatch):
    def with_a_far_draw(*args, **options):
        outcome = untrained(*args, **options)
        elbo = outcome.weighing.log_evidence - 1e9
        return replace(outcome, weighing=replace(outcome.weighing, k_hat=k_hat, elbo=elbo))

    monkeypatch.setattr(methods, "untrained", with_a_far_draw)
    plan = SimpleNamespace(open=True, clock=unbounded(), seed=0)
    run = Run(FitState(plan, LogDensity(errors, (X, Y))), plan)
    assert (conditionals_at_start(run) is not None) == accepted
    assert (run.best is not None) == accepted


def test_who_asks_for_a_flow_gets_it():
    posterior = pf.fit(errors, X, Y, flow="realnvp", max_steps=60, refine=False, escalate=False, progress=False)
    assert STAGE not in stages(posterior)
    assert len(posterior.losses) > 0


@pytest.mark.slow
def test_large_models_try_chains_first_and_go_back_to_the_coordinates_that_were_read(monkeypatch):
    """Where neither slices nor chains do, a few coordinates are held; the choice of others is dropped."""
    monkeypatch.setattr("pyro_flows.fitting.methods.AT_FIRST", 0)
    monkeypatch.setattr("pyro_flows.fitting.methods.grid_at_start", lambda *_, **__: None)
    chosen = []

    def choose(density, *given, **options):
        chosen.append(density)
        return pf.LogDensity(errors, (X, Y), noncentered=["at"]), None, {"elbo": 0.0}

    monkeypatch.setattr("pyro_flows.fitting.run.choose_coordinates", choose)
    posterior = pf.fit(errors, X, Y, draws=1000, progress=False)
    assert len(chosen) == 1
    assert PARAMETERIZATION not in stages(posterior)
    assert STAGE in stages(posterior)
    assert posterior.density.structure.noncentered == {}
    assert not any("non-centered" in name for name in posterior.coordinates)
    assert posterior.settings["gradient_evaluations"] > 0
    tau, b, _ = exact_means()
    assert posterior.samples["tau"].mean() == pytest.approx(tau, abs=0.05)
    assert posterior.samples["b"].mean() == pytest.approx(b, abs=0.05)
