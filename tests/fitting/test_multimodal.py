"""Posteriors of several modes in one call."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyro_flows as pf
from benchmarks.modes import labels, sbi
from benchmarks.toys import targets
from pyro_flows.fitting import combine, methods
from pyro_flows.fitting.multimodal import multimodal
from pyro_flows.inference.verdict.methods import INDEPENDENT, MIXTURE, TABULATED
from pyro_flows.support.process.progress import Bar


def line_of(count, distance):
    """Equal normals side by side on a line."""

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        centers = distance * torch.arange(count, dtype=torch.float64)
        pyro.factor("modes", torch.logsumexp(dist.Normal(centers, 1.0).log_prob(z), 0) - math.log(count))

    return model


@pytest.mark.slow
def test_eight_modes_on_a_line():
    posterior = pf.fit(line_of(8, 12.0), progress=False)
    assert posterior.verdict.status == "corrected"
    shares = torch.bincount((posterior.samples["z"] / 12.0).round().long(), minlength=8) / len(posterior.samples["z"])
    assert float((8.0 * shares - 1.0).abs().max()) < 0.25
    assert abs(posterior.log_evidence) < 0.02
    assert TABULATED in [stage["stage"] for stage in posterior.history]


@pytest.mark.slow
def test_forty_modes_on_a_square(tmp_path):
    target = targets.TARGETS["mixture"]
    posterior = pf.fit(target.model, progress=False)
    assert posterior.verdict.status == "corrected"
    ratios = target.modes(posterior.samples["x"].double()).double().mean(0) * 40.0
    assert float(ratios.min()) > 1.0 / 1.5
    assert float(ratios.max()) < 1.5
    posterior.save(tmp_path / "forty")
    again = pf.load(tmp_path / "forty")
    z = posterior.z[:50]
    torch.testing.assert_close(again.flow.log_prob(z), posterior.flow.log_prob(z), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_with_escalate_false_a_flow_is_trained():
    posterior = pf.fit(line_of(2, 12.0), progress=False, escalate=False, max_steps=300, draws=500)
    assert MIXTURE not in [stage["stage"] for stage in posterior.history]
    assert posterior.verdict.status == "unreliable"


def test_a_mixture_that_lacks_a_mode_is_not_called_good(monkeypatch):
    """The survey is made to see two of three modes: the search that follows says what is missing."""
    whole = methods.multimodal

    def blind(density, z, places=None, *, seed, bar, **_):
        far = pf.LogDensity(line_of(2, 12.0))
        return whole(far, z, None, seed=seed, bar=bar)

    monkeypatch.setattr(methods, "multimodal", blind)
    monkeypatch.setattr(combine, "multimodal", blind)
    posterior = pf.fit(line_of(3, 12.0), progress=False, draws=1000, refine=False)
    assert posterior.verdict.status == "unreliable"
    assert "misses a mode near z = 24" in str(posterior.verdict)


@pytest.mark.slow
def test_free_labels_have_all_orders():
    posterior = pf.fit(labels.labels, labels.data(), progress=False)
    assert posterior.verdict.status != "unreliable"
    shares = labels.orders(posterior.samples["places"]).double().mean(0)
    assert float((6.0 * shares - 1.0).abs().max()) < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slcp", "two_moons"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_sbibm(name, number):
    try:
        data, reference = sbi.observation(name, number), sbi.reference(name, number)
    except LookupError as error:
        pytest.skip(str(error))
    posterior = pf.fit(sbi.TASKS[name].model, data, progress=False)
    assert posterior.verdict.status != "unreliable"
    draws = posterior.samples["parameters"]
    shares = sbi.TASKS[name].modes(draws).double().mean(0)
    assert float((shares - 1.0 / len(shares)).abs().max()) <= 0.03
    pytest.importorskip("sklearn")
    assert sbi.c2st(reference[: len(draws)], draws.double()) <= 0.55


@pytest.mark.slow
def test_tops_that_are_edges_are_tabulated():
    """Sixteen numbers of which noise has told the size, some of them negative: no climb comes to rest at a cusp."""
    y = torch.linspace(-0.3, 1.2, 16, dtype=torch.float64)

    def model():
        with pyro.plate("element", 16):
            x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("y", dist.Normal(x.abs(), 0.1), obs=y)

    posterior = pf.fit(model, progress=False)
    assert posterior.verdict.status in ("ok", "corrected"), posterior.verdict
    x = posterior.samples["x"]
    grid = torch.linspace(0.0, 5.0, 20_001, dtype=torch.float64)[:, None]
    weight = (-0.5 * grid.square() - 0.5 * ((y - grid) / 0.1).square()).softmax(0)
    assert float(((x > 0.0).double().mean(0) - 0.5).abs().max()) < 0.05
    size = (grid * weight).sum(0)
    spread = ((grid - size).square() * weight).sum(0).sqrt()
    assert float(((x.abs().mean(0) - size) / spread).abs().max()) < 0.1


def test_coordinates_that_depend_on_each_other_at_a_missed_mode_are_not_tabulated():
    """The table took the place of a normal distribution, lacked the mode as well, and no run was added there."""
    dim = 12

    def log_density(z):
        z = z.double()
        second = dist.Normal(9.0, 1.0).log_prob(z[..., 0])
        second = second + dist.Normal(6.0, (0.5 * (z[..., :1] - 9.0)).exp()).log_prob(z[..., 1:]).sum(-1)
        return torch.logaddexp(dist.Normal(0.0, 1.0).log_prob(z).sum(-1), math.log(0.04) + second)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("both", log_density(z))

    density = pf.LogDensity(model)
    z = torch.randn(100, dim, generator=torch.Generator().manual_seed(0), dtype=density.dtype)
    top = torch.full((1, dim), 6.0, dtype=density.dtype)
    top[0, 0] = 9.0 - 0.5 * (dim - 1)
    alone = multimodal(density, z, seed=0, bar=Bar("", False))
    assert alone is not None
    assert alone.stage.stage == INDEPENDENT
    found = multimodal(density, z, top, seed=0, bar=Bar("", False))
    assert found is None or found.stage.stage != INDEPENDENT


def test_one_coordinate_is_not_called_independent():
    posterior = pf.fit(line_of(2, 12.0), progress=False)
    assert any("the density was tabulated" in reason for reason in posterior.verdict.reasons)
    assert not any("independent" in reason for reason in posterior.verdict.reasons)
    assert posterior.method == TABULATED
    assert TABULATED in [stage["stage"] for stage in posterior.history]
    assert "the density of z, the only coordinate, was tabulated" in posterior.methods_text().replace("The", "the")
