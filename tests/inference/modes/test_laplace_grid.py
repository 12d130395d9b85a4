"""Slices along a coordinate: exact marginals, tails that draws come short of, and the flow of slices."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_flows as pf
from pyro_flows import AutoFlow, McmcDraws
from pyro_flows.fitting.laplace_grid import along
from pyro_flows.flows.recipe_json import from_json, not_rebuilt, to_json
from pyro_flows.inference.chains.judging import covered_by, evidence_of
from pyro_flows.inference.chains.search import missed_by_chains
from pyro_flows.inference.chains.starts import affine_flow
from pyro_flows.inference.modes.laplace_grid import all_grids, around, closer, grids_about, predictors_of_spread
from pyro_flows.inference.modes.missed_modes import Search
from pyro_flows.inference.modes.tops import flow_along
from pyro_flows.inference.modes.truncated_tails import truncated_tail, with_truncated_tails
from pyro_flows.transforms.sliced import Sliced
from pyro_flows.transforms.splines import between, smooth_slopes

SIGMA, WIDE, SCALE = 0.24, 2.5, 0.6
Y = torch.tensor([-0.33, -0.71, -0.08, -0.59, -0.22, -0.36, -0.61, -0.54, -0.15, -0.65, -0.28, -0.31])
INDEX = torch.arange(12) // 6


def groups(index: Tensor, y: Tensor) -> None:
    """Two groups in non-centered coordinates: the scale has a tail like one over its cube."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), WIDE))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(SCALE)))
    with pyro.plate("group", 2):
        eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((mu + tau * eta)[index], SIGMA), obs=y)


def exact() -> tuple[Tensor, Tensor]:
    """Values of log tau, and the share of the posterior below: means of groups are normal given tau."""
    u = torch.linspace(-14.0, 12.0, 8001, dtype=torch.float64)
    tau = u.exp()
    means = Y.double().view(2, 6).mean(1)
    covariance = WIDE**2 + torch.eye(2).double() * (tau.square() + SIGMA**2 / 6)[:, None, None]
    height = dist.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(means)
    height = height - torch.log1p((tau / SCALE).square()) + u
    below = (height - height.max()).exp().cumsum(0)
    return u, below / below[-1]


def draws(count: int, *, seed: int, up_to: float = 1.0) -> Tensor:
    """Exact draws of (mu, log tau, eta), of the part of the posterior up to a quantile of tau."""
    u, below = exact()
    generator = torch.Generator().manual_seed(seed)
    at = torch.searchsorted(below, up_to * torch.rand(count, generator=generator, dtype=torch.float64))
    tau = u[at].exp()
    design = torch.stack([torch.ones(count).double(), tau, 0.0 * tau, torch.ones(count).double(), 0.0 * tau, tau], 1)
    design = design.view(count, 2, 3)
    precision = torch.diag(torch.tensor([WIDE**-2, 1.0, 1.0]).double()) + design.mT @ design * 6 / SIGMA**2
    mean = torch.linalg.solve(precision, (design.mT @ Y.double().view(2, 6).mean(1))[..., None] * 6 / SIGMA**2)
    noise = torch.randn(count, 3, 1, generator=generator, dtype=torch.float64)
    x = (mean + torch.linalg.solve_triangular(torch.linalg.cholesky(precision).mT, noise, upper=True))[..., 0]
    return torch.stack([x[:, 0], tau.log(), x[:, 1], x[:, 2]], 1)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32])
def density(request):
    return pf.LogDensity(groups, (INDEX, Y.to(request.param)))


def shortened(density: pf.LogDensity) -> Tensor:
    return draws(6000, seed=1, up_to=0.96).to(density.dtype)


def test_the_marginal_is_exact_far_beyond_the_draws(density):
    z = shortened(density)
    assert predictors_of_spread(z) == [1]
    (marginal,) = all_grids(density, z, torch.zeros(len(z)), seed=0)
    u, below = exact()
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.99]).double()
    found = marginal.below(u[torch.searchsorted(below, at)])
    torch.testing.assert_close(found, at, rtol=0.0, atol=2e-3)
    assert float(z[:, 1].max()) < float(u[torch.searchsorted(below, torch.tensor(0.961).double())]) < 1.0
    assert float(marginal.places[-1]) > 3.0


def test_a_tail_is_told_only_where_draws_come_short_of_it(density):
    z = shortened(density)
    region = truncated_tail(density, z, torch.zeros(len(z)), seed=0)
    assert float(region.place[1]) > float(z[:, 1].quantile(0.95))
    assert region.place.dtype == region.start.scale.dtype == density.dtype
    assert region.beside
    whole = draws(6000, seed=2).to(density.dtype)
    assert truncated_tail(density, whole, torch.zeros(len(whole)), seed=0) is None
    few = truncated_tail(density, z, torch.zeros(len(z)), worth=50.0, seed=0)  # so few draws may miss as much by chance
    assert few is None


@pytest.mark.slow
@pytest.mark.parametrize("up_to", [0.95, 1.0])
def test_chains_that_never_come_to_a_tail_are_told_so(up_to, monkeypatch):
    """Chains in the space of a flow agree on what they all lack: nested R-hat was 1.001."""
    density = pf.LogDensity(groups, (INDEX, Y.double()))
    z = draws(64 * 200, seed=4, up_to=up_to).view(64, 200, 4)
    state = {"superchain": torch.arange(64) // 8}
    chains = McmcDraws(z, {"lp": density(z.flatten(0, 1)).view(64, 200)}, state, {"method": "hmc", "sweeps": 200})
    flow = affine_flow(z.flatten(0, 1), torch.zeros(64 * 200))
    monkeypatch.setattr("pyro_flows.inference.chains.search.mixes_with_others", lambda sampler, places: True)
    with torch.no_grad():
        given = flow.log_prob, covered_by(flow, density), evidence_of(flow, flow, chains, density), ()
        missing_mass = missed_by_chains(density, chains, *given, seed=0, sampler="some")
    said = [failure for failure in missing_mass.failures if "too little mass near tau" in failure]
    assert bool(said) == (up_to < 1.0)


def test_weights_that_know_the_tail_excuse_the_draws(density):
    z = draws(12_000, seed=3).to(density.dtype)
    thinned = torch.rand(len(z), generator=torch.Generator().manual_seed(0)) < 0.3
    kept = z[(z[:, 1] < -0.3) | thinned]
    weights = torch.where(kept[:, 1] < -0.3, 0.0, -math.log(0.3)).to(kept)
    assert truncated_tail(density, kept, torch.zeros(len(kept)), seed=0) is not None
    assert truncated_tail(density, kept, weights, seed=0) is None


def two_sides(longer: float) -> None:
    """A log scale of two effects, with two modes of another coordinate, and a longer tail at one of them or both."""
    real_line = dist.ImproperUniform(dist.constraints.real, (), ())
    side, c = pyro.sample("side", real_line), pyro.sample("c", real_line)
    pyro.sample("x", dist.Normal(torch.zeros(2).to(c), c.exp()).to_event(1))
    parts = (0.55, 0.0, 0.0), (0.05, 0.0, 2.5), (0.4 - longer, 20.0, 0.0), (longer, 20.0, 2.5)
    each = [
        math.log(share) + dist.Normal(place, 1.0).log_prob(side) + dist.Normal(middle, 1.0).log_prob(c)
        for share, place, middle in parts
        if share
    ]
    pyro.factor("log_p", torch.stack(each).logsumexp(0))


@pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")
@pytest.mark.parametrize(("longer", "up_to"), [(0.0, 1.6), (0.05, 2.6)])
def test_a_grid_of_one_of_two_modes_is_compared_with_the_draws_there(longer, up_to):
    """The tail of one mode is longer than that of both together, and exact draws were told that they come short."""
    noise = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    number = torch.arange(len(noise)) % 20  # of which twelve are of the first mode, and the first of each has more c
    there, more = number >= 12, (number == 0) | ((number == 12) & (longer > 0.0))
    side, c = noise[:, 0] + 20.0 * there, noise[:, 1] + 2.5 * more
    z = torch.cat([torch.stack([side, c], 1), c.exp()[:, None] * noise[:, 2:]], 1)
    density = pf.LogDensity(two_sides, (longer,))
    for kept, short in ((z, False), (z[there * (not longer) | (c < up_to)], True)):
        weights = torch.zeros(len(kept))
        (marginal,) = [one for one in all_grids(density, kept, weights, seed=0) if one.coordinate == 1]
        assert float(marginal.tops[:, 0].abs().max()) < 5.0
        if not longer:
            assert float(marginal.below(kept[:, 1].quantile(0.95)[None])) < 0.93
        assert (truncated_tail(density, kept, weights, seed=0) is not None) == short


def test_a_search_goes_on_to_tails_unless_it_has_found_modes(density):
    z = shortened(density)

    def drawn() -> tuple[Tensor, Tensor]:
        return z, torch.zeros(len(z))

    search = with_truncated_tails(Search(), density, drawn, seed=0)
    assert search.sentence is not None
    assert search.sentence.startswith("the guide has too little mass near tau = ")
    assert with_truncated_tails(search, density, drawn, seed=0) == search


def test_the_flow_of_slices_is_the_posterior(density):
    z = shortened(density)
    found = all_grids(density, z, torch.zeros(len(z)), seed=0)
    slices = next(one for one in found if one.coordinate == 1)
    flow = flow_along(closer(density, slices, seed=0)).to(density.dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn, log_q = flow.draw(4000)
        weights = torch.softmax((density(drawn) - log_q).double(), 0)
    assert float(1.0 / weights.square().sum()) > 0.97 * 4000
    u, below = exact()
    above = drawn[:, 1].double() > u[torch.searchsorted(below, torch.tensor(0.95).double())]
    assert float(weights[above].sum()) == pytest.approx(0.05, abs=0.012)
    assert not_rebuilt(flow) is None
    again = from_json(to_json(flow)).to(density.dtype)
    again.load_state_dict(flow.state_dict())
    torch.testing.assert_close(again.log_prob(drawn), flow.log_prob(drawn))


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("rows", [3, 9000])
def test_the_map_is_a_bijection_with_its_jacobian(dim, rows):
    map_ = Sliced(dim, coordinate=1, slices=6, bins=8, bound=6.0).double()
    generator = torch.Generator().manual_seed(dim)
    tops = torch.randn(6, dim, generator=generator, dtype=torch.float64)
    roots = torch.randn(6, dim, dim, generator=generator, dtype=torch.float64).tril(-1)
    roots = roots + torch.diag_embed(torch.rand(6, dim, generator=generator, dtype=torch.float64) + 0.5)
    tops[:, 1], roots[:, 1], roots[:, :, 1] = 0.0, 0.0, 0.0
    roots[:, 1, 1] = 1.0
    places = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0]).double()
    knots = map_.spline.at[0] * torch.tensor([1.0, 1.0, 1.3])[:, None].double()
    map_.set(places, tops, roots, (knots, torch.tensor(0.2), torch.tensor(1.7)))
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    y, ladj = map_.forward_and_ladj(x)
    back, back_ladj = map_.inverse_and_ladj(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(back_ladj, -ladj)
    one = torch.autograd.functional.jacobian(lambda point: map_(point[None])[0], x[0])
    torch.testing.assert_close(torch.linalg.slogdet(one).logabsdet, ladj[0])
    torch.testing.assert_close(map_(x.view(rows, 1, dim))[:, 0], y)
    torch.testing.assert_close(map_.forward_and_ladj(x[0])[1], ladj[0])
    torch.testing.assert_close(map_.inverse_and_ladj(y[0])[1], -ladj[0])


def test_cubic_splines_follow_what_is_smooth():
    x = torch.linspace(-2.0, 2.0, 21, dtype=torch.float64)
    at = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64)
    found = between(at, x, x.sin()[:, None], smooth_slopes(x, x.sin())[:, None])[:, 0]
    torch.testing.assert_close(found, at.sin(), rtol=0.0, atol=1e-5)


def test_nothing_is_told_of_a_normal_posterior():
    def normal() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0).double())

    density = pf.LogDensity(normal)
    z = pf.fit(normal, progress=False, refine=False).z
    assert predictors_of_spread(z) == []
    assert all_grids(density, z, torch.zeros(len(z)), seed=0) == []
    assert grids_about(density, z.mean(0), z, seed=0) == []


@pytest.mark.parametrize("level", [0.9, 0.96, 0.99])
def test_a_table_that_ends_before_the_tail_makes_no_flow(density, level):
    """Its draws would all be inside, with even weights: a tenth of the mass was gone, at a k-hat of .37."""
    z = shortened(density)
    (whole,) = all_grids(density, z, torch.zeros(len(z)), seed=0)
    whole = closer(density, whole, seed=0)
    assert whole.beyond() < 1e-3
    short = cut(whole, float(exact_quantile(level)))
    assert short.beyond() > 1e-3
    with pytest.raises(ValueError, match="fallen off at both ends"):
        flow_along(short)
    assert along(density, [short], seed=0) is None or float(closer(density, short, seed=0).beyond()) < 1e-3


def exact_quantile(level: float) -> Tensor:
    u, below = exact()
    return u[torch.searchsorted(below, torch.tensor(level).double())]


def cut(slices, end: float):
    count = int((slices.places < end).sum())
    return replace(
        slices, **{name: getattr(slices, name)[:count] for name in ("places", "log_masses", "tops", "roots")}
    )


def heavy() -> None:
    """Like x a Student-t of two degrees of freedom, and the others normal given it."""
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0).double(), 200.0))
    pyro.sample("datum", dist.StudentT(2.0, x, 1.0), obs=torch.tensor(0.0).double())
    pyro.sample("b", dist.Normal(x / 4.0, torch.exp(0.1 * torch.tanh(x))).expand([3]).to_event(1))


@pytest.mark.slow
def test_no_heavy_tail_is_cut_off():
    posterior = pf.fit(heavy, progress=False)
    x = posterior.samples["x"].double()
    exact = dist.StudentT(torch.tensor(2.0).double())
    if posterior.verdict.status != "unreliable":
        share = float((x.abs() > 9.92).double().mean())  # of one in a hundred
        assert share == pytest.approx(0.01, abs=0.006), posterior.verdict
    assert float(exact.log_prob(x).exp().mean()) > 0.0


def mirrored_given_a_scale(y: Tensor) -> None:
    """Two tops in each slice, at w and -w, with the same shares whatever the scale is."""
    scale = pyro.sample("scale", dist.HalfNormal(y.new_tensor(2.0)))
    w = pyro.sample("w", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(w.abs().sum() * y.new_ones(len(y)), 0.3 + scale).to_event(1), obs=y)


@pytest.mark.slow
def test_slices_do_not_replace_what_has_more_tops():
    y = torch.tensor([4.1, 3.7, 4.4, 3.9, 4.2]).double()
    posterior = pf.fit(mirrored_given_a_scale, y, progress=False)
    w = posterior.samples["w"]
    for number in range(2):
        assert float((w[:, number] > 0.0).double().mean()) == pytest.approx(0.5, abs=0.06)


def test_nothing_is_told_by_what_is_not_known(density):
    z = shortened(density)
    assert truncated_tail(density, z, torch.zeros(len(z)), worth=math.nan, seed=0) is None
    assert truncated_tail(density, z, torch.zeros(len(z)), worth=0.0, seed=0) is None
    assert truncated_tail(density, z[:10], torch.zeros(10), seed=0) is None


def test_too_many_dimensions_get_no_slices(density, monkeypatch):
    """They would take Hessians of 175 dimensions after a first round that was not enough."""
    z = shortened(density)
    assert len(all_grids(density, z, torch.zeros(len(z)), seed=0)) == 1
    monkeypatch.setattr("pyro_flows.inference.modes.laplace_grid.SMALL_UP_TO", 3)
    assert all_grids(density, z, torch.zeros(len(z)), seed=0) == []


def test_steps_are_stretched_until_the_marginal_has_fallen_off(density):
    """Spreads may be those of a normal distribution that is a twentieth as wide, such as one in a narrow valley."""
    z = draws(4000, seed=2)
    narrow = z.mean(0) + 0.05 * (z - z.mean(0))
    (wide, *_) = grids_about(density, z.mean(0).to(density.dtype), narrow.to(density.dtype), seed=0)
    assert wide.stretch > 1.0
    assert wide.beyond() < 1e-3
    u, below = exact()
    at = torch.tensor([0.1, 0.5, 0.9]).double()
    torch.testing.assert_close(wide.below(u[torch.searchsorted(below, at)]), at, rtol=0.0, atol=0.03)


@pytest.mark.parametrize(("missing", "left"), [([], 9), ([2], 8), ([2, 3], 7), ([1, 2, 3], 5), ([0], 0)])
def test_a_few_slices_in_a_row_may_be_unknown(missing, left):
    """The middle comes first, then those above it, then those below."""
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]).double()
    near = torch.ones(9, dtype=torch.bool)
    known = torch.tensor([number not in missing for number in range(9)])
    order = around(0, places, known, near, gap=2)
    assert len(order) == left
    assert bool((places[order].diff() > 0.0).all())


def test_no_table_goes_over_a_place_that_is_known_to_be_empty():
    places = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, -2.0, -3.0]).double()
    near = torch.tensor([True, True, False, True, True, True, True])
    order = around(0, places, near | True, near, gap=2)
    torch.testing.assert_close(places[order], torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0]).double())


def cauchy():
    """A Cauchy scale of what follows: its tail is never left behind."""
    a = pyro.sample("a", dist.Cauchy(torch.zeros(()).double(), 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(3).double(), torch.nn.functional.softplus(a)).to_event(1))


def test_a_tail_that_never_ends_is_told_short_too():
    density = pf.LogDensity(cauchy)
    generator = torch.Generator().manual_seed(0)
    level = 0.9 * torch.rand(4000, generator=generator).double()  # without the upper tenth
    a = torch.tan(math.pi * (level - 0.5))
    b = torch.randn(4000, 3, generator=generator).double() * torch.nn.functional.softplus(a)[:, None]
    region = truncated_tail(density, torch.cat([a[:, None], b], 1), torch.zeros(4000), seed=0)
    assert float(region.place[0]) > 3.0


def test_a_table_far_from_zero_keeps_its_digits(density):
    z = shortened(density)
    (marginal,) = all_grids(density, z, torch.zeros(len(z)), seed=0)
    far = replace(marginal, places=marginal.places + 1e7)
    values = z[:99, 1].double()
    torch.testing.assert_close(far.below(values + 1e7), marginal.below(values), rtol=0.0, atol=1e-3)


# the fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_scale_of_two_groups_has_its_whole_tail(seed):
    """Chains and flows ended at .97 and said that they could be used: the 95 % quantile was a quarter too small."""
    posterior = pf.fit(groups, INDEX, Y, seed=seed, progress=False)
    assert posterior.verdict.status in ("ok", "corrected")
    u, below = exact()
    tau = posterior.samples["tau"].double().log()
    for level in (0.05, 0.5, 0.95):
        share = float((tau < u[torch.searchsorted(below, torch.tensor(level).double())]).double().mean())
        assert share == pytest.approx(level, abs=0.02)


@pytest.mark.slow
def test_a_guide_that_ends_before_a_tail_is_told_so(monkeypatch):
    density = pf.LogDensity(groups, (INDEX, Y.double()))
    z = shortened(density)
    (whole,) = all_grids(density, z, torch.zeros(len(z)), seed=0)
    whole = closer(density, whole, seed=0)
    monkeypatch.setattr("pyro_flows.inference.modes.tops.OUTSIDE", 1.0)
    for slices, status in ((whole, "ok"), (cut(whole, float(z[:, 1].max())), "unreliable")):
        guide = AutoFlow.of(flow_along(slices), density.structure, groups, (INDEX, Y.double()), {})
        verdict = pf.diagnose(groups, guide, INDEX, Y.double(), seed=0).verdict
        assert verdict.status == status
        assert ("the guide has too little mass near tau" in str(verdict)) == (status == "unreliable")


def test_nothing_is_trained_where_slices_do(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("training was begun")

    monkeypatch.setattr("pyro_flows.fitting.methods.train", fail)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator)
    y = X @ torch.tensor([1.0, -0.5, 0.2]) + 0.7 * torch.randn(40, generator=generator)

    def regression(X: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)

    posterior = pf.fit(regression, X[:9], y[:9], progress=False)
    assert posterior.verdict.status == "ok"
    stages = [stage["stage"] for stage in posterior.history]
    assert stages == ["conditional Laplace grid"]
    with pytest.raises(AssertionError, match="training was begun"):
        pf.fit(regression, X[:9], y[:9], flow="planar", progress=False)
