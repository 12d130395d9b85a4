"""Toy targets with known log normalizers and moments, as Pyro models without data.

    target = TARGETS["u1"]
    pyro_flows.fit(target.model, flow="planar", layers=32)

All but ``funnel`` are energies: a site with an improper prior on the whole space and a ``pyro.factor``.
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

LogProb = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A toy posterior and what is known of it.

    ``mean`` and ``sd`` are exact moments of the leading coordinates; those whose tails are so heavy that the sd of a
    sample says little are left out. ``modes`` tells which of M modes each draw (S, D) belongs to, as booleans (S, M);
    ``shares`` (M,) are their masses.
    """

    name: str
    model: Callable[[], None]
    log_evidence: float
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    modes: Callable[[Tensor], Tensor] | None = None
    shares: tuple[float, ...] = ()


def energy_model(log_density: LogProb, dim: int) -> Callable[[], None]:
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


# ---- the others ------------------------------------------------------------------------------------------------------

FUNNEL_SD = 3.0
FUNNEL_LEAVES = 9


def funnel() -> None:
    """Neal's funnel: ``x0 ~ normal(0, 3), x_i ~ normal(0, exp(x0 / 2))``, i = 1, ..., 9."""
    x0 = pyro.sample("x0", dist.Normal(0.0, FUNNEL_SD))
    with pyro.plate("leaf", FUNNEL_LEAVES):
        pyro.sample("x", dist.Normal(0.0, torch.exp(0.5 * x0)))


def log_funnel(z: Tensor) -> Tensor:
    """Return the funnel's log density, z = (x0, x): nothing of its structure can be seen from outside."""
    x0, x = z[..., 0], z[..., 1:]
    leaves = _normal(x * torch.exp(-0.5 * x0)[..., None]).sum(-1) - 0.5 * FUNNEL_LEAVES * x0
    constant = 0.5 * (FUNNEL_LEAVES + 1) * math.log(2.0 * math.pi) + math.log(FUNNEL_SD)
    return _normal(x0 / FUNNEL_SD) + leaves - constant


PAIRS = 16
WELL_MEAN, WELL_SD = 1.187961, 1.244409  # of exp(x / 2 + 6 x^2 - x^4)
WELL_LEFT = 0.155693  # its mass below 0


def log_many_well(z: Tensor) -> Tensor:
    """Return the log density of 16 independent pairs of a double well and a normal: 2^16 modes in 32 dimensions."""
    x, y = z.unflatten(-1, (PAIRS, 2)).unbind(-1)
    return (0.5 * x + 6.0 * x.square() - x.square().square() + _normal(y)).sum(-1)


def _wells(z: Tensor) -> Tensor:
    """The wells (S, 32) that each draw is in: of each pair the left or the right one."""
    left = z[:, ::2] < 0.0
    return torch.cat([left, ~left], dim=-1)


COMPONENTS = 40
HALF_WIDTH = 40.0
COMPONENT_SD = 1.3133  # softplus(1), as in the papers that use this target
CENTERS = HALF_WIDTH * (2.0 * torch.rand(COMPONENTS, 2, generator=torch.Generator().manual_seed(0)) - 1.0)


def log_mixture(x: Tensor) -> Tensor:
    """Return the log density of 40 equal round Gaussians of sd 1.31, their centers uniform on a square of side 80."""
    apart = (x[..., None, :] - CENTERS.to(x)) / COMPONENT_SD
    constant = math.log(2.0 * math.pi * COMPONENT_SD**2 * COMPONENTS)
    return torch.logsumexp(_normal(apart).sum(-1), -1) - constant


def _nearest(z: Tensor) -> Tensor:
    """The component (S, 40) whose center is nearest to each draw."""
    return torch.nn.functional.one_hot(torch.cdist(z, CENTERS.to(z)).argmin(-1), COMPONENTS) > 0


def _sides(z: Tensor) -> Tensor:
    """The arc (S, 2) of U1 that each draw is on."""
    return torch.stack([z[:, 0] < 0.0, z[:, 0] >= 0.0], dim=-1)


_CENTER, _SPREAD = CENTERS.mean(0), (CENTERS.var(0, correction=0) + COMPONENT_SD**2).sqrt()
_RIGHT = (1.0 - WELL_LEFT,) * PAIRS

TARGETS = {
    target.name: target
    for target in (
        Target("u1", energy_model(log_u1, 2), 1.877502, (0.0, 0.0), (1.817554, 1.181219), _sides, (0.5, 0.5)),
        Target("u2", energy_model(log_u2, 2), 2.200167, (0.0, 0.0), (2.612181, 0.796691)),
        Target("u3", energy_model(log_u3, 2), 2.759783, (0.0, -0.250589), (2.612181, 0.862876)),
        Target("u4", energy_model(log_u4, 2), 2.828776, (0.0, -0.544491), (2.612181, 1.394135)),
        Target("funnel", funnel, 0.0, (0.0,), (FUNNEL_SD,)),
        Target("funnel_energy", energy_model(log_funnel, FUNNEL_LEAVES + 1), 0.0, (0.0,), (FUNNEL_SD,)),
        Target(
            "many_well",
            energy_model(log_many_well, 2 * PAIRS),
            164.6957,
            (WELL_MEAN, 0.0) * PAIRS,
            (WELL_SD, 1.0) * PAIRS,
            _wells,
            (WELL_LEFT,) * PAIRS + _RIGHT,
        ),
        Target(
            "mixture",
            energy_model(log_mixture, 2),
            0.0,
            tuple(_CENTER.tolist()),
            tuple(_SPREAD.tolist()),
            _nearest,
            (1.0 / COMPONENTS,) * COMPONENTS,
        ),
    )
}
