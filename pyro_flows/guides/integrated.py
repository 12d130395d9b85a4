"""The log density of the latents outside of plates, those in plates integrated out: what all ways of it share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_flows.guides.conditional import Conditional, Rows
from pyro_flows.guides.parts import Part
from pyro_flows.support.process.clock import unbounded

DRAWS_LEAST, DRAWS_MOST = 4, 256  # of a row, K
MOST_DRAWS = 1000  # of the globals that are judged, each of which takes a pass over all rows


class WorstRow(NamedTuple):
    """A row whose conditional distribution is poor: its plate, its index there, k-hat of its weights."""

    plate: str
    row: int
    k_hat: float


class Errors(NamedTuple):
    """Standard errors of the log density, nats: of its differences between points, and of its level."""

    differences: float
    level: float


def without_lost(log_weights: Tensor, dim: int) -> Tensor:
    """Let draws far out, where values over- or underflow, have the weight zero, unless all draws do."""
    lost = torch.isnan(log_weights) | torch.isposinf(log_weights)
    return torch.where(lost & ~lost.all(dim, keepdim=True), -torch.inf, log_weights)


@dataclass
class Terms:
    """What a part of the data says at points: sums (S,), and densities of the draws of rows (K, S, rows), by plate."""

    total: Tensor
    log_p: dict[str, Tensor] = field(default_factory=dict)
    log_q: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)  # (rows,): rows that count
    dead: Mapping[str, Tensor] = field(default_factory=dict)  # draws whose weight is known to be negligible

    def weights(self, plate: str) -> Tensor:
        """Return the log weights of the draws; see :func:`without_lost`."""
        found = without_lost((self.log_p[plate] - self.log_q[plate]).double(), 0)
        return torch.where(self.dead[plate], -torch.inf, found) if plate in self.dead else found

    def likelihoods(self, plate: str) -> Tensor:
        """Return the log likelihoods of the rows (S, rows): of the mean of both nets, free of bias to second order.

        The log of a mean of two is too low by about a quarter of their relative variance.
        """
        one, other = self.by_net(plate)
        return torch.logaddexp(one, other) - math.log(2.0) + 0.5 * torch.tanh(0.5 * (one - other)).square()

    def by_net(self, plate: str) -> Tensor:
        """Return the log likelihoods of the rows by each net of points (2, S, rows)."""
        halves = self.weights(plate).unflatten(0, (2, -1))
        return torch.logsumexp(halves, 1) - math.log(halves.shape[1])

    def summed(self) -> Tensor:
        """Return what the part adds to the log density (S,)."""
        rows = [(self.likelihoods(plate) * kept).sum(-1) for plate, kept in self.kept.items()]
        return sum(rows, self.total)


class Integrated:
    """The log density of the globals, at points (S, D) in unconstrained coordinates.

    Subclasses give its value by parts of the data, and say with how many points at once.
    """

    most_draws = MOST_DRAWS  # of the globals, that are judged
    trainable = True  # whether a better guide of the globals can make the weights good
    wide = False  # whether q has heavy tails
    apart = False  # whether rows have other random numbers at each point
    batched = True  # whether many points, and many draws of rows, have axes left of plates: of the model, or by vmap
    count = DRAWS_LEAST  # K, draws of a row
    plates: dict[str, str]  # whose rows hold a site
    sizes: dict[str, int]  # rows of each plate
    row_count: int
    parts: Sequence[Part]  # the rows of each run

    def __init__(self, rows: Rows, first: Conditional, seed: int, dtype: torch.dtype) -> None:
        self.rows, self.first, self.seed, self.dtype = rows, first, seed, dtype
        self.clock = unbounded()  # is looked at before each part of the data

    @property
    def at_once(self) -> int:
        """How many points are taken together."""
        raise NotImplementedError

    @property
    def with_graph(self) -> int:
        """How many points whose gradients are taken at once."""
        return self.at_once

    def values(self, z: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return what a part of the data adds to the log density (S,), and what has the same gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density (S,), in double precision."""
        numbers = range(len(self.parts))
        pieces = ([self.values(piece, number)[0] for number in numbers] for piece in z.split(self.at_once))
        return torch.cat([torch.stack(parts).sum(0) for parts in pieces])

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density (S,) and its gradient (S, D)."""
        values, gradients = [], []
        for piece in z.split(self.with_graph):
            leaf = piece.detach().clone().requires_grad_()
            with torch.enable_grad():
                value, gradient = torch.zeros(len(piece)).to(piece).double(), torch.zeros_like(piece).double()
                for number in range(len(self.parts)):  # one after the other, so that memory holds one part's graph
                    part, alike = self.values(leaf, number)
                    value += part.detach()
                    gradient += torch.autograd.grad(alike.sum(), leaf)[0]
            values.append(value)
            gradients.append(gradient)
        return torch.cat(values), torch.cat(gradients)

    def adapt(self, z: Tensor) -> bool:
        """Give q heavy tails from now on, if weights of rows at ``z`` (S, D) are uneven; return whether it has them."""
        return False

    def worst_rows(self, z: Tensor) -> list[WorstRow]:
        """Return the rows whose weights have a k-hat of 0.7 or more, the worst first; none if none is judged."""
        return []

    def on_bounds(self, z: Tensor) -> str | None:
        """Name a site of rows that rounding puts onto a bound, if what is lost there changes a mean or an sd."""
        return None
