"""Toy targets with known log normalisers and moments, as Pyro models without data.

    target = TARGETS["u1"]
    pyro_flows.fit(target.model, flow="planar", layers=32)

All but the funnel are energies: a site with an improper prior on the whole space and a ``pyro.factor``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

LogDensity2 = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A toy posterior and what is known of it.

    ``mean`` and ``sd`` are exact moments of the leading coordinates: a tail so heavy that a sample's sd says little is
    left out. ``mode`` gives the number of the mode that each draw (S, D) belongs to; ``shares`` is each mode's mass.
    """

    name: str
    model: Callable[[], None]
    log_evidence: float
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    mode: Callable[[Tensor], Tensor] | None = None
    shares: tuple[float, ...] = ()


def energy_model(log_density: LogDensity2, dim: int) -> Callable[[], None]:
    """Return the model of one site ``x`` (dim,) whose density is proportional to ``exp(log_density(x))``."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
        pyro.factor("density", log_density(x))

    return model


# ---- Rezende and Mohamed's potentials --------------------------------------------------------------------------------


def _normal(x: Tensor) -> Tensor:
    return -0.5 * x.square()


def _wall(z1: Tensor) -> Tensor:
    """Keep z1 within about 4: three of the potentials do not decay along it."""
    return _normal(torch.relu(z1.abs() - 4.0) / 0.4)


def _wave(z1: Tensor) -> Tensor:
    return torch.sin(0.5 * math.pi * z1)


def log_u1(z: Tensor) -> Tensor:
    """Return -U1: two arcs of a ring, around (-2, 0) and (2, 0)."""
    z1 = z[..., 0]
    arcs = torch.logaddexp(_normal((z1 - 2.0) / 0.6), _normal((z1 + 2.0) / 0.6))
    return _normal((torch.linalg.vector_norm(z, dim=-1) - 2.0) / 0.4) + arcs


def log_u2(z: Tensor) -> Tensor:
    """Return -U2: a wave, with a wall at its ends."""
    z1, z2 = z.unbind(-1)
    return _normal((z2 - _wave(z1)) / 0.4) + _wall(z1)


def log_u3(z: Tensor) -> Tensor:
    """Return -U3: a wave that splits in the middle, with a wall at its ends."""
    z1, z2 = z.unbind(-1)
    away = z2 - _wave(z1)
    bump = 3.0 * torch.exp(_normal((z1 - 1.0) / 0.6))
    return torch.logaddexp(_normal(away / 0.35), _normal((away + bump) / 0.35)) + _wall(z1)


def log_u4(z: Tensor) -> Tensor:
    """Return -U4: a wave that splits for good, with a wall at its ends."""
    z1, z2 = z.unbind(-1)
    away = z2 - _wave(z1)
    drop = 3.0 * torch.sigmoid((z1 - 1.0) / 0.3)
    return torch.logaddexp(_normal(away / 0.4), _normal((away + drop) / 0.35)) + _wall(z1)
