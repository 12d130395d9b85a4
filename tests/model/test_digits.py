"""Models of which single precision loses the digits: computed in double, wherever the numbers come from."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows as pf
from pyro_flows.inference.verdict.methods import MCMC
from pyro_flows.inference.verdict.verdict import next_step
from pyro_flows.model.digits import ALLOWED, NOISE
from pyro_flows.model.precision import LostDigits, in_double
from tests.invariants import close
from tests.models import gauss
from tests.registry import normal

X, Y = normal(6, 2, seed=1).float(), normal(6, seed=2).float()
LARGE = torch.tensor(3e8)


def operations():
    """What models do with tensors in single precision that they have from elsewhere."""
    network, kept = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).requires_grad_(False), torch.zeros(3)
    lstm = nn.LSTM(2, 1).requires_grad_(False)

    def written(z):
        made = torch.zeros(3, dtype=torch.float32)
        made[0], made[1:] = z[0], z
        return made * kept.add(1.0)

    yield "products", lambda z: X @ z
    yield "asked for", lambda z: X.to(torch.float32) @ z.float()
    yield "of a list", lambda z: torch.stack([z, X[0]]).sum(0)
    yield "written into", written
    yield "modules", lambda z: network(X * z)[:, 0]
    yield "modules that compare precisions", lambda z: lstm((X * z)[:, None])[0].flatten()
    yield "distributions made before", lambda z: dist.Normal(Y[:2], LARGE[None] / 3e8).log_prob(z)
    yield "einsum", lambda z: torch.einsum("nd,d->n", X, z)


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in operations()])
def test_all_is_read_as_double(function):
    z = normal(2, seed=3)
    with in_double(), in_double():
        found = function(z)
    assert found.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    close(found.float(), torch.as_tensor(function(z.float())), 1e-5)


def test_a_tensor_from_elsewhere_stays_what_it_is():
    kept = torch.zeros(3)
    with in_double():
        kept += torch.ones(3)
        kept[0] = 5.0
    assert kept.dtype == torch.float32
    assert kept.tolist() == [5.0, 1.0, 1.0]


def regression(y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.factor("constant", LARGE)
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Normal(X @ weights, scale), obs=y)


def test_models_with_parameters_are_looked_at_too():
    pyro.clear_param_store()
    density = pf.LogDensity(regression, (Y,))
    z = normal(40, 2, seed=4).float()
    with pytest.raises(LostDigits):
        density.check_digits(z)
    double = density.in_double()
    assert (density.dtype, double.dtype) == (torch.float32, torch.float64)
    assert double.in_double() is double
    expected = [3e8 + gauss(row, 0.0, 1.0) + gauss(Y, X.double() @ row, 0.5) for row in z.double()]
    for _ in range(3):  # recorded on the way
        close(double(z), torch.stack(expected), 1e-15)
        close(double.value_and_grad(z)[0], torch.stack(expected), 1e-15)
    double.check_digits(z)
    value = double(z.double().requires_grad_())
    assert torch.autograd.grad(value.sum(), list(double.parameters().values()))[0].dtype == torch.float32


def test_counts_that_are_whole_numbers_are_scored_in_double_beside_latents_in_double():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(1.0).double(), torch.tensor(1e-7).double()))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([23_000_017, 24_000_003, 24_500_001])
    density = pf.LogDensity(model, (y,))
    z = torch.tensor([[23.83e6]]).double().log()
    assert density.dtype == torch.float64
    assert density.rounding(z) > 1.0  # torch's lgamma of whole numbers has the default precision
    rate = z.exp().squeeze()
    prior = dist.Gamma(1.0, torch.tensor(1e-7).double()).log_prob(rate)
    close(density.in_double()(z), (prior + dist.Poisson(rate).log_prob(y.double()).sum() + z.squeeze())[None], 1e-12)


def test_what_double_precision_loses_is_counted():
    """With a concentration of e^40, a count's density is a difference of numbers of which no digit is left."""

    def model(y):
        concentration = pyro.sample("log", dist.Normal(0.0, 10.0)).exp()
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.GammaPoisson(concentration, concentration / 5.0), obs=y)

    density = pf.LogDensity(model, (torch.tensor([4.0, 6.0, 5.0]),)).in_double()
    z = 2.0 + normal(50, 1, seed=8).double()
    assert density.lost_digits(z) == ([], [])
    (said,), notes = density.lost_digits(z + 38.0)
    assert said.endswith("nats, in double precision too")
    assert next_step([said]) == next_step([said], MCMC) != next_step(["rounding changes the log density"])
    assert not notes


def test_usual_models_stay_as_they_are():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    density = pf.LogDensity(model, (Y,))
    density.check_digits(normal(50, 2, seed=5).float())
    assert density.dtype == torch.float32
    assert density.rounding(normal(50, 2, seed=5).float()) < 1e-4


def shares(y, concentration):
    share = pyro.sample("share", dist.Beta(torch.tensor(concentration), concentration))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(share), obs=y)


def test_digits_lost_far_out_count_where_they_make_a_mode():
    """1 - p has few digits far out, where the density is low; a Beta of 1e8 has none at its mode, the middle."""
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert pf.LogDensity(shares, (y, 1.0)).dtype == torch.float32
    assert pf.LogDensity(shares, (y, 1e8)).dtype == torch.float64


def test_what_is_left_is_said():
    """A user's own code that takes single precision only."""

    def model(size):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x.dtype != torch.float32:
            raise TypeError("single precision only")
        pyro.factor("constant", size)

    z = normal(50, 1, seed=6).float()
    for size, failures, notes in ((3e4, 0, 0), (1e6, 0, 1), (3e8, 1, 0)):
        density = pf.LogDensity(model, (torch.tensor(size),))
        density.check_digits(z)  # there is nothing to go to
        assert density.in_double() is density
        assert [len(said) for said in density.lost_digits(z)] == [failures, notes]
        assert density.known_rounding(z) == pytest.approx(size * torch.finfo(torch.float32).eps, rel=0.01)
    assert ALLOWED < 1e6 * torch.finfo(torch.float32).eps < NOISE


@pytest.mark.falls_back
def test_models_that_run_draw_by_draw_are_looked_at():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("constant", LARGE if float(x) > 0.0 else LARGE + 64.0)

    density = pf.LogDensity(model)
    with pytest.raises(LostDigits):
        density.check_digits(normal(50, 1, seed=7).float())
    close(density.in_double()(torch.ones(1, 1)), (3e8 + gauss(1.0, 0.0, 1.0))[None], 1e-15)


def test_digits_count_where_the_density_is_low_too():
    """A fifth of the mass lies within 6e-8 of one: an sd was 30 % too large, and `ok`."""

    def near_one():
        pyro.sample("p", dist.Beta(1.0, 0.1))

    density = pf.LogDensity(near_one)
    inside, close_to_one = torch.linspace(0.0, 5.0, 56)[:, None], torch.linspace(14.0, 16.0, 8)[:, None]
    density.check_digits(inside)
    with pytest.raises(LostDigits):
        density.check_digits(torch.cat([inside, close_to_one]))


@pytest.mark.parametrize(
    ("a", "b", "lost"),
    [(0.03, 0.03, True), (0.005, 0.02, True), (0.1, 0.1, False), (5.0, 0.02, True), (1.0, 0.05, False)],
)
def test_mass_that_no_value_below_one_tells_of_is_named(a, b, lost):
    """A tenth of Beta(.005, .02) lies within 1e-16 of one, and 0.2 % of the draws: .2 sds were lost."""
    a, b = torch.tensor([a, b], dtype=torch.float64)
    density = pf.LogDensity(lambda: pyro.sample("p", dist.Beta(a, b)))
    grid = torch.linspace(-700.0, 100.0, 80_001, dtype=torch.float64)[:, None]
    height = density(grid)
    draws = torch.multinomial(
        torch.softmax(height, 0), 16_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    said = density.lost_digits(grid[draws])[0]
    assert [words[:22] for words in said] == ["rounding puts p onto a"] * lost
    values = density.constrain(grid)["p"]
    mean, sd = a / (a + b), (a * b / (a + b).square() / (a + b + 1.0)).sqrt()
    assert bool((torch.softmax(height, 0) * values).sum() < mean - 0.1 * sd) == lost  # of the density as computed
