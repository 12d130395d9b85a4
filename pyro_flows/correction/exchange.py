"""Exact symmetries of a posterior, as moves of chains: from one copy of a flow to any other, at no cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flows.correction.latent import Latent, Points
from pyro_flows.modes.symmetries import SAME, are_the_same


@dataclass(frozen=True)
class Exchange:
    r"""Copies :math:`z = s_k \odot y_{\pi_k}` of one flow, where the posterior is the same at all images of a point.

    A chain at y in part k is then at y in any other part with the same chance, so that the part is drawn anew for each
    draw: chains have all modes equally often, whichever they began in. How fast they move is seen in y alone.

    Attributes:
        orders: which coordinate comes in each place, of each copy (K, D).
        signs: of each place (K, D).
    """

    orders: Tensor
    signs: Tensor

    def home(self, z: Tensor, k: Tensor) -> Tensor:
        """Return y (..., D) of points z (..., D) in parts k (...)."""
        return (self.signs[k] * z).gather(-1, self.orders.argsort(1)[k])

    def image(self, y: Tensor, k: Tensor) -> Tensor:
        """Return z (..., D) of y (..., D) in parts k (...)."""
        return self.signs[k] * y.gather(-1, self.orders[k])

    def moved(self, points: Points) -> Points:
        """Return the points, each in a part that is drawn by torch's global generator."""
        k = torch.randint(len(self.orders), points.k.shape, device=points.k.device)
        return points._replace(k=k, z=self.image(self.home(points.z, points.k), k))


def exchange_of(latent: Latent) -> Exchange | None:
    """Return the exchange of a mixture of copies of one flow, all as likely; None for another one."""
    parts, mixture = latent.parts, latent.mixture
    if mixture is None or len(parts) < 2 or len({part.flow for part in parts}) > 1:
        return None
    if float(latent.log_w.max() - latent.log_w.min()) > SAME:
        return None
    return Exchange(mixture.orders, mixture.signs)


def is_exchanged(latent: Latent, points: Points, before: bool | None) -> bool:
    """Whether chains change parts freely: as ``before``, if that was decided, as it has to be for chains that go on."""
    return is_symmetric(latent, points) if before is None else before


@torch.no_grad()
def is_symmetric(latent: Latent, points: Points) -> bool:
    """Whether the target is the same at some points in other parts; cost: a gradient for each, of copies."""
    many = len(latent.parts)
    if exchange_of(latent) is None:
        return False
    steps = 1 + torch.arange(len(points.k), device=points.k.device) % (many - 1)
    there = latent.look(points.x, (points.k + steps) % many).log_pi
    usable = torch.isfinite(points.log_pi)
    return bool(usable.any()) and bool(are_the_same(there, points.log_pi)[usable].all())
