"""Symmetries of a posterior, as moves of chains: from one copy of a flow to any other.

Where the posterior is the same at all images of a point, a chain that stands for y in part k stands for y in any other
part with the same chance. So the part is drawn anew for each draw: chains have all modes equally often, whichever they
began in. How fast they move is seen in y alone.
"""

from __future__ import annotations

import torch

from pyro_flows.correction.latent import Latent, Points
from pyro_flows.flows.stacked import Images
from pyro_flows.modes.symmetries import SAME, are_the_same


def exchanged(images: Images, points: Points) -> Points:
    """Return the points, each in a part that is drawn by torch's global generator."""
    k = torch.randint(len(images.orders), points.k.shape, device=points.k.device)
    return points._replace(k=k, z=images.image(images.home(points.z, points.k), k))


@torch.no_grad()
def swapped(latent: Latent, points: Points) -> Points:
    """Propose another part to each chain, at the same x, all with the same chance. Cost: a gradient for each point."""
    many = len(latent.parts)
    k = (points.k + torch.randint(1, many, points.k.shape, device=points.k.device)) % many
    new = latent.look(points.x, k)
    gain = new.log_pi - points.log_pi
    taken = torch.rand_like(gain).log() < gain.nan_to_num(nan=-torch.inf)
    return new.where(taken & torch.isfinite(new.log_pi), points)


def are_copies(latent: Latent) -> bool:
    """Whether all parts are copies of one flow."""
    return len(latent.parts) > 1 and len({part.flow for part in latent.parts}) == 1


def exchange_of(latent: Latent, points: Points, decided: bool | None) -> Images | None:
    """Return the images that chains at some points may change between freely; None for a mixture of another kind.

    Parts have to be copies of one flow, all as likely, and the target the same at the points in other parts. Chains
    that go on keep what was ``decided``; None is for chains that begin. Cost of these: a gradient for each point.
    """
    mixture = latent.mixture
    if decided is False or mixture is None or not are_copies(latent):
        return None
    if float(latent.log_w.max() - latent.log_w.min()) > SAME or not (decided or _is_symmetric(latent, points)):
        return None
    return Images.of(mixture.orders, mixture.signs)


@torch.no_grad()
def _is_symmetric(latent: Latent, points: Points) -> bool:
    """Whether the target is the same at some points in other parts."""
    many = len(latent.parts)
    steps = 1 + torch.arange(len(points.k), device=points.k.device) % (many - 1)
    there = latent.look(points.x, (points.k + steps) % many).log_pi
    usable = torch.isfinite(points.log_pi)
    return bool(usable.any()) and bool(are_the_same(there, points.log_pi)[usable].all())
