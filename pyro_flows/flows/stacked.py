"""The parts of a mixture all at once: affine images of one base distribution, or moved copies of flows.

A mixture at 64 modes is looked at by chains in each of its parts, and each point is scored by all parts: done one after
the other, that took a second for 64 chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_flows.flows import bases
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.recipe import affine_of
from pyro_flows.transforms.compose import Compose
from pyro_flows.transforms.linear import LowerTriangularAffine


class Part(Protocol):
    """A part of a mixture: the number of its flow, and a signed permutation of that flow's draws, or none."""

    @property
    def flow(self) -> int:
        """Number of the flow."""

    @property
    def order(self) -> Tensor | None:
        """Which coordinates come first."""

    @property
    def signs(self) -> Tensor | None:
        """What they are multiplied by."""


class Stacked(NamedTuple):
    """K maps m + L x, with the logs of their determinants."""

    loc: Tensor  # m (K, D)
    tril: Tensor  # L (K, D, D)
    ladj: Tensor  # (K,)
    base: str
    df: float

    def forward(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (C, D) of x in parts k (C,), and the log Jacobians (C,)."""
        return self.loc[k] + (self.tril[k] @ x[:, :, None])[:, :, 0], self.ladj[k]

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (C, K, D) of z (C, D) in all parts, and log q_k(z) (C, K)."""
        away = (z[None] - self.loc[:, None]).mT
        x = torch.linalg.solve_triangular(self.tril, away, upper=False).permute(2, 0, 1)
        return x, bases.log_density(self.base, x, self.df).sum(-1) - self.ladj

    def elsewhere(self, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q_j(z) (C, K) of all parts but the points' own ones k (C,), -inf there, and the parts (C, K)."""
        return but_own(self.inverse(z)[1], k)


class Images(NamedTuple):
    """K signed permutations of points y, ``signs * y[order]``, and back."""

    orders: Tensor  # (K, D)
    back: Tensor  # (K, D), which undo them
    signs: Tensor  # (K, D)

    @classmethod
    def of(cls, orders: Tensor, signs: Tensor) -> Images:
        """Return those of some orders and signs (K, D)."""
        return cls(orders, orders.argsort(1), signs)

    def image(self, y: Tensor, k: Tensor) -> Tensor:
        """Return z (..., D) of points y (..., D) in parts k (...)."""
        return self.signs[k] * y.gather(-1, self.orders[k])

    def home(self, z: Tensor, k: Tensor) -> Tensor:
        """Return y (..., D) of points z (..., D) in parts k (...); z may have one point for several parts."""
        return (self.signs[k] * z).gather(-1, self.back[k])


class Copies(NamedTuple):
    """K copies of flows that have one base, at images of their draws."""

    flows: list[Flow]
    own: list[Tensor]  # the parts of each flow
    of: Tensor  # (K,): the flow of each part
    images: Images
    others: Tensor  # (K, K - 1): all parts but one

    def forward(self, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (C, D) of x in parts k (C,), and the log Jacobians (C,); each flow passes all points."""
        y, ladj = self.flows[0].bijection.forward_and_ladj(x)
        for number, flow in enumerate(self.flows[1:], 1):
            here, (other, its_ladj) = self.of[k] == number, flow.bijection.forward_and_ladj(x)
            y, ladj = torch.where(here[:, None], other, y), torch.where(here, its_ladj, ladj)
        return self.images.image(y, k), ladj

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (C, K, D) of z (C, D) in all parts, and log q_k(z) (C, K)."""
        pairs = [self._inverse(flow, z, own.expand(len(z), -1)) for flow, own in zip(self.flows, self.own, strict=True)]
        x, log_q = (torch.cat(list(of), 1) for of in zip(*pairs, strict=True))
        back = torch.cat(self.own).argsort()
        return x[:, back], log_q[:, back]

    def elsewhere(self, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q_j(z) (C, J) of parts, and which they are (C, J): all but the points' own ones k (C,).

        If there are several flows, all parts are among them, the own ones with -inf.
        """
        if len(self.flows) > 1:
            return but_own(self.inverse(z)[1], k)
        parts = self.others[k]
        return self._inverse(self.flows[0], z, parts)[1], parts

    def _inverse(self, flow: Flow, z: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (C, J, D) of z (C, D) in parts (C, J) of a flow, and the log densities (C, J)."""
        y = self.images.home(z[:, None], parts)
        x, ladj = flow.bijection.inverse_and_ladj(y.flatten(0, 1))
        log_q = bases.log_density(flow.base, x, flow.df).sum(-1) + ladj
        return x.unflatten(0, parts.shape), log_q.unflatten(0, parts.shape)


def but_own(log_q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return log densities (C, K) of points in all parts, -inf in their own ones k (C,), and the parts (C, K)."""
    parts = torch.arange(log_q.shape[1], device=log_q.device).expand_as(log_q)
    return torch.where(parts == k[:, None], -torch.inf, log_q), parts


def log_sum(own: Tensor, elsewhere: Tensor, log_w: Tensor) -> Tensor:
    """Return the log density (C,) of a mixture from terms of the points' own parts (C,), and of others (C, J).

    ``own`` has its log weight in it, and ``log_w`` (C, J) are those of the others. A part that overflows adds nothing.
    """
    others = torch.where(elsewhere.isnan(), -torch.inf, elsewhere) + log_w
    return torch.logsumexp(torch.cat([own[:, None], others], 1), 1)


def stacked(flows: Sequence[Flow], parts: Sequence[Part]) -> Stacked | Copies | None:
    """Return the parts' maps: triangular affine ones of the same base, signs apart, or those of copies of flows.

    None for one part, for several bases, and for the uniform base.
    """
    found = {(flows[part.flow].base, flows[part.flow].df) for part in parts}
    if len(parts) < 2 or len(found) > 1 or "uniform" in next(iter(found)):
        return None
    return _affine(flows, parts) or _copies(flows, parts)


def _copies(flows: Sequence[Flow], parts: Sequence[Part]) -> Copies:
    """Return the maps of flows, moved."""
    used = sorted({part.flow for part in parts})
    flow = flows[used[0]]
    like = next(flow.parameters(), flow._like)
    whole, one = torch.arange(flow.dim, device=like.device), like.new_ones(flow.dim)
    orders = torch.stack([whole if part.order is None else part.order.to(like.device) for part in parts])
    signs = torch.stack([_signs(part, one) for part in parts])
    fewer = torch.arange(len(parts) - 1, device=like.device)
    others = fewer + (fewer >= torch.arange(len(parts), device=like.device)[:, None])
    of = torch.tensor([used.index(part.flow) for part in parts], device=like.device)
    own = [(of == number).nonzero()[:, 0] for number in range(len(used))]
    return Copies([flows[number] for number in used], own, of, Images.of(orders, signs), others)


def _affine(flows: Sequence[Flow], parts: Sequence[Part]) -> Stacked | None:
    maps = [_whole(flows[part.flow]) for part in parts]
    first = flows[parts[0].flow]
    if not all(_in_order(part) for part in parts):
        return None
    found = [map_ for map_ in maps if map_ is not None]
    if len(found) < len(maps):
        return None
    with torch.no_grad():
        shifts, matrices, ladjs = zip(*(map_._affine(map_.loc, None) for map_ in found), strict=True)
        signs = torch.stack([_signs(part, map_.loc) for part, map_ in zip(parts, found, strict=True)])
    tril = signs[:, :, None] * torch.stack(matrices)
    return Stacked(signs * torch.stack(shifts), tril, torch.stack(ladjs), first.base, first.df)


def _in_order(part: Part) -> bool:
    return part.order is None or bool((part.order == torch.arange(len(part.order)).to(part.order)).all())


def _signs(part: Part, like: Tensor) -> Tensor:
    return torch.ones_like(like) if part.signs is None else part.signs.to(like)


def _whole(flow: Flow) -> LowerTriangularAffine | None:
    """Return the affine map that a flow is, if it is nothing else."""
    map_, bijection = affine_of(flow), flow.bijection
    alone = not isinstance(bijection, Compose) or len(bijection.layers) == 1
    return map_ if alone and isinstance(map_, LowerTriangularAffine) and not map_.context_dim else None
