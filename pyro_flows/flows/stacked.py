"""The parts of a mixture of affine images of one base distribution, all at once.

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
from pyro_flows.transforms.chain import Chain
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


def stacked(flows: Sequence[Flow], parts: Sequence[Part]) -> Stacked | None:
    """Return the parts' maps, if each is a triangular affine map of the same base, signs apart; else None."""
    maps = [_whole(flows[part.flow]) for part in parts]
    first = flows[parts[0].flow]
    same = all((flows[part.flow].base, flows[part.flow].df) == (first.base, first.df) for part in parts)
    if len(parts) < 2 or not same or not all(_in_order(part) for part in parts):
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
    alone = not isinstance(bijection, Chain) or len(bijection.layers) == 1
    return map_ if alone and isinstance(map_, LowerTriangularAffine) and not map_.context_dim else None
