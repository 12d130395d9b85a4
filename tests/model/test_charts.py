"""Charts: maps and their derivatives, and which sites get one."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_flows as pf
from pyro_flows.inference.starts.charting import choose_charts
from pyro_flows.model.charts import Circle, Heavy, Walls, read_chart, write_chart
from tests.models import real
from tests.registry import normal

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")

CIRCLE = Circle(real(0.0, 3.0, -3.1))
HEAVY = Heavy(real(0.0, 2.0, -1.0), real(1.0, 0.0, 0.3))
WALLS = Walls(real(-1.0, 2.0, -math.inf), real(math.inf, 5.0, 3.0))


def check_chart(chart):
    """The log derivative is autograd's, the inverse goes back, and the map goes up, but for a turn."""
    u = 2.0 * normal(40, 3, seed=1)
    y, ladj = chart.forward(u)
    derivative = torch.func.vmap(torch.func.jacrev(lambda row: chart.forward(row)[0]))(u)
    diagonal = derivative.diagonal(dim1=1, dim2=2)
    assert bool((diagonal > 0).all())
    torch.testing.assert_close(ladj, diagonal.log())
    torch.testing.assert_close(derivative, torch.diag_embed(diagonal))
    torch.testing.assert_close(chart.inverse(y), u, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chart", [CIRCLE, HEAVY, WALLS], ids=["circle", "heavy", "walls"])
def test_chart(chart):
    check_chart(chart)


def test_angles_stay_in_one_turn():
    u = torch.cat([6.0 * normal(2000, 3, seed=2), torch.tensor([[-60.0], [0.0], [60.0]]).double().expand(3, 3)])
    y, _ = CIRCLE.forward(u)
    assert bool(((y >= -math.pi) & (y < math.pi)).all())
    torch.testing.assert_close(CIRCLE.forward(torch.zeros(1, 3).double())[0][0], CIRCLE.center)
    # a value is the same angle whatever turn it is in
    angle = torch.linspace(-3.0, 2.9, 20).double()[:, None].expand(20, 3)
    for turns in (-2, 1):
        torch.testing.assert_close(CIRCLE.inverse(angle + turns * 2.0 * math.pi), CIRCLE.inverse(angle))
    torch.testing.assert_close(CIRCLE.forward(CIRCLE.inverse(angle))[0], angle)


def test_heavy_is_for_its_entries_alone():
    u = 3.0 * normal(10, 3, seed=3)
    y, ladj = HEAVY.forward(u)
    assert torch.equal(y[:, 1], u[:, 1])
    assert not bool(ladj[:, 1].any())
    torch.testing.assert_close(y[:, 2], -1.0 + 0.3 * torch.sinh(u[:, 2]))
    far, far_ladj = HEAVY.forward(torch.full((1, 3), 300.0).double())
    assert bool(torch.isfinite(far_ladj).all())
    torch.testing.assert_close(HEAVY.inverse(far), torch.full((1, 3), 300.0).double())


@pytest.mark.parametrize("chart", [CIRCLE, HEAVY, WALLS, None], ids=["circle", "heavy", "walls", "none"])
def test_as_plain_numbers(chart):
    again = read_chart(write_chart(chart), torch.Size([3]), real(0.0))
    assert type(again) is type(chart)
    u = normal(5, 3, seed=4)
    assert chart is None or torch.equal(again.forward(u)[0], chart.forward(u)[0])


def test_walls_bound_values_and_take_those_from_beyond_inside():
    y, ladj = WALLS.forward(torch.cat([8.0 * normal(500, 3, seed=6), torch.full((1, 3), -600.0).double()]))
    assert bool(((y >= WALLS.low) & (y <= WALLS.high)).all())
    assert bool(torch.isfinite(ladj).all())
    free = Walls(real(-math.inf), real(math.inf))
    u = normal(4, 1, seed=7)
    assert torch.equal(free.forward(u)[0], u)
    assert not bool(free.forward(u)[1].any())
    beyond = WALLS.inverse(real(-3.0, 9.0, 4.0))
    assert bool(torch.isfinite(beyond).all())
    inside = WALLS.forward(beyond)[0]
    torch.testing.assert_close(inside, real(1.0, 3.5, 2.0))
    json.dumps(write_chart(WALLS), allow_nan=False)


# the choice -----------------------------------------------------------------------------------------------------------


def chosen(model, *args):
    density = pf.LogDensity(model, args)
    got, start, names = choose_charts(density, None, seed=0)
    assert start is None
    charts = {latent.name: latent.chart for latent in got.structure.latents}
    assert sorted(names) == sorted(name for name, chart in charts.items() if chart is not None)
    if names:  # the same density, in other coordinates
        z = normal(6, got.dim, seed=5)
        values = got.constrain(z)
        other = density.unconstrain(values)
        torch.testing.assert_close(got(z) - got.log_jacobian(z), density(other) - density.log_jacobian(other))
    return charts


def mixed():
    pyro.sample("angle", dist.VonMises(real(3.0), real(2.0)))
    pyro.sample("normal", dist.Normal(real(0.0), 1.0))
    pyro.sample("cauchy", dist.Cauchy(real(5.0), real(2.0)))
    pyro.sample("t3", dist.StudentT(real(3.0), real(0.0), real(1.0)))
    pyro.sample("laplace", dist.Laplace(real(0.0), real(1.0)))
    pyro.sample("t30", dist.StudentT(real(30.0), real(0.0), real(1.0)))


def check_choice():
    charts = chosen(mixed)
    kinds = {name: type(chart).__name__ for name, chart in charts.items() if chart is not None}
    assert kinds == {"angle": "Circle", "cauchy": "Heavy", "t3": "Heavy"}
    assert abs(math.remainder(float(charts["angle"].center) - 3.0, 2.0 * math.pi)) < 1.0
    assert abs(float(charts["cauchy"].loc) - 5.0) < 2.0
    assert 0.5 < float(charts["cauchy"].scale) < 6.0


@pytest.mark.falls_back  # torch draws from VonMises by rejection, point by point
def test_sites_get_the_charts_that_they_need():
    check_choice()


def test_tails_that_the_data_cut_off_are_not_heavy():
    def measured(y):
        x = pyro.sample("x", dist.Cauchy(real(0.0), real(1.0)).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x[0], 1.0), obs=y)

    chart = chosen(measured, real(0.3))["x"]
    assert chart.scale[0] == 0.0
    assert chart.scale[1] > 0.0


def test_masked_entries_keep_their_places():
    kept = torch.tensor([True, False, True])

    def masked():
        with pyro.plate("three", 3), poutine.mask(mask=kept):
            x = pyro.sample("x", dist.Cauchy(real(0.0, 0.0, 4.0), real(1.0)))
        pyro.factor("last", -0.5 * (x[2] - 4.0) ** 2)

    chart = chosen(masked)["x"]
    assert chart.scale.shape == (3,)
    assert (chart.scale > 0.0).tolist() == [True, False, False]


def uniform_data(y, z):
    """Upper bounds in a plate, a lower one, and a number between data, which no prior knows of."""
    with pyro.plate("bound", y.shape[-1], dim=-1):
        top = pyro.sample("top", dist.LogNormal(real(0.0), 1.0))
        with pyro.plate("row", len(y), dim=-2):
            pyro.sample("y", dist.Uniform(real(0.0), top), obs=y)
    low = pyro.sample("low", dist.Normal(real(0.0), 3.0))
    pyro.sample("z", dist.Uniform(low, low + 10.0), obs=z)
    pyro.sample("free", dist.Normal(real(0.0), 1.0))


def test_what_data_bound_gets_walls():
    y, z = real([0.3, 2.0], [0.9, 1.1]), real(1.5)
    charts = chosen(uniform_data, y, z)
    assert charts["free"] is None
    torch.testing.assert_close(charts["top"].low, y.amax(0).log(), atol=1e-7, rtol=0.0)
    assert bool(torch.isinf(charts["top"].high).all())
    torch.testing.assert_close(charts["low"].low, real(-8.5), atol=1e-7, rtol=0.0)
    torch.testing.assert_close(charts["low"].high, real(1.5), atol=1e-7, rtol=0.0)


@pytest.mark.slow
def test_a_bound_by_data_is_fitted_saved_and_loaded(tmp_path):
    """Draws had no finite density, and the fit was `unreliable` after a minute."""
    y, z = real([0.3, 2.0], [0.9, 1.1]), real(1.5)
    posterior = pf.fit(uniform_data, y, z, progress=False)
    assert posterior.verdict.status in ("ok", "refined")
    top = posterior.samples["top"]
    assert bool((top > y.amax(0)).all())
    u = torch.linspace(0.0, 12.0, 200_001).double()[:, None] + y.amax(0).log()  # in log(top): normal, less two rows
    weights = torch.softmax(-0.5 * u.square() - 2.0 * u, 0)
    mean = (weights * u.exp()).sum(0)
    sd = ((weights * u.exp().square()).sum(0) - mean.square()).sqrt()
    assert float(((top.mean(0) - mean) / sd).abs().max()) < 0.08
    posterior.save(tmp_path / "kept")
    again = pf.load(tmp_path / "kept", uniform_data, y, z)
    torch.testing.assert_close(again.samples["top"], top)
    assert torch.equal(again.guide.sample_posterior(3)["top"] > y.amax(0), torch.ones(3, 2).bool())


GROUP = torch.arange(150) % 12


def delays(y):
    """Times after a shift of each group, of which a few latents tell the spread: it ends at the first time there."""
    m = pyro.sample("m", dist.Normal(real(0.0), 2.0))
    s = pyro.sample("s", dist.HalfNormal(real(1.0)))
    rate = pyro.sample("rate", dist.HalfNormal(real(1.0)))
    with pyro.plate("group", 12):
        shift = pyro.sample("shift", dist.Normal(m, s))
    with pyro.plate("row", len(y)):
        after = dist.transforms.AffineTransform(shift[GROUP], 1.0)
        pyro.sample("y", dist.TransformedDistribution(dist.Exponential(rate), after), obs=y)


def delayed():
    first = normal(12, seed=8)
    return first[GROUP] - (1e-3 + normal(150, seed=9).abs()).log()


@pytest.mark.parametrize("seed", [1, 2])
def test_all_walls_are_found_though_no_draw_of_the_prior_is_near_all(seed):
    """Walls had to be within 50 nats of the best of three draws, whose scale may be small."""
    y = delayed()
    density, _, _ = choose_charts(pf.LogDensity(delays, (y,)), None, seed=seed)
    (shift,) = (latent for latent in density.structure.latents if latent.name == "shift")
    first = torch.stack([y[number == GROUP].min() for number in range(12)])
    torch.testing.assert_close(shift.chart.high, first, atol=1e-6, rtol=0.0)


def test_supports_that_move_with_latents_are_no_walls():
    def moving(y):
        scale = pyro.sample("scale", dist.HalfNormal(real(2.0)))
        shift = pyro.sample("shift", dist.Normal(real(0.0), 1.0))
        pyro.sample("y", dist.Uniform(shift - scale, shift + scale), obs=y)

    assert chosen(moving, real(0.4, 0.9)) == {"scale": None, "shift": None}
