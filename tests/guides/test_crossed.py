"""Latents in crossed plates: the sparse system is exact where all is normal, and judged by weights elsewhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_flows as pf
from pyro_flows.guides import structured
from pyro_flows.guides.conditional import Rows
from pyro_flows.guides.crossed import Crossed, Expansion
from pyro_flows.guides.crossed_marginal import CrossedMarginal
from pyro_flows.model.reading import read_structure
from pyro_flows.model.start import initial_value
from tests.models import real


def ratings(y, student, lecturer, sizes, batch=None, rows=None):
    """Ratings of lecturers by students, with a slope of each student, and lecturers in departments."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    scales = pyro.sample("scales", dist.LogNormal(real(0.0, 0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("student", sizes[0]):
        a = pyro.sample("a", dist.Normal(real(0.0, 0.0), scales[0] * real(1.0, 0.3)).to_event(1))
    with pyro.plate("department", 3):
        c = pyro.sample("c", dist.Normal(real(0.0), 0.7))
    with pyro.plate("lecturer", sizes[1]):
        b = pyro.sample("b", dist.Normal(c[torch.arange(sizes[1]) % 3], scales[1]))
    with pyro.plate("rating", len(y), subsample_size=batch, subsample=rows) as index:
        s, late = student[index], (index % 2).double()
        mean = mu + a[s, 0] + late * a[s, 1] + b[lecturer[index]]
        pyro.sample("y", dist.Normal(mean, scales[2]), obs=y[index])


def simulated(count, sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randint(sizes[0], (count,), generator=generator)
    lecturer = torch.randint(sizes[1], (count,), generator=generator)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return 0.5 + 0.8 * a[student] + 0.6 * b[lecturer] + 0.9 * noise, student, lecturer, sizes


def by_hand(y, student, lecturer, sizes, z):
    """Return mean and covariance of (a, b, c) given the others, and their log likelihood with the prior at ``z``."""
    mu, scales = z[0], z[1:].exp()
    n = 2 * sizes[0] + sizes[1] + 3
    prior = torch.zeros(n, n, dtype=torch.float64)
    at_a, at_b, at_c = torch.arange(2 * sizes[0]), 2 * sizes[0] + torch.arange(sizes[1]), n - 3 + torch.arange(3)
    to_c = torch.nn.functional.one_hot(torch.arange(sizes[1]) % 3, 3).double()
    prior[at_a, at_a] = (scales[0] * real(1.0, 0.3).repeat(sizes[0])) ** 2
    prior[at_c, at_c] = 0.49
    prior[at_b[:, None], at_b] = 0.49 * to_c @ to_c.mT + scales[1] ** 2 * torch.eye(sizes[1])
    prior[at_b[:, None], at_c] = 0.49 * to_c
    prior[at_c[:, None], at_b] = 0.49 * to_c.mT
    row, index = torch.arange(len(y)), torch.arange(len(y))
    design = torch.zeros(len(y), n, dtype=torch.float64)
    design[row, 2 * student] = 1.0
    design[row, 2 * student + 1] = (index % 2).double()
    design[row, at_b[lecturer]] = 1.0
    whole = design @ prior @ design.mT + scales[2] ** 2 * torch.eye(len(y))
    gain = prior @ design.mT @ torch.linalg.inv(whole)
    normal = torch.distributions.MultivariateNormal(mu.expand(len(y)), whole)
    log_p = normal.log_prob(y) + dist.Normal(0.0, 3.0).log_prob(mu) + dist.Normal(0.0, 1.0).log_prob(z[1:]).sum()
    return gain @ (y - mu), prior - gain @ design @ prior, log_p


NAMES = ["a", "b", "c"]


def system_of(model, *args, local=NAMES, dtype=torch.float64):
    hidden = pyro.poutine.block(model, hide=local)
    latents = read_structure(hidden, args, {}, initial_value).latents
    z = torch.zeros(sum(latent.size for latent in latents), dtype=dtype)
    return Crossed(Rows(model, latents, local, args, {}), z)


POINTS = real([0.3, -0.2, 0.1, -0.1], [-0.4, 0.3, -0.6, 0.2])


@pytest.mark.parametrize("batch", [None, 16])
def test_density_gradient_mean_and_covariance_are_exact(batch):
    args = simulated(40, (6, 5))
    system = system_of(ratings, *args, batch)
    assert system.quadratic
    leaf = POINTS.clone().requires_grad_()
    expected = torch.stack([by_hand(*args, z)[2] for z in leaf])
    density = CrossedMarginal(system, 0)
    value, gradient = density.value_and_grad(POINTS)
    assert torch.allclose(value, expected.detach(), atol=1e-8)
    assert torch.allclose(density(POINTS), value, atol=1e-10)
    assert torch.allclose(gradient, torch.autograd.grad(expected.sum(), leaf)[0], atol=1e-7)
    mean, covariance, _ = by_hand(*args, POINTS[0])
    order = [range(12), range(12, 17), range(17, 20)]
    places = [place for site in system.sites for place in order[NAMES.index(site.name)]]
    found = system.normal(POINTS[:1])
    assert torch.allclose(found.mean[0], mean[places], atol=1e-8)
    noise = torch.eye(20, dtype=torch.float64)
    root = torch.cat([found.draw(one[None]) - found.mean for one in noise])
    assert torch.allclose(root.mT @ root, covariance[places][:, places], atol=1e-8)


def test_the_density_is_that_of_the_data_that_it_is_asked_for(monkeypatch):
    """Other data than those of the first run have a system of their own: before, the first ones were judged."""
    monkeypatch.setattr(structured, "JOINT_UP_TO", 2)
    first, other = simulated(40, (6, 5)), simulated(40, (6, 5), seed=1)
    guide = pf.AutoHierarchicalFlow(ratings, layers=2, init="prior").initialize(*first, 16)
    assert guide._crossed is not None
    for args in (first, other, first):
        density = guide.density_of_globals((*args, 16), {}, POINTS[0], 0)
        expected = torch.stack([by_hand(*args, z)[2] for z in POINTS])
        assert torch.allclose(density(POINTS), expected, atol=1e-8)
        assert (density.system is guide._crossed) == (args is first)


LIKELIHOODS = {
    "Bernoulli": lambda mean: dist.Bernoulli(logits=mean),
    "Poisson": lambda mean: dist.Poisson(mean.exp()),
    "binomial": lambda mean: dist.Binomial(real(3.0), logits=mean),
    "t": lambda mean: dist.StudentT(3.0, mean, 1.0),
}


def of_other_shapes(y, student, lecturer, likelihood, prior, batch=None):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    with pyro.plate("student", 4):
        a = pyro.sample("a", prior(real(0.0)))
    with pyro.plate("lecturer", 3):
        b = pyro.sample("b", dist.Normal(real(0.0), 0.7))
    with pyro.plate("rating", len(y), subsample_size=batch) as index:
        pyro.sample("y", likelihood(mu + a[student[index]] + b[lecturer[index]]), obs=y[index])


def check_curvature(system, joint):
    """Gradient and curvature are those of the log joint density of all effects, by autograd."""
    u = system.mode + torch.linspace(-0.7, 0.8, 7, dtype=torch.float64)
    z = real([0.3])
    height, gradient, entries = system.assemble(z[None], u[None])
    dense = torch.zeros(7, 7, dtype=torch.float64)
    dense[system.pattern.row, system.pattern.column] = entries[0]
    dense = dense + dense.triu(1).mT
    order = [place for site in system.sites for place in (range(4) if site.name == "a" else range(4, 7))]
    back = torch.tensor(order).argsort()

    def value(values):
        return joint(z[0], values[back][:4], values[back][4:])

    assert torch.allclose(height, system.heights(z[None], u[None]))
    assert torch.allclose(gradient[0], torch.func.grad(value)(u), atol=1e-8)
    assert torch.allclose(dense, -torch.func.hessian(value)(u), atol=1e-8)


@pytest.mark.parametrize("batch", [None, 12])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_curvature_is_that_of_any_likelihood(name, batch):
    """Those of Bernoulli had failed: a forward pass inside of another one, under ``vmap``."""
    generator = torch.Generator().manual_seed(3)
    student, lecturer = torch.arange(24) % 4, torch.randint(3, (24,), generator=generator)
    y = torch.randint(2, (24,), generator=generator).double()
    likelihood, prior = LIKELIHOODS[name], lambda loc: dist.Normal(loc, 0.5)
    system = system_of(of_other_shapes, y, student, lecturer, likelihood, prior, batch, local=["a", "b"])
    assert not system.quadratic

    def joint(mu, a, b):
        own = prior(real(0.0)).log_prob(a).sum() + dist.Normal(real(0.0), 0.7).log_prob(b).sum()
        return own + likelihood(mu + a[student] + b[lecturer]).log_prob(y).sum()

    check_curvature(system, joint)


def test_an_even_prior_is_not_taken_for_a_normal_one():
    """Its curvature is the same at points that mirror each other."""
    student, lecturer, y = torch.arange(24) % 4, torch.arange(24) % 3, torch.linspace(-1.0, 1.0, 24).double()
    priors = {True: lambda loc: dist.Normal(loc, 0.5), False: lambda loc: dist.StudentT(3.0, loc, 0.5)}
    for normal, prior in priors.items():
        args = y, student, lecturer, lambda mean: dist.Normal(mean, 1.0), prior
        assert system_of(of_other_shapes, *args, local=["a", "b"]).quadratic == normal


def clamped(mean):
    """Normal data whose mean has a corner, below which they say nothing of a student."""
    return dist.Normal(mean.clamp_min(0.0), 1.0)


def test_rows_that_are_read_above_a_corner_only_are_found():
    student, lecturer, y = torch.arange(24) % 4, torch.arange(24) % 3, torch.linspace(-1.0, 1.0, 24).double()
    args = y, student, lecturer, clamped, lambda loc: dist.Normal(loc - 2.0, 1.0)
    system = system_of(of_other_shapes, *args, local=["a", "b"])
    assert not system.quadratic
    assert len(system._terms[-1].reads) == 2


PRIORS = {"normal": dist.Normal, "Laplace": dist.Laplace, "t": lambda loc, scale: dist.StudentT(3.0, loc, scale)}


@pytest.mark.parametrize("name", PRIORS)
def test_other_priors_are_seen_beside_rows_of_much_data_in_single_precision(name):
    """The curvature of most students is about 401, that of the lecturers 400,000."""
    student, lecturer = torch.arange(3000).clamp_max(30), torch.arange(3000) % 3

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("student", 31):
            a = pyro.sample("a", PRIORS[name](0.0, 1.0))
        with pyro.plate("lecturer", 3):
            b = pyro.sample("b", dist.Normal(0.0, 0.7))
        with pyro.plate("rating", len(y)):
            pyro.sample("y", dist.Normal(mu + a[student] + b[lecturer], 0.05), obs=y)

    y = 0.05 * torch.sin(torch.arange(3000.0))
    system = system_of(model, y, local=["a", "b"], dtype=torch.float32)
    assert system.quadratic == (name == "normal")


def test_both_ways_to_eliminate_agree():
    system = system_of(ratings, *simulated(40, (6, 5)))
    pattern, entries = system.pattern, system.assemble(POINTS, system.mode.expand(2, -1))[2]
    dense = torch.zeros(20, 20, dtype=torch.float64)
    dense[pattern.row, pattern.column] = entries[0]
    inverse = torch.linalg.inv(dense + dense.triu(1).mT)[pattern.row, pattern.column]
    found = {}
    for way in (True, False):
        pattern.__init__(pattern.row, pattern.column, pattern.size, pattern.head, pattern.width, dense=way)
        found[way] = pattern.normal(system.mode.double(), torch.zeros(2, 20, dtype=torch.float64), entries)
        assert torch.allclose(found[way].covariances()[0], inverse, atol=1e-10)
    assert torch.allclose(found[True].rest, found[False].rest)


def test_differences_of_quadratic_terms_are_their_derivatives():
    system = system_of(ratings, *simulated(40, (6, 5)), 16)
    u = system.mode + torch.linspace(-1.0, 2.0, 20, dtype=torch.float64)
    for one, other in zip(
        *(way(POINTS, u.expand(2, -1), None) for way in (system._derived, system._differences)), strict=True
    ):
        for own, also in zip(one, other, strict=True):
            assert torch.allclose(own, also, atol=1e-10)


def test_draws_of_binary_ratings_estimate_their_density():
    generator = torch.Generator().manual_seed(3)
    student, lecturer = torch.arange(24) % 4, torch.randint(3, (24,), generator=generator)
    y = torch.randint(2, (24,), generator=generator).double()
    likelihood, prior = LIKELIHOODS["Bernoulli"], lambda loc: dist.Normal(loc, 0.5)
    system = system_of(of_other_shapes, y, student, lecturer, likelihood, prior, None, local=["a", "b"])
    density, z = CrossedMarginal(system, 0), real([0.3], [-0.5])
    assert density.count > 1
    a, b = (torch.randn(20_000, size, generator=generator, dtype=torch.float64) for size in (4, 3))
    for mu, found in zip(z[:, 0], density(z), strict=True):
        terms = likelihood(mu + 0.5 * a[:, student] + 0.7 * b[:, lecturer]).log_prob(y).sum(1)
        expected = torch.logsumexp(terms, 0) - math.log(len(terms)) + dist.Normal(0.0, 3.0).log_prob(mu)
        assert float(found) == pytest.approx(float(expected), abs=0.05)
    shared = density.with_parts(1)
    assert float(density(z[:1]) - density(z[:1])) == 0.0
    step = real([1e-5])
    value, gradient = shared.value_and_grad(z[:1])
    after, before = shared(z[:1] + step), shared(z[:1] - step)
    assert float(gradient) == pytest.approx(float(after - before) / 2e-5, abs=0.01)
    assert float(value) == float(shared(z[:1]))


def test_draws_without_a_density_are_not_picked_and_a_point_without_any_is_named(monkeypatch):
    y, (student, lecturer) = torch.tensor([0.0, 1.0, 1.0, 0.0]).double(), torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]])
    likelihood, prior = LIKELIHOODS["Bernoulli"], lambda loc: dist.Normal(loc, 0.5)
    system = system_of(of_other_shapes, y, student, lecturer, likelihood, prior, None, local=["a", "b"])
    density, z = CrossedMarginal(system, 0), real([0.3], [-0.5])
    u, log_q = density._drawn(z, 0)
    u[:, 1:] = torch.nan
    monkeypatch.setattr(density, "_drawn", lambda *_: (u, log_q))
    assert torch.allclose(density(z), system.heights(z, u[:, 0]) - log_q[:, 0] - math.log(density.count))
    drawn = density.local_draws(z, ["a"], torch.arange(1), 0)["a"]
    assert torch.allclose(drawn, system.split(u[:, 0])["a"])
    u[1] = torch.nan
    with pytest.raises(ValueError, match=r"local_samples: expected a finite log density .* got none at 1 of 2"):
        density.local_draws(z, ["a"], torch.arange(1), 0)


def test_an_expansion_is_exact_where_it_was_made_and_close_near_it():
    args = simulated(40, (6, 5))
    system = system_of(ratings, *args, 16)
    found = Expansion(system, POINTS[0], torch.full((4,), 0.02, dtype=torch.float64))
    for away, near in ((0.0, 1e-7), (0.05, 0.02)):
        z = POINTS[:1] + away
        draws, density = found.drawn(z, torch.zeros(1, 1, 20, dtype=torch.float64))
        exact, known = system.drawn(z, torch.zeros(1, 1, 20, dtype=torch.float64))
        assert torch.allclose(draws, exact, atol=near)
        assert torch.allclose(density, known, atol=near)


def together(y, batch):
    """Each row reads two rows of one site."""
    scale = pyro.sample("scale", dist.LogNormal(real(0.0), 1.0))
    with pyro.plate("step", 300):
        x = pyro.sample("x", dist.Normal(real(0.0), scale))
    with pyro.plate("row", 299, subsample_size=batch) as index:
        pyro.sample("y", dist.Normal(x[index + 1] - x[index], 1.0), obs=y[index])


def test_what_it_cannot_follow_is_named():
    guide = pf.AutoHierarchicalFlow(together, init="prior")
    with pytest.raises(ValueError, match=r"site 'x'.*several rows of site 'x' are read together"):
        guide.initialize(torch.zeros(299, dtype=torch.float64), 50)
    args = simulated(900, (210, 205))
    guide = pf.AutoHierarchicalFlow(ratings, init="prior")
    with pytest.raises(ValueError, match="all rows of plate 'rating' are needed at first"):
        guide.initialize(*args, None, torch.arange(100))


def beside(y, x, batch=None):
    """The data of a minibatch read no latent in plates."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("column", y.shape[1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with pyro.plate("line", len(y), dim=-2):
        b = pyro.sample("b", dist.Normal(real(0.0), 1.0))
        with pyro.plate("cell", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a + b, 0.5), obs=y)
    with pyro.plate("other", len(x), subsample_size=batch, dim=-1) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def test_minibatches_may_read_no_latent_in_plates():
    y, x = simulated(12, (5, 4))[0].reshape(4, 3), real(0.5, 1.0, 1.5, 0.0)
    guide = pf.AutoHierarchicalFlow(beside, layers=2)
    torch.manual_seed(0)
    svi = SVI(beside, guide, pyro.optim.Adam({"lr": 0.005}), Trace_ELBO())
    assert all(math.isfinite(svi.step(y, x, 2)) for _ in range(3))
    assert guide._crossed is not None
    found = Trace_ELBO(50, vectorize_particles=True, max_plate_nesting=2).loss(beside, guide, y, x)
    every = torch.cat([y.flatten(), x])
    column, line = torch.arange(12) % 3, torch.arange(12) // 3
    same = (column[:, None] == column).double() + (line[:, None] == line).double() + 0.25 * torch.eye(12)
    covariance = 1.0 + torch.block_diag(same, torch.eye(4)).double()
    evidence = torch.distributions.MultivariateNormal(0.0 * every, covariance).log_prob(every)
    assert found == pytest.approx(-float(evidence), abs=0.3)


def products(y):
    """Items have slopes and places: at the middle of the prior, curvatures are those of no maximum."""
    mu = pyro.sample("mu", dist.Normal(real(0.0), 1.0))
    with pyro.plate("item", y.shape[1], dim=-1):
        place = pyro.sample("place", dist.Normal(mu, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(real(0.0), 0.5))
    with pyro.plate("student", len(y), dim=-2):
        skill = pyro.sample("skill", dist.Normal(real(0.0), 1.0))
        with pyro.plate("both", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=slope * (skill - place)), obs=y)


@pytest.mark.falls_back
def test_without_a_maximum_nearby_small_sites_are_the_flows():
    """Draws were NaN, and the first step an error."""
    rows, columns = torch.arange(60)[:, None], torch.arange(15)
    y = ((0.1 * rows - 0.4 * columns + 3.0 * torch.sin(7.0 * rows * columns + rows)) > 0.0).double()
    rows = Rows(products, read_structure(products, (y,), {}).latents[:1], ["place", "slope", "skill"], (y,), {})
    with pytest.raises(ValueError, match="curvatures are not those of a maximum"):
        Crossed(rows, real([0.0]))
    guide = pf.AutoHierarchicalFlow(products, layers=2, init="prior").initialize(y)
    assert guide.local == ["skill"]
    assert math.isfinite(Trace_ELBO().loss(products, guide, y))


def effects(y, student, lecturer, sizes, batch=None, rows=None, binary=False):
    mu = pyro.sample("mu", dist.Normal(real(0.0), 3.0))
    scales = pyro.sample("scales", dist.LogNormal(real(0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("student", sizes[0]):
        a = pyro.sample("a", dist.Normal(real(0.0), scales[..., 0]))
    with pyro.plate("lecturer", sizes[1]):
        b = pyro.sample("b", dist.Normal(real(0.0), scales[..., 1]))
    with pyro.plate("rating", len(y), subsample_size=batch, subsample=rows) as index:
        mean = mu + a[..., student[index]] + b[..., lecturer[index]]
        fn = dist.Bernoulli(logits=mean) if binary else dist.Normal(mean, 0.9)
        pyro.sample("y", fn, obs=y[index])


def grid(system, z):
    """Return means and sds of the globals by importance weights of many draws around ``z``'s."""
    mean, root = z.mean(0), torch.linalg.cholesky(torch.cov(z.mT))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, len(mean), generator=generator, dtype=torch.float64)
    points = mean + 1.2 * noise @ root.mT
    weights = torch.softmax(CrossedMarginal(system, 0)(points) + 0.5 * noise.square().sum(1), 0)[:, None]
    middle = (weights * points).sum(0)
    return middle, (weights * (points - middle).square()).sum(0).sqrt()


@pytest.mark.slow
def test_a_fit_of_crossed_plates_is_right():
    args = simulated(2000, (210, 205))
    posterior = pf.fit(effects, *args, 500, progress=False, draws=400)
    assert posterior.verdict.status in ("ok", "corrected")
    z = torch.cat([posterior.samples["mu"][:, None], posterior.samples["scales"].log()], 1)
    mean, sd = grid(system_of(effects, *args, local=["a", "b"]), z)
    assert float(((z.mean(0) - mean) / sd).abs().max()) < 0.2
    assert float((z.std(0) / sd).log().abs().max()) < 0.12
    draws = posterior.local_samples(["a", "b"], draws=100)
    assert draws["a"].shape == (100, 210)
    assert draws["b"].shape == (100, 205)


@pytest.mark.slow
def test_effects_of_binary_ratings_are_never_wrongly_ok():
    y, *rest = simulated(1500, (210, 205))
    posterior = pf.fit(effects, (y > 0.5).double(), *rest, 500, None, True, progress=False, draws=100)
    assert posterior.verdict.status == "unreliable"


@pytest.mark.falls_back  # PathELBO takes Trace_ELBO for this guide
@pytest.mark.parametrize("given", [False, True])
def test_it_trains_on_minibatches(given):
    args = simulated(1200, (210, 205))
    every = torch.arange(1200)
    guide = pf.AutoHierarchicalFlow(effects, layers=2).initialize(
        *args, None if given else 300, every if given else None
    )
    pyro.set_rng_seed(0)
    svi = SVI(effects, guide, pyro.optim.Adam({"lr": 1e-3}), pf.PathELBO(num_particles=1) if given else Trace_ELBO())
    for rows in torch.randperm(1200).split(300):
        assert svi.step(*args, None if given else 300, rows if given else None) > 0.0
    posterior = pf.diagnose(
        effects, guide, *args, None if given else 300, every if given else None, draws=200, progress=False
    )
    assert posterior.verdict.status in ("ok", "corrected")
    draws = Predictive(effects, guide=guide, num_samples=3)(*args, None if given else 300, every if given else None)
    assert draws["a"].reshape(3, -1).shape == (3, 210)
