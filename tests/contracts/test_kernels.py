"""Moves of chains leave the posterior as it is: exact targets, exact draws, and deliberate bugs that must be caught."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.flows.mixture import Component, FlowMixture
from pyro_flows.inference.chains import hmc
from pyro_flows.inference.chains.adaptation import Kernel, Metric, halton, learned, scale_of
from pyro_flows.inference.chains.hmc import hamiltonian, independent, microcanonical, relabel
from pyro_flows.inference.chains.latent import Latent
from pyro_flows.support.numbers.cache import Cache

CHAINS = 4000
REAL = torch.float64


def real(*numbers):
    return torch.tensor(numbers, dtype=REAL)


def funnel():
    x = pyro.sample("x", dist.Normal(real(0.0)[0], 1.5))
    pyro.sample("y", dist.Normal(torch.zeros(2, dtype=REAL), (0.5 * x).exp()).to_event(1))


def funnel_draws(count):
    x = 1.5 * torch.randn(count, 1, dtype=REAL)
    return torch.cat([x, (0.5 * x).exp() * torch.randn(count, 2, dtype=REAL)], 1)


COVARIANCE = real([1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 2.0])


def gauss():
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(3, dtype=REAL), COVARIANCE))


def gauss_draws(count):
    return torch.randn(count, 3, dtype=REAL) @ torch.linalg.cholesky(COVARIANCE).mT


def banana():
    x = pyro.sample("x", dist.Normal(real(0.0)[0], 1.0))
    y = pyro.sample("y", dist.Normal(x.square() - 1.0, 0.5))
    pyro.sample("w", dist.Normal(y, 1.0))


def banana_draws(count):
    x = torch.randn(count, dtype=REAL)
    y = x.square() - 1.0 + 0.5 * torch.randn(count, dtype=REAL)
    return torch.stack([x, y, y + torch.randn(count, dtype=REAL)], 1)


def two():
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=REAL), 1.0).to_event(1))
    far = torch.logsumexp(torch.stack([math.log(0.7) + 4.0 * z[0], math.log(0.3) - 4.0 * z[0]]), 0)
    pyro.factor("modes", far - 8.0)


def two_draws(count):
    signs = 1.0 - 2.0 * (torch.rand(count, dtype=REAL) < 0.3).to(REAL)
    z = torch.randn(count, 3, dtype=REAL)
    z[:, 0] += 4.0 * signs
    return z


TARGETS = {
    "gauss": (gauss, gauss_draws),
    "banana": (banana, banana_draws),
    "funnel": (funnel, funnel_draws),
    "two": (two, two_draws),
}


def bent_flow(seed=0, shift=0.0):
    """A flow that is not the posterior: all parameters moved away from the identity."""
    torch.manual_seed(seed)
    flow = pf.realnvp(3, layers=4, hidden=(8,), base="student_t", df=15.0).to(REAL)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    affine = pf.transforms.LowerTriangularAffine(
        3, loc=[shift, 0.0, 0.0], scale_tril=[[1.2, 0, 0], [0.3, 1, 0], [0, 0, 1.5]]
    )
    return pf.Flow(pf.transforms.Compose([*flow.bijection.layers, affine]), base="student_t", df=15.0).to(REAL)


def mixture():
    flows = [bent_flow(0, 3.0), bent_flow(1, -3.0)]
    mirrored = Component(0, math.log(0.1), order=torch.tensor([0, 2, 1]), signs=torch.tensor([-1.0, 1.0, -1.0]))
    return FlowMixture(flows, [Component(0, math.log(0.7)), Component(1, math.log(0.2)), mirrored])


def latent(name, *, mixed=False):
    model, draws = TARGETS[name]
    return Latent(mixture() if mixed else bent_flow(), pf.LogDensity(model)), draws


FUNCTIONS = {
    "z": lambda z: z,
    "z^2": lambda z: z.square(),
    "|z|": lambda z: z.abs(),
    "products": lambda z: z * z.roll(1, 1),
    "sign": lambda z: (z > 0.5).to(REAL),
}


def z_scores(before, after):
    """Differences of means of test functions over chains, in their standard errors."""
    found = []
    for function in FUNCTIONS.values():
        change = function(after) - function(before)
        error = change.std(0) / math.sqrt(len(change))
        found.append(torch.where(error > 0, change.mean(0) / error, 0.0))
    return torch.cat(found).abs()


AXIS = real([0.6], [0.0], [0.8])
METRIC = Metric(real(1.0, 0.5, 2.0), AXIS, real(0.5))
MOVES = {"Hamiltonian": hamiltonian, "microcanonical": microcanonical}


def sweep(space, points, number, *, step=0.7, leaps=3, independence=True, move=hamiltonian):
    step = step if space.mixture is None else 0.4 * step  # parts lie on both sides of what they are moved to
    if independence:
        points, _ = independent(space, points)
    points = relabel(space, points)
    return move(space, points, step=step, leaps=leaps, metric=METRIC).points


def moved(name, *, mixed=False, seed=0, sweeps=4, **options):
    """Exact draws before and after some sweeps."""
    space, draws = latent(name, mixed=mixed)
    torch.manual_seed(seed)
    z = draws(CHAINS)
    points = space.look(*space.place(z))
    torch.testing.assert_close(points.z, z, rtol=1e-6, atol=1e-6)
    for number in range(sweeps):
        points = sweep(space, points, number, **options)
    assert float((points.z - z).abs().max(1).values.gt(0.1).double().mean()) > 0.5, "most chains move"
    return z, points.z


def exact_cases():
    """Each target with a flow, and two with a mixture of flows, whose moves take longer: the others are slow."""
    costly = [pytest.mark.slow if name not in ("banana", "two") else () for name in TARGETS]
    mixtures = [
        pytest.param(name, True, id=f"{name}-mixture", marks=m) for name, m in zip(TARGETS, costly, strict=True)
    ]
    return [pytest.param(name, False, id=f"{name}-flow") for name in TARGETS] + mixtures


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("name", "mixed"), exact_cases())
def test_exact_draws_stay_exact(name, mixed, move):
    """15 functions and 16 cases: |z| > 4.5 comes by chance once in 600 runs of the whole set."""
    assert float(z_scores(*moved(name, mixed=mixed, move=MOVES[move])).max()) < 4.5


def without_jacobian(monkeypatch):
    forward = Latent._forward

    def wrong(self, part, x):
        z, ladj = forward(self, part, x)
        return z, 0.0 * ladj

    monkeypatch.setattr(Latent, "_forward", wrong)


def always_accepted(monkeypatch):
    monkeypatch.setattr(hmc.torch, "rand_like", lambda x: torch.zeros_like(x))


def lazy_momentum(monkeypatch):
    monkeypatch.setattr(hmc.torch, "randn_like", lambda x: 0.7 * torch.empty_like(x).normal_())


def unshared(monkeypatch):
    monkeypatch.setattr(Latent, "_log_share", lambda self, part, z, log_q: 0.0 * log_q)


def unweighted_labels(monkeypatch):
    place = Latent.place

    def wrong(self, z):
        weights, self.log_w = self.log_w, torch.log_softmax(-2.0 * self.log_w, 0)
        try:
            return place(self, z)
        finally:
            self.log_w = weights

    monkeypatch.setattr(Latent, "place", wrong)


def no_energy_of_turns(monkeypatch):
    turned = microcanonical.__wrapped__.__globals__["turned"]
    monkeypatch.setitem(
        microcanonical.__wrapped__.__globals__, "turned", lambda u, slope, step: (turned(u, slope, step)[0], 0.0)
    )


BUGS = [
    (without_jacobian, "banana", False),
    (always_accepted, "funnel", False),
    (lazy_momentum, "gauss", False),
    (unshared, "gauss", True),
    (unweighted_labels, "gauss", True),
]
BUGS_OF_TURNS = [(no_energy_of_turns, "funnel"), (always_accepted, "funnel"), (without_jacobian, "banana")]


@pytest.mark.parametrize(("bug", "name", "mixed"), BUGS, ids=[bug.__name__ for bug, *_ in BUGS])
def test_bugs_in_the_moves_are_caught(bug, name, mixed, monkeypatch):
    bug(monkeypatch)
    independence = bug not in (lazy_momentum, unweighted_labels)  # which would put right what these do wrong
    before, after = moved(name, mixed=mixed, sweeps=12, independence=independence)
    assert float(z_scores(before, after).max()) > 5.0


@pytest.mark.parametrize(("bug", "name"), BUGS_OF_TURNS, ids=[bug.__name__ for bug, _ in BUGS_OF_TURNS])
def test_bugs_in_microcanonical_moves_are_caught(bug, name, monkeypatch):
    bug(monkeypatch)
    before, after = moved(name, sweeps=12, move=microcanonical, independence=bug is without_jacobian)
    assert float(z_scores(before, after).max()) > 5.0


@pytest.mark.parametrize("mixed", [False, True], ids=["flow", "mixture"])
def test_target_and_gradient_in_latent_space(mixed):
    """Against the change of variables written out, with autograd through all of it."""
    space, draws = latent("banana", mixed=mixed)
    torch.manual_seed(3)
    z = draws(30)
    x, k = space.place(z)
    for _ in range(6):  # recorded from the fourth call on
        points = space.look(x, k)
    leaf = x.clone().requires_grad_()
    flow = mixture() if mixed else bent_flow()
    rows = []
    for row, part in zip(leaf, k.tolist(), strict=True):
        of = flow.components[part] if mixed else None
        single = flow.members[of.flow] if mixed else flow
        y, ladj = single.bijection.forward_and_ladj(row[None])
        here = of.signs * y[:, of.order] if mixed else y
        log_r = torch.zeros(1, dtype=REAL)
        if mixed:
            own = single.base_distribution().log_prob(row[None]) - ladj + of.log_weight
            log_r = own - flow.log_prob(here)
        rows.append(space.density(here) + ladj + log_r)
    value = torch.cat(rows)
    slope = torch.autograd.grad(value.sum(), leaf)[0]
    torch.testing.assert_close(points.log_pi, value.detach())
    torch.testing.assert_close(points.slope, slope, rtol=1e-5, atol=1e-6)
    whole = flow.log_prob(points.z)
    torch.testing.assert_close(points.log_weight, points.log_p - whole.detach(), rtol=1e-6, atol=1e-6)


def test_points_where_the_model_breaks_down_are_never_taken():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3, dtype=REAL), 1.0).to_event(1))
        pyro.factor("log", torch.log(x[0]))  # NaN below zero

    space = Latent(bent_flow(), pf.LogDensity(model))
    torch.manual_seed(0)
    z = torch.randn(2000, 3, dtype=REAL)
    points = space.look(*space.place(z[z[:, 0] > 0]))
    for number in range(6):
        points = sweep(space, points, number)
    assert bool((points.z[:, 0] > 0).all())
    assert bool(torch.isfinite(points.log_pi).all())


# adaptation ----------------------------------------------------------------------------------------------------------


class Gauss:
    """N(0, diag(sd^2)) as a latent space."""

    def __init__(self, sd):
        self.sd, self.leaps = sd, Cache(1)

    def look(self, x, k):
        from pyro_flows.inference.chains.latent import Points

        value = -0.5 * (x / self.sd).square().sum(1)
        return Points(x, k, x, value, value, -x / self.sd**2, value, -x)

    def joined(self, x, k):
        return x

    def graph(self, points):
        return None


@pytest.mark.parametrize(
    ("dim", "move"),
    [(1, "Hamiltonian"), (5, "Hamiltonian"), (50, "Hamiltonian"), (5, "microcanonical"), (50, "microcanonical")],
)
def test_the_kernel_finds_acceptance_and_length(dim, move):
    """On N(0, I) the best 2 u tau has tau = 1.12: sin(4 tau) = 4 tau cos(4 tau) at its second zero."""
    torch.manual_seed(0)
    space, metric = Gauss(torch.ones(dim, dtype=REAL)), Metric.of(torch.ones(dim, dtype=REAL))
    points = space.look(torch.randn(128, dim, dtype=REAL), torch.zeros(128, dtype=torch.long))
    kernel, chances = Kernel.start(dim), []
    for number in range(300):
        done = MOVES[move](space, points, step=kernel.step, leaps=kernel.leaps(number), metric=metric)
        kernel.adapt(points, done, metric, number)
        points = done.points
        chances.append(float(done.chance.mean()))
    kernel.freeze()
    assert 0.7 < sum(chances[-100:]) / 100 < 0.9
    assert 0.6 < kernel.length < 2.2


def correlated(dim):
    """A covariance with two long directions and two short ones, and draws with their gradients."""
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=REAL)).Q
    lengths = torch.cat([real(30.0, 10.0, 0.05, 0.1), torch.ones(dim - 4, dtype=REAL)])
    draws = (torch.randn(2000, dim, dtype=REAL) * lengths) @ turn.mT
    return turn, lengths, draws, -(draws @ turn / lengths**2) @ turn.mT


@pytest.mark.parametrize("dim", [6, 40])
def test_the_metric_finds_long_and_short_directions(dim):
    """In its units all directions are about as wide, where scales alone leave a factor of hundreds."""
    torch.manual_seed(1)
    turn, lengths, draws, slopes = correlated(dim)
    metric = learned(draws, slopes)
    covariance = turn * lengths**2 @ turn.mT

    def condition(found):
        widths = torch.linalg.eigvalsh(
            torch.cov(found.units(torch.randn(20_000, dim, dtype=REAL) * lengths @ turn.mT).mT)
        )
        return float(widths.max() / widths.min())

    assert condition(metric) < 8.0
    assert condition(Metric.of(scale_of(draws))) > 500.0
    back = torch.eye(dim, dtype=REAL)
    torch.testing.assert_close(metric.units(metric.out(back)), back)
    torch.testing.assert_close(metric.back(back), metric.out(back).mT)
    assert covariance.shape == (dim, dim)


def test_numbers_of_the_kernel():
    assert sorted(halton(n) for n in range(7)) == [n / 8 for n in range(1, 8)]
    x = torch.randn(20_000, 2, dtype=REAL) * real(0.5, 3.0)
    torch.testing.assert_close(scale_of(x), real(0.5, 3.0), rtol=0.05, atol=0.0)
    assert scale_of(torch.zeros(100, 1)).tolist() == pytest.approx([0.01])
    again = Kernel(**Kernel.start(4).stored())
    assert again == Kernel.start(4)
