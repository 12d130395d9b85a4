"""The latent space of a guide that is a distribution of one unconstrained vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_flows.correction.latent import Latent, only_finite
from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.batching import quiet
from pyro_flows.model.log_density import LogDensity
from pyro_flows.modes.under_covered import Points, Space


def space_of(
    guide: AutoContinuous, density: LogDensity, args: Sequence[object], kwargs: Mapping[str, object]
) -> Space | None:
    """Return the latent space of an ``AutoContinuous`` guide, None if it names no base distribution or no transform."""
    if isinstance(guide, AutoFlow):
        return latent_of(guide._flow, density)
    try:
        return GuideSpace(guide.get_base_dist(), guide.get_transform(*args, **kwargs), density)
    except NotImplementedError:  # as an AutoLowRankMultivariateNormal
        return None


def latent_of(flow: Flow | FlowMixture, density: LogDensity) -> Latent | None:
    """Return the latent space of a flow or mixture, None if it has so many parts that walks there would take long."""
    latent = Latent(flow, density)
    return latent if latent.walkable else None


class GuideSpace:
    """The posterior in the space of a base distribution, of which the guide is the image under a transform."""

    costly = False  # as far as is known

    def __init__(self, base: Distribution, transform: Transform, density: LogDensity) -> None:
        self.base, self.transform, self.density = base, transform, density

    def place(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (C, D) of points z (C, D), and k = 0 (C,)."""
        with torch.no_grad(), quiet(), self.density.precisely():
            x: Tensor = self.transform.inv(z.to(self.base.mean.dtype))
        return x.to(z), torch.zeros(len(z), dtype=torch.long, device=z.device)

    def look(self, x: Tensor, k: Tensor) -> Points:
        """Evaluate at points; cost: a gradient for each. Where something is not finite, the target is -inf."""
        self.density.clock.look()
        with torch.enable_grad(), quiet(), self.density.precisely():
            leaf = x.detach().requires_grad_()
            z = self.transform(leaf)
            ladj = self.transform.log_abs_det_jacobian(leaf, z)
            ladj = ladj.sum(-1) if ladj.dim() == 2 else ladj
            log_ref = self.base.log_prob(leaf)
            log_ref = log_ref.sum(-1) if log_ref.dim() == 2 else log_ref
        log_p, grad = self.density.value_and_grad(z.detach().to(self.density.dtype))
        grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).to(z)
        with torch.enable_grad():
            pulled = torch.autograd.grad(ladj.sum() + (z * grad).sum(), leaf, retain_graph=True)[0]
            score = torch.autograd.grad(log_ref.sum(), leaf)[0]
        seen = z.detach().to(self.density.dtype), log_p, log_p.to(x) + ladj.detach(), pulled, log_ref.detach(), score
        return Points(x, k, *only_finite(*seen))
