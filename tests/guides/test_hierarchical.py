"""The guide with a model's structure: exact conditionals, minibatches, what it cannot follow, and verdicts by rows."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.inspect import get_model_relations
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.flows.recipe import begun_at
from pyro_flows.guides import structured
from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.guides.marginal import Marginal
from pyro_flows.guides.runs import at_values, beginning
from pyro_flows.guides.setup import best_start
from pyro_flows.model.reading import read_structure
from tests.models import real

SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
LOG_EVIDENCE = -31.31  # of the eight schools, by quadrature


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def normal_rows(x, batch=None, rows=None):
    """Normal rows of normal data: given mu and tau, all is known in closed form."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(real(2.0)))
    with pyro.plate("row", len(x), subsample_size=batch, subsample=rows) as index:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def nested(x):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("group", x.shape[0], dim=-2):
        u = pyro.sample("u", dist.Normal(mu, 0.8))
        slope = pyro.sample("slope", dist.Normal(u, 0.5))
        with pyro.plate("row", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(u, 0.7))
            pyro.sample("x", dist.Normal(z + 0.3 * slope, 1.0), obs=x)


def counts(y, batch=None):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 0.7))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y[index])


def by_index(x, group, batch=None):
    """Effects of groups, whose data stand in another plate: no axis is left for batches."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("group", 4):
        effect = pyro.sample("effect", dist.Normal(mu, 0.5))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Normal(effect[group[index]], 1.0), obs=x[index])


def walk(y):
    scale = pyro.sample("scale", dist.HalfNormal(real(1.0)))
    with pyro.plate("step", len(y)):
        move = pyro.sample("move", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Normal(scale * move.cumsum(-1), 1.0), obs=y)


def crossed(y, rows, columns):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", rows, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("column", columns, dim=-1):
        b = pyro.sample("b", dist.Normal(real(0.0), 1.0))
    with pyro.plate("row again", rows, dim=-2), pyro.plate("column again", columns, dim=-1):
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def with_children(x, y, batch=None):
    """Coefficients, which the flow takes since data couple them, have priors that depend on latents in their plate."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("column", x.shape[1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu.unsqueeze(-1) + real([0.0, 0.0]), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a.mean(-1), 0.5))
    with pyro.plate("row", len(y), subsample_size=batch, dim=-1) as index:
        pyro.sample("y", dist.Normal((b.unsqueeze(-2) @ x[index].mT).squeeze(-2), 1.0), obs=y[index])


def scale_of_group(y, x, batch=None):
    """At the middle of z's prior, no derivative says that its scale is that of a group."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("group", 3):
        w = pyro.sample("w", dist.Normal(mu, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(real(0.0), w.exp()[torch.arange(len(y)) % 3]))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)
    with pyro.plate("other", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def other_rows(y, x, batch=None):
    """Each row of the data reads one row of z, and not its own."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z.roll(1, -1), 0.5), obs=y)
    with pyro.plate("other", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def powers(y, batch):
    """Positive latents, whose priors are raised to a power."""
    with poutine.scale(scale=0.3):
        rate = pyro.sample("rate", dist.Gamma(real(2.0), 1.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        with poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Gamma(real(2.0), rate))
        pyro.sample("y", dist.Poisson(z), obs=y[index])


def less_the_mean(x, y, batch):
    """With an axis of points in front, the mean is that of all points."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        pyro.sample("y", dist.Normal(((w - 0.1 * w.mean()) * x[index]).sum(-1), 3.0), obs=y[index])


def matrix(x, y, batch):
    """A matrix of coefficients whose axes are in no plate, and are no event."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 1.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        pyro.sample("y", dist.Normal(x[index] @ w.reshape(4), 1.0), obs=y[index])


def beside(x, y, batch):
    """Latents of a subsampled plate stand in the rows of another plate, whose latents they do not read."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    columns = pyro.plate("column", len(x), dim=-1)
    with columns:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)
    with pyro.plate("row", len(y), subsample_size=batch, dim=-2) as index, columns:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def data(count, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return 1.0 + spread * noise[0] + noise[1]


def exact(x):
    """Return mean and sd of mu and tau of ``normal_rows``, on a grid."""
    mu, tau = np.linspace(0.4, 1.6, 401), np.linspace(0.005, 2.5, 801)
    variance, n, x = 1.0 + tau**2, len(x), x.numpy()
    squares = (x**2).sum() - 2.0 * mu * x.sum() + n * mu**2
    log_p = -0.5 * n * np.log(variance) - 0.5 * squares[:, None] / variance - mu[:, None] ** 2 / 50.0 - tau**2 / 8.0
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    found = {}
    for name, values, weights in (("mu", mu, p.sum(1)), ("tau", tau, p.sum(0))):
        mean = (weights * values).sum()
        found[name] = mean, math.sqrt((weights * values**2).sum() - mean**2)
    return found


def rows_of(model, *args):
    guide = pf.AutoHierarchicalFlow(model, layers=2, init="prior").initialize(*args)
    return guide, guide._rows(args, {})


def test_modes_are_kept_in_the_axes_of_nested_plates():
    """Pyro gives the outer plate the axis to the right: the rows that a step leaves are the transposed ones."""

    def auto(x):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with pyro.plate("group", x.shape[1]):
            u = pyro.sample("u", dist.Normal(mu, 0.8))
            slope = pyro.sample("slope", dist.Normal(u, 0.5))
            with pyro.plate("row", x.shape[0]):
                z = pyro.sample("z", dist.Normal(u, 0.7))
                pyro.sample("x", dist.Normal(z + 0.3 * slope, 1.0), obs=x)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = []
    for model, data in ((nested, x), (auto, x.mT)):
        guide = pf.AutoHierarchicalFlow(model, layers=2, init="prior")
        torch.manual_seed(0)
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data)
        kept.append({name: values for name, (values, _) in guide.remembered()["modes"].items()})
    assert torch.allclose(kept[0]["z"], kept[1]["z"].mT)
    assert torch.allclose(kept[0]["u"][:, 0], kept[1]["u"])


# conditional distributions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 2])
def test_an_axis_may_be_left_between_plates(batch):
    y, kept = torch.arange(12.0, dtype=torch.float64).reshape(3, 4), []
    for dim, data in ((-2, y), (-3, y[:, None])):

        def model(y, dim=dim):
            mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
            with pyro.plate("inner", 4, dim=-1), pyro.plate("outer", len(y), subsample_size=batch, dim=dim) as index:
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

        guide = pf.AutoHierarchicalFlow(model, layers=2, init="prior")
        torch.manual_seed(0)
        guide(data)
        kept.append(guide.remembered()["modes"]["z"])
    assert all(torch.equal(one, other[:, 0]) for one, other in zip(*kept, strict=True))


def test_rows_may_be_given_as_a_list():
    y = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    losses = []
    for rows in ([5, 2, 7], torch.tensor([5, 2, 7])):
        pyro.set_rng_seed(0)
        guide = pf.AutoHierarchicalFlow(normal_rows, layers=2).initialize(y, None, rows)
        losses.append(Trace_ELBO().loss(normal_rows, guide, y, None, rows))
    assert losses[0] == losses[1]


def test_the_conditional_of_nested_normal_rows_is_exact():
    """Group effects, slopes that share their data, rows inside: mean and covariance are those of the joint normal."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, rows = rows_of(nested, x)
    z = real([0.4])
    found = rows.conditional(z, beginning, {})

    def log_joint(y):
        u, slope, inner = y[:3, None], y[3:6, None], y[6:].reshape(3, 4)
        terms = [dist.Normal(z, 0.8).log_prob(u), dist.Normal(u, 0.5).log_prob(slope)]
        terms += [dist.Normal(u, 0.7).log_prob(inner), dist.Normal(inner + 0.3 * slope, 1.0).log_prob(x)]
        return sum(term.sum() for term in terms)

    start = torch.zeros(18, dtype=torch.float64)
    hessian = -torch.autograd.functional.hessian(log_joint, start)
    mean = torch.linalg.solve(hessian, torch.autograd.functional.jacobian(log_joint, start))
    draws = found.moved(found.base, found.draw(lambda index, shape: torch.zeros(())))
    got = torch.cat([draws[name].flatten() for name in ("u", "slope", "z")])
    assert torch.allclose(got, mean, atol=1e-8)
    columns = []
    for index, number in enumerate(found.numbers):
        for place in range(number.own.numel()):
            unit = torch.zeros(number.own.numel(), dtype=torch.float64)
            unit[place] = 1.0

            def noise(other, shape, index=index, unit=unit):
                return unit.reshape(shape) if other == index else torch.zeros(())

            there = found.moved(found.base, found.draw(noise))
            columns.append(torch.cat([there[name].flatten() for name in ("u", "slope", "z")]) - got)
    root = torch.stack(columns, 1)
    assert torch.allclose(root @ root.mT, torch.linalg.inv(hessian), atol=1e-8)


@pytest.mark.parametrize("count", [0.0, 3.0, 1e5, 3e6])
def test_modes_of_far_rows_are_found(count):
    """From the prior's middle, a Newton step would overflow."""
    _, rows = rows_of(lambda y: counts_wide(y), real([count, 1.0]))
    now = rows.near_mode(real([0.0]), beginning, {})
    z = now.base["z"] + torch.stack(now.steps, -1).reshape(2)
    slope = (real([count, 1.0]) - z.exp() - z / 100.0) / (z.exp() + 0.01).sqrt()
    assert float(slope.abs().max()) < 0.1


def counts_wide(y):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 10.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y)


def test_rows_settle_at_kinks(monkeypatch):
    """Modes of counts under a Laplace prior are its kink, or where the slope is zero. Steps past a kink turned back."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(pyro.sample("z", dist.Laplace(mu, 0.7)).exp()), obs=y)

    y = real([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 30.0])
    _, rows = rows_of(model, y)
    own, calls = type(rows).conditional, []
    monkeypatch.setattr(type(rows), "conditional", lambda self, *args, **kw: calls.append(1) or own(self, *args, **kw))
    mu = 1.0
    now = rows.near_mode(real([mu]), beginning, {})
    above, below = (y - 1 / 0.7).clamp_min(1e-9).log(), (y + 1 / 0.7).log()  # zeros of the slope on either side
    exact = torch.where(above > mu, above, torch.where(below < mu, below, mu))
    assert int((exact == mu).sum()) == 3
    assert torch.allclose(now.base["z"].reshape(-1), exact, atol=0.05)
    assert len(calls) < 40


def test_rows_of_several_numbers_pass_kinks():
    """Data that only say a sum leave a direction without curvature: short steps after a kink ended 28 nats too low."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Laplace(mu * torch.ones(2), 0.7).to_event(1))
            pyro.sample("y", dist.Poisson((z[..., 0] + 0.5 * z[..., 1]).exp()), obs=y)

    _, rows = rows_of(model, real([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 30.0]))
    now = rows.near_mode(real([-1.0]), beginning, {})
    assert float(now.heights()[0].sum()) > -52.0  # -47.0 is the highest


def topics(y):
    """Shares of topics in documents, the topics of words summed out."""
    words = pyro.sample("words", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2)).softmax(-1)
    with pyro.plate("document", len(y)):
        theta = pyro.sample("theta", dist.Dirichlet(0.5 * torch.ones(3)))
        pyro.sample("y", dist.Multinomial(40, probs=(theta.unsqueeze(-2) @ words).squeeze(-2)), obs=y)


def test_rows_on_a_simplex_reach_their_modes():
    """Numbers shortened one by one led down, and a curvature near zero beside a coupling made endless steps."""
    generator = torch.Generator().manual_seed(0)
    words = 2.0 * torch.randn(24, generator=generator)
    probs = torch.rand(12, 3, generator=generator) ** 3 @ words.reshape(3, 8).softmax(-1)
    drawn = [torch.multinomial(row, 40, True, generator=generator) for row in probs]
    _, rows = rows_of(topics, torch.stack([torch.bincount(row, minlength=8) for row in drawn]).float())
    for start in [(-6.0, 3.0), (-3.0, -6.0), (6.0, -6.0), (6.0, 3.0)]:
        now = rows.near_mode(words, at_values({"theta": torch.tensor(start).expand(12, 2)}), {})
        assert now.near
        assert float(now.heights()[0].sum()) > -178.8  # -178.6 is the highest; some rows ended 1 to 180 below


def simplex_rows(x, batch=None):
    alpha = pyro.sample("alpha", dist.LogNormal(real(0.0), 2.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        theta = pyro.sample("theta", dist.Dirichlet(alpha.unsqueeze(-1) * real([0.6, 0.2, 0.2])))
        pyro.sample("x", dist.Multinomial(20, theta, validate_args=False), obs=x[index])


def test_rows_far_out_where_the_density_is_a_line_reach_their_modes():
    """An end at 1e-3 of the sd there, 1e6, was no mode: the row was 990 nats too low, and alpha 24 sds off."""
    _, rows = rows_of(simplex_rows, real([[20.0, 0.0, 0.0]]))
    for start in ([22.0, 0.4], [26.0, 0.4], [31.0, 0.4]):
        now = rows.near_mode(real([1.6]), at_values({"theta": real([start])}), {})
        assert now.near


def beta_rows(x, batch):
    a = pyro.sample("a", dist.LogNormal(real(0.0), 2.0))
    b = pyro.sample("b", dist.LogNormal(real(0.0), 2.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Binomial(10, pyro.sample("p", dist.Beta(a, b))), obs=x[index])


def test_rows_near_one_keep_the_mass_that_has_no_digit_there():
    """1 - p has none beyond logit p = 36: with b = 0.08, 5 % of a row were lost, and b was 1.3 sds off in an ok fit."""
    x = real([10.0, 10.0, 0.0, 3.0])
    guide = pf.AutoHierarchicalFlow(beta_rows, layers=2, init="prior").initialize(x, 2)
    z = torch.log(real([[0.04, 0.08]]))
    marginal = guide.density_of_globals((x, 2), {}, z[0], 0)
    marginal.wide, marginal.count = True, 256
    exact = dist.BetaBinomial(real(0.04), real(0.08), 10).log_prob(x)
    assert torch.allclose(marginal.row_likelihoods(z)["row"][0], exact, atol=2e-3)


def test_the_start_has_as_many_draws_of_rows_as_their_differences_need():
    """With 16 draws of each row, the start of rows with two long tails was 1.6 sds off, and fits were unreliable."""
    x = real([10.0, 0.0, 0.0, 10.0, 0.0, 10.0, 0.0, 0.0, 3.0, 0.0] * 4)
    guide = pf.AutoHierarchicalFlow(beta_rows, layers=2).initialize(x, 20)
    start, _ = begun_at(guide._top._single)

    def exact(z):
        prior = torch.distributions.Normal(real(0.0), 2.0).log_prob(z).sum()
        return prior + dist.BetaBinomial(*z.exp(), 10).log_prob(x).sum()

    z = start.double().requires_grad_()
    slope = torch.autograd.grad(exact(z), z)[0]
    curvature = -torch.autograd.functional.hessian(exact, z.detach())
    assert float((torch.linalg.solve(curvature, slope) * curvature.diagonal().sqrt()).abs().max()) < 0.3


def test_draws_without_a_gradient_leave_parameters_finite():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(torch.where(z > 0.0, z.sqrt(), 0.0), 0.5), obs=y)

    pyro.set_rng_seed(0)
    guide = pf.AutoHierarchicalFlow(model, layers=2, init="prior")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(torch.linspace(0.5, 1.5, 8)) for _ in range(10)]
    assert all(map(math.isfinite, losses))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in guide.parameters())


def shares(y, validate_args=None):
    m = pyro.sample("m", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("row", len(y)):
        p = pyro.sample("p", dist.Dirichlet(4.0 * m))
        pyro.sample("y", dist.Multinomial(9, probs=p, validate_args=validate_args), obs=y)


def test_data_that_the_model_does_not_check_are_left_alone():
    """Rows of differing totals have one distribution, whose total is none of theirs."""
    y = torch.tensor([[3.0, 2.0, 1.0], [0.0, 9.0, 7.0], [4.0, 4.0, 1.0]])
    guide = pf.AutoHierarchicalFlow(lambda y: shares(y, False), layers=2, init="prior").initialize(y)
    assert guide.local == ["p"]
    with pytest.raises(ValueError, match=r"validate_args=False. In all data, the first is at row\[1\]"):
        pf.AutoHierarchicalFlow(shares, layers=2, init="prior").initialize(y)


# what the guide follows ----------------------------------------------------------------------------------------------


def test_weights_of_eight_schools_come_to_the_evidence():
    pyro.set_rng_seed(0)
    guide = pf.AutoHierarchicalFlow(schools, layers=2)
    loss = Trace_ELBO(num_particles=2000, vectorize_particles=True).loss(schools, guide, SCHOOLS, SIGMA)
    assert guide.local == ["theta"]
    assert LOG_EVIDENCE - 0.4 < -loss < LOG_EVIDENCE + 0.05
    posterior = pf.diagnose(schools, guide, SCHOOLS, SIGMA, progress=False)
    assert posterior.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.05)
    assert posterior.samples["theta"].shape == (4000, 8)


def test_the_trace_of_a_guide_has_the_density_of_the_guide():
    """Pyro's guides by effect handlers have the data in it too: its ``Importance`` gives them weights without data."""
    pyro.set_rng_seed(0)
    guide = pf.AutoHierarchicalFlow(schools, layers=2)
    weighed = Importance(schools, guide=guide, num_samples=200).run(SCHOOLS, SIGMA)
    assert float(weighed.get_log_normalizer()) == pytest.approx(LOG_EVIDENCE, abs=0.15)
    trace = poutine.trace(guide).get_trace(SCHOOLS, SIGMA)
    (own, theirs), _ = guide.get_traces(), trace.compute_log_prob()
    torch.testing.assert_close(theirs.log_prob_sum(), trace.log_prob_sum())
    assert not trace.nodes["y"]["log_prob"].any()
    own.compute_log_prob()
    assert bool(own.nodes["y"]["log_prob"].all())


@pytest.mark.filterwarnings("ignore:Found auxiliary vars in the model")
@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_latents_that_a_model_marks_as_auxiliary_are_latents(kind):
    """They were left out of both densities: losses were below the negative evidence."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        shift = pyro.sample("shift", dist.Normal(mu, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(shift, 1.0), infer={"is_auxiliary": True})
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = real(1.0, 2.0, 4.0)
    guide = kind(model, layers=2, **({"init_scale": 1.0} if kind is pf.AutoFlowMessenger else {})).initialize(y)
    assert set(guide(y)) == {"mu", "shift", "z", "y"}
    covariance = 2.0 + 2.0 * torch.eye(3, dtype=torch.float64)
    evidence = torch.distributions.MultivariateNormal(0.0 * y, covariance).log_prob(y)
    torch.manual_seed(0)
    loss = Trace_ELBO(400, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, y)
    assert -float(evidence) - 0.1 < loss < -float(evidence) + 0.3


def test_factors_of_the_model_are_no_part_of_the_guide():
    """Pyro marks them as auxiliary, as it does draws of a guide that no model has."""

    def model(y, sigma):
        schools(y, sigma)
        pyro.factor("more", real(-7.0))

    pyro.set_rng_seed(0)
    guide = pf.AutoHierarchicalFlow(model, layers=2)
    trace, (of_model, of_guide) = poutine.trace(guide).get_trace(SCHOOLS, SIGMA), guide.get_traces()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.log_prob_sum(), of_guide.log_prob_sum())
    of_model.compute_log_prob()
    assert float(of_model.nodes["more"]["log_prob"]) == -7.0


def test_draws_of_a_flow_of_all_latents_do_not_run_the_model():
    """A model that takes no batches was run for each of the 4000 draws of a median."""
    runs = []

    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        runs.append(mu.dim())
        y = y if mu.dim() == 0 else y[None, None, None]  # which has axes that no plate has
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(y.dim()), obs=y)

    guide, y = pf.AutoHierarchicalFlow(model, layers=2), real(1.0, 3.0)
    guide.initialize(y)
    before = len(runs)
    assert float(guide.median(y)["mu"]) == pytest.approx(4.0 / 2.04, abs=0.05)
    assert len(runs) - before < 10


def test_compiled_losses_are_refused():
    """Second derivatives are no part of a trace of torch.jit, and modes would stay those of its rows."""
    loss, guide = JitTrace_ELBO(ignore_jit_warnings=True), pf.AutoHierarchicalFlow(schools, layers=2)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    with pytest.raises(NotImplementedError, match=r"rows of 'theta'.*Trace_ELBO in the place of JitTrace_ELBO"):
        svi.step(SCHOOLS, SIGMA)


def test_shapes_of_improper_priors_may_be_tuples():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = pf.AutoHierarchicalFlow(model, layers=2).initialize(SCHOOLS)
    assert guide.local == ["z"]
    assert float(guide.median(SCHOOLS)["mu"]) == pytest.approx(float(SCHOOLS.mean()), abs=0.2)


def test_training_mends_what_is_not_normal():
    pyro.set_rng_seed(0)
    guide = pf.AutoHierarchicalFlow(schools, layers=2)
    many = Trace_ELBO(num_particles=2000, vectorize_particles=True)
    before = -many.loss(schools, guide, SCHOOLS, SIGMA)
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for _ in range(60):
        svi.step(SCHOOLS, SIGMA)
    assert -many.loss(schools, guide, SCHOOLS, SIGMA) > before + 0.02


def steep(y):
    s = pyro.sample("s", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(0.0, 0.1 + (60.0 * s).exp().sum(-1)), obs=y)


@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoRealNVP])
def test_draws_at_which_a_model_overflows_are_left_out_of_a_step(kind):
    pyro.set_rng_seed(0)
    guide, loss = kind(steep, layers=2, init="prior"), Trace_ELBO(num_particles=16, vectorize_particles=True)
    svi = SVI(steep, guide, pyro.optim.Adam({"lr": 0.05}), loss)
    y = torch.tensor(0.1)
    assert not all(math.isfinite(svi.step(y)) for _ in range(5))
    for _ in range(60):
        svi.step(y)
    assert float(guide.sample_posterior(1000, y)["s"].mean()) < -0.3


def test_without_latents_in_plates_it_starts_as_a_flow_does():
    y = real([0.3, 1.0, 2.0])
    guide, other = pf.AutoHierarchicalFlow(walk, layers=2), pf.AutoRealNVP(walk, layers=2)
    starts = [one.initialize(y)._flow.state_dict() for one in (guide.initialize(y).top, other)]
    assert all(torch.equal(starts[0][name], value) for name, value in starts[1].items() if "affine" in name)


def test_parts_of_a_start_are_those_of_the_sites():
    y = data(6)
    loc, scale, _ = best_start(normal_rows, (y,), {}, among=read_structure(normal_rows, (y,), {}).latents)
    tau = [latent for latent in read_structure(normal_rows, (y,), {}).latents if latent.name == "tau"]
    alone = best_start(normal_rows, (y,), {}, among=tau)
    assert torch.allclose(alone[0], loc[tau[0].offset])
    assert torch.allclose(alone[1][0, 0], (scale @ scale.mT)[tau[0].offset, tau[0].offset].sqrt())


@pytest.mark.parametrize(
    ("model", "args"), [(walk, (real([0.3, 1.0, 2.0]),)), (crossed, (real([[0.0, 1.0]] * 3), 3, 2))]
)
def test_rows_that_depend_on_each_other_are_given_to_the_flow_or_coupled(model, args):
    guide, _ = rows_of(model, *args)
    assert guide.local == ([] if model is walk else ["a", "b"])
    assert (guide._crossed is None) == (model is walk)


@pytest.mark.falls_back
def test_a_scale_in_another_plate_is_the_flows():
    """Newton steps lead to no maximum of scales and values together. A step with them was an error."""
    args = data(12), data(20, 1), 5
    guide, _ = rows_of(scale_of_group, *args)
    assert guide.local == ["z"]
    assert math.isfinite(Trace_ELBO().loss(scale_of_group, guide, *args))


@pytest.mark.parametrize("batch", [None, 5])
def test_rows_that_are_read_in_other_rows_are_not_integrated_alone(batch):
    y, x = data(12), data(20, 1)
    guide, _ = rows_of(other_rows, y, x, batch)
    assert guide.local == []


def test_latents_whose_priors_read_other_plates_are_no_rows():
    """Where a guide has not found it."""
    y, x = data(12), data(20, 1)
    latents = read_structure(poutine.block(scale_of_group, hide=["w", "z"]), (y, x), {}).latents
    with pytest.raises(ValueError, match="site 'z': expected data in the plate of the latents"):
        Marginal(Rows(scale_of_group, latents, ["w", "z"], (y, x, 5), {}), real([0.2]), beginning, 0)


def test_minibatches_of_globals_start_at_the_mode():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = 2.0 * x.sum(1) + data(60)
    guide = pf.AutoHierarchicalFlow(matrix, layers=2).initialize(x, y, 20)
    expected = torch.linalg.solve(x.mT @ x + torch.eye(4), x.mT @ y)
    assert torch.allclose(guide._top.affine.loc, expected, atol=0.02)


def test_effects_whose_data_are_subsampled_elsewhere_are_coupled():
    """A minibatch says too little of an effect for its conditional distribution: all rows make one."""
    x, group = data(40), torch.arange(40) % 4
    assert rows_of(by_index, x, group)[0]._crossed is None
    guide, _ = rows_of(by_index, x, group, 10)
    assert guide.local == ["effect"]
    z = real([[0.2], [1.0]])
    covariance = 0.25 * (group[:, None] == group).double() + torch.eye(40, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(z.expand(2, 40), covariance).log_prob(x)
    found = CrossedMarginal(guide._crossed, 0)(z)
    assert torch.allclose(found, expected + dist.Normal(0.0, 5.0).log_prob(z[:, 0]), atol=1e-6)


def test_large_crossed_plates_are_coupled():
    guide, _ = rows_of(crossed, torch.zeros(201, 202, dtype=torch.float64), 201, 202)
    assert guide.local == ["a", "b"]
    assert guide.reason is None
    assert guide.sample_posterior(2, torch.zeros(201, 202, dtype=torch.float64), 201, 202)["a"].shape == (2, 201, 1)


def unboxed(y, rows, columns):
    """No batch of points goes through it."""
    crossed(y, rows, columns)
    float(pyro.sample("more", dist.Normal(real(0.0), 1.0)))


@pytest.mark.falls_back
def test_large_crossed_plates_that_cannot_be_coupled_are_said_to_be_taken_as_independent():
    guide, _ = rows_of(unboxed, torch.zeros(201, 202, dtype=torch.float64), 201, 202)
    assert guide.local == ["a", "b"]
    assert "'a' and 'b' are in crossed plates: taken as independent given the flow's latents" in guide.reason
    assert ".item()" in guide.reason


def with_features(y, x, batch, forget):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z + (x if forget else x[index]), 1.0), obs=y[index])


def test_a_forgotten_index_and_nan_among_features_are_named():
    x = data(50)
    with pytest.raises(ValueError, match=r"plate 'row' takes 10 of 50 rows.*index each argument"):
        pf.AutoHierarchicalFlow(with_features).initialize(x, x, 10, True)
    broken = x.clone()
    broken[37] = math.nan
    with pytest.raises(ValueError, match=r"site 'y': its log density is NaN in 1 of 10 rows, the first at row\[37\]"):
        pf.AutoHierarchicalFlow(with_features).initialize(x, broken, 10, False)


def test_draws_have_the_shapes_of_the_model():
    x = data(30)
    guide = pf.AutoHierarchicalFlow(nested, layers=2)
    draws = guide.sample_posterior(50, x.reshape(5, 6))
    assert {name: value.shape for name, value in draws.items()} == {
        "mu": (50,), "u": (50, 5, 1), "slope": (50, 5, 1), "z": (50, 5, 6)
    }  # fmt: skip
    low, high = guide.quantiles([0.05, 0.95], x.reshape(5, 6))["z"]
    middle = guide.median(x.reshape(5, 6))["z"]
    assert bool(((low < middle) & (middle < high)).all())


def test_new_rows_may_be_more_or_fewer():
    """The modes of the first rows are not those of others."""
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2)
    guide.sample_posterior(2, data(6))
    for rows in (1, 4, 20):
        x = data(rows, seed=rows)
        draws = guide.sample_posterior(4000, x)
        assert draws["z"].shape == (4000, rows)
        share = 1.0 / (1.0 + draws["tau"].square())  # of mu, in the mean of a row
        expected = (share * draws["mu"])[:, None] + (1.0 - share)[:, None] * x
        assert torch.allclose((draws["z"] - expected).mean(0), torch.zeros(rows, dtype=x.dtype), atol=0.08)


def with_scales(x, batch=None):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        w = pyro.sample("w", dist.Gamma(real(3.0), 3.0))
        pyro.sample("x", dist.Normal(z, w**-0.5), obs=x[index])


@pytest.mark.parametrize("batch", [None, 4])
def test_plates_that_another_part_of_a_guide_has_made_are_named_with_a_remedy(batch):
    guide = AutoGuideList(with_scales)
    guide.append(pf.AutoHierarchicalFlow(poutine.block(with_scales, hide=["w"]), layers=2, init="prior"))
    guide.append(AutoNormal(poutine.block(with_scales, expose=["w"])))
    with pytest.raises(ValueError, match=r"plate 'row'.*AutoFlowMessenger\(model, normal="):
        SVI(with_scales, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data(8), batch)
    guide = pf.AutoFlowMessenger(with_scales, normal=["w"], layers=2)
    assert SVI(with_scales, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(data(8), batch) > 0.0


def test_pyro_finds_what_the_sites_of_a_guide_read():
    """As it does for ``pyro.render_model``, with tensors whose shapes have parts that are plain tuples."""
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2, init="prior").initialize(data(8))
    found = get_model_relations(guide, (data(8),))
    assert found["sample_sample"]["mu"] == found["sample_sample"]["z"] == ["_top_latent"]
    assert found["plate_sample"] == {"row": ["z", "x"]}


def test_rows_of_a_plate_that_a_handler_hides_are_asked_for():
    part = poutine.block(with_scales, expose=["mu", "z", "x"])
    with pytest.raises(ValueError, match=r"a handler hides which rows plate 'row' takes.*expose="):
        pf.AutoHierarchicalFlow(part, layers=2).initialize(data(8), 4)


@pytest.mark.falls_back
def test_a_guide_that_sees_no_data_says_so():
    """Rows then have their priors."""
    guide = pf.AutoHierarchicalFlow(poutine.block(with_scales, expose=["mu", "z"]), layers=2, init="prior")
    assert "the model has no data" in guide.initialize(data(8)).reason
    assert pf.AutoHierarchicalFlow(with_scales, layers=2, init="prior").initialize(data(8)).reason is None


def test_data_that_are_left_out_are_named():
    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("school", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, 5.0))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    guide = pf.AutoHierarchicalFlow(model, layers=2).initialize(SIGMA, SCHOOLS)
    with pytest.raises(ValueError, match=r"site 'y'.*posterior_samples=guide.sample_posterior"):
        guide(SIGMA)


@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
@pytest.mark.parametrize(
    "around",
    [
        lambda model: poutine.condition(model, data={"mu": real(0.5)}),
        lambda model: poutine.scale(model, scale=1.0),
        lambda model: poutine.mask(model, mask=torch.tensor(True)),
    ],
    ids=["condition", "scale", "mask"],
)
def test_models_with_handlers_around_them(kind, around):
    """The guide runs the model inside of a run of it, and Pyro lets no handler in twice."""
    model, x = around(normal_rows), data(8)
    guide = kind(model, layers=2).initialize(x)
    check_weight(model, guide, x)


@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_powers_of_priors_leave_the_density_of_the_flow(kind):
    """As in the log density of the model; that of a conditional distribution has the power of its site."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with poutine.scale(scale=0.1):
            tau = pyro.sample("tau", dist.HalfNormal(real(2.0)))
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = data(8)
    check_weight(model, kind(model, layers=2).initialize(x), x)


def check_weight(model, guide, x):
    """The weight of one draw by Pyro's traces is that by the log density of the model and those of flow and rows."""
    pyro.set_rng_seed(3)
    with poutine.block():
        values = guide(x)
    model_trace, guide_trace = guide.get_traces()
    guide_trace.compute_log_prob()
    found = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
    sites, density = guide_trace.nodes, pf.LogDensity(model, (x,))
    latent = next(site for name, site in sites.items() if site["infer"].get("is_auxiliary"))
    z = density.unconstrain({name: values[name][None] for name in density.names})
    expected = density(z)[0] - latent["log_prob"] - sites["z"]["log_prob"].sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.falls_back
def test_models_that_take_no_batches_are_drawn_one_by_one():
    x, group = data(40), torch.arange(40) % 4
    guide = pf.AutoHierarchicalFlow(by_index, layers=2)
    assert guide.sample_posterior(3, x, group)["effect"].shape == (3, 4)


def summed(x, batch):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(w.sum(), 0.5))  # the sum is over draws too, if there are several
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.falls_back
def test_a_model_that_would_mix_several_draws_is_drawn_one_by_one():
    pyro.set_rng_seed(0)
    x = 2.0 + torch.randn(20, generator=torch.Generator().manual_seed(0))
    guide = pf.AutoHierarchicalFlow(summed, layers=2).initialize(x, 10)
    draws = guide.sample_posterior(200, x, None)
    shift = draws["z"].mean(1) - draws["w"].sum(1)  # mixed, z is about the sum of all draws
    assert float(shift.abs().max()) < 1.5
    assert float(draws["z"].mean()) == pytest.approx(float(x.mean()), abs=0.3)


def discrete(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)


def no_globals(y):
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def plated(y, batch=None, *, same=True):
    """All latents are in plates: two columns, each with a mean of its own."""
    columns = pyro.plate("column", 2, dim=-1)
    with columns:
        mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    others = columns if same else pyro.plate("again", 2, dim=-1)
    with pyro.plate("row", len(y), subsample_size=batch, dim=-2) as index, others:
        z = pyro.sample("z", dist.Normal(mu, 1.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("batch", [None, 10])
def test_sites_that_rows_share_are_the_flows_where_all_are_in_plates(same, batch):
    pyro.set_rng_seed(0)
    y = torch.tensor([1.0, -2.0]) + 1.8 * torch.randn(
        40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    guide = pf.AutoHierarchicalFlow(plated, layers=2).initialize(y, batch, same=same)
    assert guide.local == ["z"]
    precision = 40 / (1.0 + 1.5**2) + 1.0 / 9.0
    mean = y.sum(0) / (1.0 + 1.5**2) / precision
    draws = guide.sample_posterior(4000, y, batch, same=same)["mu"].reshape(4000, 2)  # the start is exact
    assert torch.allclose(draws.mean(0), mean, atol=0.1 * precision**-0.5)
    assert torch.allclose(draws.std(0), torch.full((2,), precision**-0.5, dtype=torch.float64), rtol=0.05)


def weights_in_a_plate(x, y):
    with pyro.plate("feature", x.shape[1]):
        weight = pyro.sample("weight", dist.Normal(0.0, 3.0))
    with pyro.plate("row", len(x), subsample_size=20) as index:
        pyro.sample("y", dist.Normal((weight.unsqueeze(-2) * x[index]).sum(-1), 1.0), obs=y[index])


def test_weights_in_a_plate_that_rows_of_another_read_are_the_flows():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    guide = pf.AutoHierarchicalFlow(weights_in_a_plate, layers=2).initialize(x, x.sum(1))
    assert guide.local == []
    assert guide.sample_posterior(10, x, x.sum(1))["weight"].shape == (10, 3)


def no_latents(y):
    pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=y)


def long_rows(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, torch.ones(100)).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "site 'k': a discrete latent"),
        (no_globals, "a latent outside of plates"),
        (no_latents, "at least one continuous latent site"),
        (long_rows, "at most 64 numbers in a row, got 100"),
    ],
)
def test_models_that_it_cannot_follow_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        pf.AutoHierarchicalFlow(model).initialize(torch.zeros(3))


@pytest.mark.parametrize("ask", [lambda guide: [*guide.parameters()], lambda guide: guide.load_state_dict({})])
@pytest.mark.parametrize("kind", [pf.AutoHierarchicalFlow, pf.AutoFlowMessenger])
def test_there_are_no_parameters_before_the_first_run(kind, ask):
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} has no parameters yet.*guide.initialize\(\*args\)"):
        ask(kind(schools))


def test_wrong_options_are_named_at_once():
    with pytest.raises(ValueError, match="model: expected a callable"):
        pf.AutoHierarchicalFlow(3)
    with pytest.raises(TypeError):
        pf.AutoHierarchicalFlow(schools, wings=2)


def test_a_guide_that_began_by_two_rows_begins_anew():
    """Other packages run a guide on a batch of two before they train it."""
    x = data(200, spread=1.5)
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2)
    guide(x, None, torch.arange(2))
    before = guide._top.affine.loc.clone()
    guide(x, None, torch.arange(100))
    after = guide._top.affine.loc.clone()
    assert not torch.equal(before, after)
    with torch.no_grad():
        next(guide._top._flow.parameters()).mul_(1.0)  # as a step of an optimizer would
    guide(x, None, torch.arange(200))
    assert torch.equal(after, guide._top.affine.loc)


# the density of the globals ------------------------------------------------------------------------------------------


def test_values_and_gradients_are_exact_where_rows_are_normal():
    x = data(40)
    guide, rows = rows_of(normal_rows, x, 10)
    density = Marginal(rows, real([0.5, -0.3]), guide.modes.start, 0)
    assert len(density.parts) == 4
    z = real([[0.5, -0.3], [1.2, -1.0]]).requires_grad_()
    tau = z[:, 1].exp()
    rows_p = dist.Normal(z[:, :1], (1.0 + tau**2).sqrt()[:, None]).log_prob(x).sum(1)
    expected = rows_p + dist.Normal(0.0, 5.0).log_prob(z[:, 0]) + dist.HalfNormal(2.0).log_prob(tau) + z[:, 1]
    value, gradient = density.value_and_grad(z.detach())
    assert torch.allclose(value, expected.detach(), atol=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), z)[0], atol=1e-5)
    assert torch.allclose(density(z.detach()), value)


def test_rows_whose_scale_is_nearly_zero_keep_their_digits():
    """A value that lies 1e-9 from its mean has no digit of that in single precision, the model's."""
    x = data(40).float()

    def single(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("row", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide, rows = rows_of(single, x, 10)
    density = Marginal(rows, torch.tensor([0.5, -0.3]), guide.modes.start, 0)
    z = torch.tensor([[0.5, -20.0], [0.5, -8.0], [1.2, -1.0]])
    tau = z.double()[:, 1].exp()
    expected = dist.Normal(z.double()[:, :1], (1.0 + tau**2).sqrt()[:, None]).log_prob(x).sum(1)
    expected += dist.Normal(0.0, 5.0).log_prob(z.double()[:, 0]) + dist.HalfNormal(2.0).log_prob(tau) + z[:, 1]
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-5)
    assert density.local_draws(z, ["z"], torch.arange(40), 0)["z"].dtype == torch.float32


@pytest.mark.falls_back
def test_compiled_code_that_takes_no_double_stays_in_single():
    x, net = data(40).float(), torch.jit.script(torch.nn.Linear(1, 1))

    def compiled(x, batch):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("row", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x[index])

    guide, rows = rows_of(compiled, x, 10)
    density = Marginal(rows, torch.tensor([0.5]), guide.modes.start, 0)
    assert density.first.at.z.dtype == torch.float32
    assert bool(torch.isfinite(density(torch.tensor([[0.5], [1.0]]))).all())


@pytest.mark.parametrize("batch", [None, 10])
def test_priors_in_the_flow_that_depend_on_latents_in_plates_are_integrated(batch, monkeypatch):
    monkeypatch.setattr(structured, "JOINT_UP_TO", 3)  # the coefficients, and not what they depend on
    y = data(40)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guide, rows = rows_of(with_children, x, y, batch)
    assert guide.local == ["a"]
    z = real([[0.3, 0.5, -0.3, 0.1], [0.7, 1.2, -1.0, 2.0]])
    density, (mu, b) = Marginal(rows, z[0], guide.modes.start, 0), z.split([1, 3], 1)
    expected = dist.Normal(mu, 0.75**0.5).log_prob(b).sum(1) + dist.Normal(0.0, 1.0).log_prob(mu[:, 0])
    assert torch.allclose(density(z), expected + dist.Normal(b @ x.mT, 1.0).log_prob(y).sum(1), atol=1e-6)
    drawn = density.local_draws(z[1:].expand(2000, 4), ["a"], torch.arange(3), seed=0)["a"]
    assert torch.allclose(drawn.mean((0, 2)), mu[1] + (b[1] - mu[1]) / 1.5, atol=0.05)


@pytest.mark.parametrize("batch", [None, 10])
def test_the_flow_takes_latents_in_plates_on_which_priors_of_its_own_depend(batch):
    """Else draws of coefficients and those of their scales would be independent."""
    y = data(40)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guide, _ = rows_of(with_children, x, y, batch)
    assert guide.local == []


@pytest.mark.parametrize("batch", [None, 3])
def test_powers_of_priors_are_those_of_the_values(batch):
    """A map to unconstrained coordinates has its log derivative once, whatever the power."""
    y = real([0.0, 1.0, 1.0, 3.0, 6.0])
    guide, rows = rows_of(powers, y, batch)
    z = real([[-1.0], [0.0], [1.0]])
    density = Marginal(rows, z[1], guide.modes.start, 0)
    density.adapt(z)
    density.count = 128
    u = torch.linspace(-12.0, 5.0, 4001, dtype=torch.float64)
    heights = 0.3 * dist.Gamma(real(2.0), z.exp()[:, :, None]).log_prob(u.exp()) + u
    heights = heights + dist.Poisson(u.exp()).log_prob(y[:, None])
    expected = (torch.logsumexp(heights, 2) + math.log(17.0 / 4000.0)).sum(1)
    expected = expected + 0.3 * dist.Gamma(real(2.0), 1.0).log_prob(z[:, 0].exp()) + z[:, 0]
    assert torch.allclose(density(z), expected, atol=0.02)


def test_small_differences_of_batches_are_not_lost_among_rows():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = data(4000, spread=0.0) + 3.0 * data(4000, 1)
    guide, rows = rows_of(less_the_mean, x, y, 1000)
    z = real([[0.0, 0.0, 0.0], [0.5, -1.0, 2.0]])
    mean = (z - 0.1 * z.mean(1, keepdim=True)) @ x.mT
    expected = dist.Normal(mean, 3.0).log_prob(y).sum(1) + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert torch.allclose(Marginal(rows, z[0], guide.modes.start, 0)(z), expected, atol=1e-6)


def test_axes_that_are_in_no_plate_are_added_up():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guide, rows = rows_of(matrix, x, data(20), 5)
    z = real([[0.0, 0.1, 0.2, 0.3], [0.5, -1.0, 2.0, 0.0]])
    expected = dist.Normal(z @ x.mT, 1.0).log_prob(data(20)).sum(1) + dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    assert torch.allclose(Marginal(rows, z[0], guide.modes.start, 0)(z), expected, atol=1e-6)


def test_rows_of_a_subsample_are_no_parts_of_rows_around_them():
    x, y = data(3), data(12, 1).reshape(4, 3)
    guide, rows = rows_of(beside, x, y, 2)
    z = real([[0.2], [1.0]])
    expected = dist.Normal(z, 2.0**0.5).log_prob(torch.cat([x, y.flatten()])).sum(1)
    expected = expected + dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    assert torch.allclose(Marginal(rows, z[0], guide.modes.start, 0)(z), expected, atol=1e-6)


def masked_priors(y, keep, both):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    s = pyro.sample("s", dist.HalfNormal(real(1.0)))
    with pyro.plate("row", len(y), subsample_size=4) as index:
        with poutine.mask(mask=keep[index]):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
        with poutine.mask(mask=keep[index] | (not both)):
            pyro.sample("y", dist.Normal(z, s), obs=y[index])


def test_a_prior_that_is_masked_where_data_are_not_is_refused():
    """Its latents would be lost together with their share of the density of the noise."""
    y, keep = data(12), torch.arange(12) % 2 == 0
    z = real([0.2, -0.5])
    guide, rows = rows_of(masked_priors, y, keep, True)
    assert bool(Marginal(rows, z, guide.modes.start, 0)(z[None]).isfinite())
    guide, rows = rows_of(masked_priors, y, keep, False)
    with pytest.raises(ValueError, match=r"^site 'z': expected a prior in each row that is read, .* site 'y' reads"):
        Marginal(rows, z, guide.modes.start, 0)


def test_the_last_part_counts_rows_once():
    """With 25 rows in parts of ten, five rows of the last part have come before."""
    x = data(25)
    guide, rows = rows_of(normal_rows, x, 10)
    z = real([[0.5, -0.3]])
    whole = Marginal(rows_of(normal_rows, x)[1], z[0], guide.modes.start, 0)
    assert torch.allclose(Marginal(rows, z[0], guide.modes.start, 0)(z), whole(z), atol=1e-6)


def test_counts_come_to_the_integral():
    """Against quadrature, within what the halves of the draws say of the error."""
    y = real([0.0, 0.0, 1.0, 3.0, 8.0])
    guide, rows = rows_of(counts, y)
    density = Marginal(rows, real([0.5]), guide.modes.start, 0)
    density.count = 64
    z = real([[0.2], [1.0]])
    assert density.adapt(z)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    rate = (z[:, :, None] + 0.7 * nodes).exp()
    likelihood = (dist.Poisson(rate).log_prob(y[None, :, None]).exp() * weights).sum(2).log().sum(1)
    expected = likelihood + dist.Normal(0.0, 5.0).log_prob(z[:, 0])
    assert torch.allclose(density(z), expected, atol=0.1)


def by_number(x, group, batch=None):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("group", 4):
        effect = pyro.sample("effect", dist.Normal(float(mu.detach()) + (mu - mu.detach()), 0.5))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Normal(effect[group[index]], 1.0), obs=x[index])


@pytest.mark.parametrize(("model", "batched"), [(by_index, True), (by_number, False)])
def test_models_without_batches_have_the_same_values(model, batched):
    """Points are mapped, each with runs of its own; where that fails, their runs are those of one point."""
    x, group = data(40), torch.arange(40) % 4
    guide, rows = rows_of(model, x, group)
    density = Marginal(rows, real([0.5]), guide.modes.start, 0)
    assert density.batched is batched
    assert (density.rows.axes is not None) is batched
    z = real([[0.2], [1.0]])
    covariance = 0.25 * (group[:, None] == group).double() + torch.eye(40, dtype=torch.float64)
    mean = z.expand(2, 40)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    assert torch.allclose(density(z), expected + dist.Normal(0.0, 5.0).log_prob(z[:, 0]), atol=1e-6)


def regression(X, y, batch):
    """As most regressions are written: `X @ b` takes no further axis of b."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1))
        pyro.sample("y", dist.Poisson((X[index] @ b + (X[index] * slope).sum(-1)).exp()), obs=y[index])


def in_batches(X, y, batch):
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1))
        b = b if b.dim() == 1 else b.squeeze(-2).unsqueeze(-2)
        pyro.sample("y", dist.Poisson((X[index] * (b + slope)).sum(-1).exp()), obs=y[index])


def by_matrix(X, w):
    return X @ w


def by_sum(X, w):
    return w.sum()


def by_value(X, w):
    return w[0] if float(w[0].detach()) > -100.0 else w[1]


@pytest.mark.falls_back
@pytest.mark.parametrize(
    ("mean", "row"),
    [(by_matrix, None), (by_sum, [1.0, 1.0]), pytest.param(by_value, [1.0, 0.0], marks=pytest.mark.slow)],
)
def test_a_guide_is_judged_where_a_model_takes_one_point(mean, row):
    """Many draws at once were an error of shapes, or mixed in a sum; a matrix in single precision met one in double."""
    X = data(20).float().reshape(10, 2)

    def model(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(mean(X, w), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = X.sum(1)
    A = X.double() if row is None else real(row).expand(10, 2)
    covariance = A @ A.mT + 1.25 * torch.eye(10, dtype=torch.float64)
    evidence = float(torch.distributions.MultivariateNormal(0.0 * y.double(), covariance).log_prob(y.double()))
    guide = pf.AutoHierarchicalFlow(model, layers=2).initialize(X, y)
    found = pf.diagnose(model, guide, X, y, draws=1000, progress=False)
    assert found.verdict.status == "ok"
    assert found.log_evidence == pytest.approx(evidence, abs=0.02)


@pytest.mark.falls_back
def test_a_guide_without_rows_is_judged_where_a_model_branches():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        scale = 1.0 if float(mu.detach().reshape(-1)[0]) > -100.0 else 2.0
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

    y = real(0.5)
    guide = pf.AutoHierarchicalFlow(model, layers=2).initialize(y)
    found = pf.diagnose(model, guide, y, draws=500, progress=False)
    assert found.verdict.status == "ok"
    assert found.log_evidence == pytest.approx(float(dist.Normal(0.0, 2.0**0.5).log_prob(y)), abs=0.02)


def test_a_guide_without_rows_is_judged_where_a_model_has_parameters():
    def model(y):
        scale = pyro.param("scale", real(1.0), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    y = real(0.5, 1.5)
    guide = pf.AutoHierarchicalFlow(model, layers=2).initialize(y)
    found = pf.diagnose(model, guide, y, draws=500, progress=False)
    assert found.verdict.status == "ok"
    covariance = torch.eye(2, dtype=torch.float64) + 1.0
    evidence = float(torch.distributions.MultivariateNormal(0.0 * y, covariance).log_prob(y))
    assert found.log_evidence == pytest.approx(evidence, abs=0.02)


def test_minibatches_of_a_regression_in_single_precision():
    X = data(60).float().reshape(30, 2)

    def model(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(y), subsample_size=10) as index:
            pyro.sample("y", dist.Normal(X[index] @ w, 0.5), obs=y[index])

    assert pf.fit(model, X, X.sum(1), progress=False).verdict.status == "ok"


def test_points_are_mapped_where_a_regression_takes_one():
    """They were evaluated one by one: a fit of 800 rows took 470 seconds, and takes 39."""
    X = data(60).reshape(30, 2) - 1.0
    y = torch.poisson((X @ real([0.5, -0.5])).exp(), generator=torch.Generator().manual_seed(0))
    z = real([[0.3, -0.2], [0.6, -0.7], [0.0, 0.1]])
    found = []
    for model in (regression, in_batches):
        guide, rows = rows_of(model, X, y, 10)
        density = Marginal(rows, z[0], guide.modes.start, 0)
        density.adapt(z)
        assert density.batched
        assert (density.rows.axes is None) is (model is in_batches)
        value, gradient = density.value_and_grad(z)
        drawn = density.local_draws(z, ["slope"], torch.tensor([2, 29]), 0)["slope"]
        found.append([density(z), value, gradient, drawn, density.row_likelihoods(z)["row"]])
        assert drawn.shape == (3, 2, 2)
        assert not density.second_modes(z[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_given_subsample_is_not_all_rows():
    x = data(20)
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2, init="prior").initialize(x, None, torch.arange(5))
    with pytest.raises(ValueError, match=r"subsample=torch.arange\(size\)"):
        pf.diagnose(normal_rows, guide, x, None, torch.arange(5), progress=False)


# verdicts ------------------------------------------------------------------------------------------------------------


def test_a_fit_of_minibatches_is_right_and_leaves_the_store_alone():
    x = data(1000, spread=1.5)
    pyro.clear_param_store()
    pyro.param("mine", torch.ones(2))
    posterior = pf.fit(normal_rows, x, 250, progress=False)
    assert posterior.verdict.status in ("ok", "corrected")
    assert list(pyro.get_param_store().keys()) == ["mine"]
    for name, (mean, sd) in exact(x).items():
        assert abs(float(posterior.samples[name].mean()) - mean) < 0.15 * sd
        assert float(posterior.samples[name].std()) == pytest.approx(sd, rel=0.12)
    assert posterior.method == "Gaussian"
    assert "posterior" in posterior.to_arviz()
    said = "was a Gaussian at a mode of their marginal density; the latents of 1,000 rows were integrated out"
    assert said in posterior.methods_text()
    assert "Andrieu2009" in posterior.references()


def with_second_modes(x, squared, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(torch.where(squared[index], z * z, z), 0.3), obs=x[index])


def test_rows_with_a_second_mode_are_named():
    squared = torch.arange(60) % 30 == 7
    x = torch.where(squared, torch.full_like(data(60), 1.5), 0.7 * data(60) - 0.7)
    posterior = pf.fit(with_second_modes, x, squared, 20, progress=False)
    assert posterior.verdict.status == "unreliable"
    assert posterior.settings["worst_rows"] == [["row", 7], ["row", 37]]
    assert "2 of 60 rows have a second mode: row[7], row[37]" in posterior.verdict.reasons


def spread_by_points(y, batch):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=torch.float64), 5.0).to_event(1))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        w = pyro.sample("w", dist.Normal(mu if mu.dim() == 1 else mu[..., None, :], real([0.5, 0.5])).to_event(1))
        with pyro.plate("time", 3):
            pyro.sample("y", dist.Normal((w @ real([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])).mT, 1.0), obs=y[index].T)


def test_models_that_give_rows_other_shapes_at_several_points_are_mapped():
    """The shapes were an error."""
    y = data(24).reshape(8, 3)
    guide = pf.AutoHierarchicalFlow(spread_by_points, layers=2, init="prior").initialize(y, 4)
    marginal = guide.density_of_globals((y, 4), {}, real([0.0, 0.0]), 0)
    design = real([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]])
    rows = torch.distributions.MultivariateNormal(torch.zeros(3).double(), torch.eye(3) + 0.25 * design.mT @ design)
    exact = rows.log_prob(y).sum() + 2.0 * torch.distributions.Normal(0.0, 5.0).log_prob(real(0.0))
    assert torch.allclose(marginal(real([[0.0, 0.0]])), exact, atol=1e-6)


def with_outliers(x, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 10.0))
        far = dist.Normal(torch.stack([z, 0.0 * z], -1), real([0.4, 20.0]))
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(real([0.5, 0.5])), far), obs=x[index])


def test_narrow_modes_within_wide_ones_are_second_modes():
    """Distances were taken in sds of the wide one, so that 15 was near: draws hardly reach the narrow one there."""
    x = real([15.0, -15.0] * 10)
    guide = pf.AutoHierarchicalFlow(with_outliers, layers=2, init="prior").initialize(x, 10)
    marginal = guide.density_of_globals((x, 10), {}, real([0.0]), 0)
    assert len(marginal.second_modes(real([0.0]))) > 2


def with_two_signs(x, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu.abs(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def test_a_flow_that_was_asked_for_lacks_the_second_mode_of_the_globals():
    posterior = pf.fit(with_two_signs, data(200) + 1.0, 50, flow="realnvp", max_steps=500, progress=False)
    assert posterior.verdict.status == "unreliable"
    assert "the guide misses a mode near mu" in posterior.verdict.reasons[0]


def bernoulli(y, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Bernoulli(logits=z), obs=y[index])


@pytest.mark.parametrize("value", [2.0, 0.5, math.nan])
def test_data_outside_of_the_support_are_named_in_any_minibatch(value):
    y = (data(60) > 1.0).double()
    y[37] = value
    with pytest.raises(ValueError, match=r"site 'y': .*(NaN|the support of Bernoulli).*the first is at row\[37\]"):
        pf.fit(bernoulli, y, 20, progress=False)


def frequency(y, times, batch):
    w = pyro.sample("w", dist.Uniform(real(0.1), 20.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index:
        mean = torch.sin((w.unsqueeze(-1) if w.dim() == 1 else w) * times[index])
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y[index])


def test_a_start_at_a_low_mode_is_not_ok():
    """The start is a low mode of many; the best draws of the prior lie near a higher one."""
    times = torch.linspace(0.0, 10.0, 200, dtype=torch.float64)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    posterior = pf.fit(frequency, torch.sin(3.4 * times) + 0.5 * noise, times, 50, progress=False)
    w = float(posterior.samples["w"].mean())
    assert posterior.verdict.status == "unreliable" or abs(w - 3.4) < 0.1


def masked(y, kept, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    with pyro.plate("row", len(y), subsample_size=batch) as index, pyro.poutine.mask(mask=kept[index]):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def test_rows_that_are_masked_have_no_second_mode():
    y = data(60)
    kept = torch.arange(60) % 3 > 0
    posterior = pf.fit(masked, y, kept, 20, progress=False)
    precision = 0.25 + int(kept.sum()) / 2.0
    assert posterior.verdict.status == "ok"
    assert abs(float(posterior.samples["mu"].mean()) - float(y[kept].sum()) / 2.0 / precision) < 0.15 * precision**-0.5


@pytest.mark.parametrize("option", [{"runs": 2}, {"train_model": True}])
def test_options_that_do_not_go_with_minibatches_are_refused(option):
    with pytest.raises(ValueError, match="not available for a model with subsampled plates"):
        pf.fit(normal_rows, data(20), 5, progress=False, **option)


@pytest.mark.slow
def test_training_leaves_gradients_of_the_model_alone():
    """They belong to the caller's own optimizer."""
    layer = torch.nn.Linear(1, 1).double()
    layer.weight.grad = torch.full_like(layer.weight, 7.0)

    def model(x, batch):
        mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
        with pyro.plate("row", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.StudentT(1.5, z + layer(real([0.3]))[0], 0.1), obs=x[index])

    pf.fit(model, data(40), 10, progress=False, max_steps=20)
    assert torch.equal(layer.weight.grad, torch.full_like(layer.weight, 7.0))


def random_model(x, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 5.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z + torch.randn(()), 1.0), obs=x[index])


def test_a_model_that_draws_random_numbers_is_refused():
    guide = pf.AutoHierarchicalFlow(random_model, layers=2, init="prior").initialize(data(20), 5)
    with pytest.raises(ValueError, match="it draws random numbers"):
        pf.diagnose(random_model, guide, data(20), 5, progress=False)


def test_a_guide_of_all_rows_is_told_of_second_modes():
    """Weights of draws say nothing of what the guide never draws."""
    guide = pf.AutoHierarchicalFlow(with_two_signs, layers=2)
    verdict = pf.diagnose(with_two_signs, guide, data(200) + 1.0, None, progress=False).verdict
    assert verdict.status == "unreliable"
    assert "the guide misses a mode near mu" in verdict.reasons[0]


def moving(x, batch):
    """Data whose support moves with a latent: what is outside at one draw is inside at others."""
    top = pyro.sample("top", dist.LogNormal(real(-3.0), 3.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.Uniform(0.0, top), obs=x[index])


def nan_is_missing(x, batch):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 2.0))
    with pyro.plate("row", len(x), subsample_size=batch) as index:
        pyro.sample("x", dist.NanMaskedNormal(mu, 1.0), obs=x[index])


@pytest.mark.parametrize("model", [moving, nan_is_missing])
def test_data_that_may_be_outside_are_not_refused(model):
    x = torch.linspace(0.1, 3.0, 40, dtype=torch.float64)
    x = torch.where(torch.arange(40) == 7, math.nan, x) if model is nan_is_missing else x
    pf.AutoHierarchicalFlow(model, layers=2, init="prior").initialize(x, 10)


@pytest.mark.slow
def test_a_guide_that_is_off_is_told_so():
    x = data(1000, spread=1.5)
    guide = pf.AutoHierarchicalFlow(normal_rows, layers=2).initialize(x, 250)
    assert pf.diagnose(normal_rows, guide, x, 250, progress=False).verdict.status in ("ok", "corrected")
    with torch.no_grad():
        guide._top.affine.loc += 0.5
    posterior = pf.diagnose(normal_rows, guide, x, 250, progress=False)
    assert posterior.verdict.status == "unreliable"


def test_rows_are_a_plain_value():
    guide, rows = rows_of(normal_rows, data(5))
    assert isinstance(rows, Rows)
    assert guide.sizes == {"mu": 1, "tau": 1, "z": 5}
