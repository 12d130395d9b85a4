"""Planted modes: a normal distribution that a candidate covers exactly, and a second one that it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flows as pf
from benchmarks.zoo.narrow import BY_HAND
from pyro_flows.inference.modes.missed_modes import missed_modes
from pyro_flows.inference.verdict.deciding import SEARCHED_DRAWS
from pyro_flows.support.process.seeding import seeded

MASS, DISTANCE, PRIOR = (0.1, 0.9), (2.0, 10.0), (3.0, 30.0)  # of the second mode; in sds of the first
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
DRAWS = 4000  # whose weights a verdict looks at
PRESENT = 0.5  # of the second mode's mass, from which a fit has it


Sum = Callable[[Tensor], Tensor]  # of the logs of two terms (..., 2): the log of their sum
SUMS: dict[str, tuple[Sum, ...]] = {  # forms, which planted modes have in turn
    "none": (lambda logs: torch.where(logs[..., 0] > logs[..., 1], logs[..., 0], logs[..., 1]),),  # nothing to be seen
    "by hand": tuple(BY_HAND.values()),
    "logsumexp": (lambda logs: torch.logsumexp(logs, -1),),
}


@dataclass(frozen=True)
class Planted:
    r"""A density :math:`(1 - m)\, N(0, I) + m\, N(d u, w^2 I)` with a random direction u, under a wide normal prior.

    Attributes:
        sum: a key of ``SUMS``: how the model computes the logarithm of the sum.
        dim: dimensions D.
        width: w, sds of the second mode.
        mass: m.
        distance: d, sds of the first mode.
        prior: standard deviation of the prior, which the factor takes back.
        number: of the seed.
    """

    sum: str
    dim: int
    width: float
    mass: float
    distance: float
    prior: float
    number: int

    @cached_property
    def centre(self) -> Tensor:
        """Where the second mode is (D,)."""
        with seeded(self.number):
            direction = torch.randn(self.dim)
        return self.distance * direction / direction.norm()

    def logs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log weight plus log density of both modes at points (..., D)."""
        near, away = x.square().sum(-1), ((x - self.centre.to(x)) / self.width).square().sum(-1)
        size = self.dim * HALF_LOG_TWO_PI
        other = math.log(self.mass) - self.dim * math.log(self.width) - size
        return math.log1p(-self.mass) - 0.5 * near - size, other - 0.5 * away

    def model(self) -> Callable[[], None]:
        """Return the Pyro model."""
        prior = dist.Normal(torch.zeros(self.dim), self.prior).to_event(1)
        together = SUMS[self.sum][self.number % len(SUMS[self.sum])]
        assert len(self.centre) == self.dim  # made before the model runs, since it takes random numbers

        def planted() -> None:
            x = pyro.sample("x", prior)
            pyro.factor("modes", together(torch.stack(self.logs(x), -1)) - prior.log_prob(x))

        return planted

    def is_found(self) -> bool:
        """Whether the search, or the weights of a verdict, tell of the second mode, given exact draws of the first."""
        with seeded(self.number + 1):
            z = torch.randn(DRAWS, self.dim)
        density = pf.LogDensity(self.model())
        weights = torch.softmax((density(z) - _first(z)).double(), 0)
        first, second = self.logs(z)
        if float(weights[second > first].sum()) > PRESENT * self.mass:  # so near that some draws are in it
            return True
        z = z[:SEARCHED_DRAWS]
        return bool(missed_modes(density, [], z, _first(z), _first, seed=self.number, wandering=False).missed)

    def is_told(self) -> bool:
        """Whether a fit has half of the second mode's mass at least, or is called unreliable."""
        posterior = pf.fit(self.model(), seed=self.number, progress=False)
        first, second = self.logs(posterior.samples["x"].double())
        share = float((second > first).double().mean())
        return posterior.verdict.status == "unreliable" or share > PRESENT * self.mass


def _first(z: Tensor) -> Tensor:
    return -0.5 * z.square().sum(-1) - z.shape[-1] * HALF_LOG_TWO_PI


def planted(kind: str, dim: int, width: float, number: int) -> Planted:
    """Return one planted mode; the same arguments give the same one."""
    rng = np.random.default_rng([dim, round(1e6 * width), number])
    low, high = (math.log(end) for end in PRIOR)
    mass, distance, prior = rng.uniform(*MASS), rng.uniform(*DISTANCE), math.exp(rng.uniform(low, high))
    return Planted(kind, dim, width, float(mass), float(distance), prior, number)
