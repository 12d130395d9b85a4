"""What each choice of coordinates promises: the same posterior, with the Jacobian of the map between them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_flows import LogDensity
from pyro_flows.model.charts import Circle, Heavy, Walls, write_chart
from tests.model.test_noncentered import Y, families, hierarchy, steps
from tests.models import real
from tests.registry import normal

pytestmark = pytest.mark.filterwarnings("ignore::pyro_flows.NothingObservedWarning")


def angle() -> None:
    t = pyro.sample("t", dist.VonMises(real(3.0), 2.0))
    pyro.sample("y", dist.Normal(t.sin(), 0.5), obs=real(0.4))


def heavy() -> None:
    t = pyro.sample("t", dist.Cauchy(real(0.0, 1.0), 2.0).to_event(1))
    pyro.sample("y", dist.Normal(t.sum(), 0.5), obs=real(0.4))


LEARNED = {"theta": {"precision": real([0.3, 0.0, 2.0, 1.0]), "center": real([1.0, 0.0, -0.5, 0.2])}}
COORDINATES = {
    "non-centered": (hierarchy, (Y,), True),
    "learned centering": (hierarchy, (Y,), LEARNED),
    "non-centered families": (families, (), True),
    "non-centered steps": (steps, (4,), True),
    "an angle": (angle, (), {"t": write_chart(Circle(real(0.5)))}),
    "heavy tails": (heavy, (), {"t": write_chart(Heavy(real(0.0, 1.0), real(1.0, 2.0)))}),
    "walls": (heavy, (), {"t": write_chart(Walls(real(-50.0, -60.0), real(50.0, 40.0)))}),
}


def pair(name: str) -> tuple[LogDensity, LogDensity]:
    """The density in the model's own unconstrained coordinates, and in others."""
    model, args, chosen = COORDINATES[name]
    return LogDensity(model, args), LogDensity(model, args, noncentered=chosen)


@pytest.mark.parametrize("name", COORDINATES)
def test_densities_differ_by_the_jacobian(name) -> None:
    """By central differences of the map from these coordinates to those of the model."""
    plain, other = pair(name)

    def to_plain(row: Tensor) -> Tensor:
        return plain.unconstrain(other.constrain(row[None]))[0]

    step = 1e-6
    for row in normal(3, other.dim, seed=2):
        shifts = step * torch.eye(other.dim, dtype=torch.float64)
        jacobian = torch.stack([(to_plain(row + h) - to_plain(row - h)) / (2 * step) for h in shifts], dim=1)
        expected = plain(to_plain(row)[None]) + torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(other(row[None]), expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", COORDINATES)
def test_values_lead_back(name) -> None:
    _, other = pair(name)
    z = normal(7, other.dim, seed=4)
    assert torch.allclose(other.unconstrain(other.constrain(z)), z, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("name", COORDINATES)
def test_gradients_are_those_of_the_density(name) -> None:
    _, other = pair(name)
    z = normal(5, other.dim, seed=5)
    step = 1e-5 * torch.eye(other.dim, dtype=torch.float64)
    expected = torch.stack([(other(z + h) - other(z - h)) / 2e-5 for h in step], 1)
    torch.testing.assert_close(other.value_and_grad(z)[1], expected, rtol=1e-5, atol=1e-5)
