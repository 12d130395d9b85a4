"""Guides as programs: what they draw, and their density at their own draws and at given points; their latent space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.constraints import Constraint

from pyro_flows.flows.flow import Flow
from pyro_flows.flows.mixture import FlowMixture
from pyro_flows.guides.autoflow import AutoFlow, Drawn, Known
from pyro_flows.inference.chains.latent import Latent, only_finite
from pyro_flows.inference.modes.missed_regions import Score
from pyro_flows.inference.modes.symmetries import ROUND_TRIP
from pyro_flows.inference.modes.under_covered import Points, Space
from pyro_flows.inference.verdict.deciding import Draw
from pyro_flows.model.batching import over_rows, quiet
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Site, messages
from pyro_flows.support.process.fallbacks import fallback

LOG_Q = " log q"  # beside the sites' values
UNCONSTRAINED = "_unconstrained"  # after the names of AutoNormal's auxiliary sites
NO_DENSITY = "a point-mass guide such as AutoDelta has no density, so it cannot be weighed against the posterior"


def run_guide(guide: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> poutine.Trace:
    """Run a guide unseen by handlers around it, and return its trace."""
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
        return poutine.trace(guide).get_trace(*args, **kwargs)


def random_sites(trace: poutine.Trace) -> dict[str, Site]:
    return {
        name: site
        for name, site in messages(trace).items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def check_sites(trace: poutine.Trace, density: LogDensity) -> None:
    """Check that the guide's density is one of the model's latents alone, and of all of them."""
    sites = random_sites(trace)
    auxiliary = {name for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    lacking = [name for name in density.names if name not in sites]
    extra = [name for name in sites if name not in density.names and name not in auxiliary]
    if lacking or extra:
        found = [f"none for {', '.join(map(repr, lacking))}"] if lacking else []
        found += [f"others: {', '.join(map(repr, extra))}"] if extra else []
        raise ValueError(
            f"guide: expected the model's latent sites {', '.join(map(repr, density.names))} "
            f"(and others only with infer={{'is_auxiliary': True}}), got {'; '.join(found)}."
        )
    latents = density.structure.latents
    for latent in latents:
        if sites[latent.name]["value"].shape != latent.shape:
            got = tuple(sites[latent.name]["value"].shape)
            raise ValueError(f"guide: site {latent.name!r} has shape {got}, in the model {tuple(latent.shape)}.")
    kinds = {name: _innermost(site["fn"]) for name, site in sites.items()}
    points = [one for one in latents if isinstance(kinds[one.name], Delta) and not isinstance(kinds[one.name], Drawn)]
    own = sum(sites[name]["value"].numel() for name in auxiliary if not isinstance(kinds[name], Delta))
    needed = sum(latent.size for latent in points)
    if own < needed:
        made = {name for name, kind in kinds.items() if isinstance(kind, Known) or f"{name}{UNCONSTRAINED}" in sites}
        alone = [latent.name for latent in points if latent.name not in made] or [latent.name for latent in points]
        names = ", ".join(map(repr, alone))
        raise ValueError(f"guide: {NO_DENSITY}. Point masses are at {names}.")
    if own > needed:
        masked = ", ".join(repr(latent.name) for latent in latents if latent.free is not None)
        flows = f" The model masks entries of {masked}; a flow guide such as AutoRealNVP leaves these out."
        raise ValueError(
            f"guide: its auxiliary sites have {own} coordinates, the latent sites made from them {needed}, so the "
            "density of the latent sites alone is not known. Use a guide without extra randomness."
            f"{flows if masked else ''}"
        )


def _innermost(fn: object) -> object:
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def from_traces(
    guide: Callable[..., object], density: LogDensity, args: Sequence[object], kwargs: Mapping[str, object],
    sites: Mapping[str, Site],
) -> tuple[Draw, Score | None]:  # fmt: skip
    """Return what draws, and the density at given points; None for that where auxiliary sites hide it."""
    masks = {latent.name: latent.mask for latent in density.structure.latents if latent.mask is not None}

    def one(_: Tensor) -> dict[str, Tensor]:
        trace = run_guide(guide, args, kwargs)
        values = {name: messages(trace)[name]["value"] for name in density.names}
        return {**values, LOG_Q: _log_density(trace, masks)}

    def draw(count: int) -> tuple[Tensor, Tensor]:
        with quiet(), density.precisely():
            values = over_rows(
                one, torch.zeros(count), randomness="different", otherwise=partial(fallback, "drawn one by one")
            )
        log_q = values.pop(LOG_Q)
        z = density.unconstrain(values)
        log_q = log_q + density.log_jacobian(z)
        return z, torch.where(_placed_back(density, z, values), log_q, torch.inf).to(density.dtype)

    def at(values: dict[str, Tensor]) -> Tensor:
        return _log_density(run_guide(At(values, supports)(guide), args, kwargs), masks)

    def score(z: Tensor) -> Tensor:
        values = {name: value for name, value in density.constrain(z).items() if name in density.names}
        with torch.no_grad(), quiet(), density.precisely():
            log_q = over_rows(at, values, otherwise=partial(fallback, "scored one by one"))
        return torch.as_tensor(log_q + density.log_jacobian(z))

    supports = {name: messages(density.structure.trace)[name]["fn"].support for name in density.names}
    made = [name for name in density.names if isinstance(_innermost(sites[name]["fn"]), Delta)]  # from other sites
    return draw, score if all(f"{name}{UNCONSTRAINED}" in sites for name in made) else None


class At(Messenger):
    """Runs a guide at given values of its latents, ``{name: (*shape)}``, or at what makes them.

    ``AutoNormal`` draws each latent without constraint, as a site of the name and ``_unconstrained``.
    """

    def __init__(self, values: Mapping[str, Tensor], supports: Mapping[str, Constraint]) -> None:
        super().__init__()
        self.values, self.supports = values, supports

    def _pyro_sample(self, msg: Site) -> None:
        name = str(msg["name"]).removesuffix(UNCONSTRAINED)
        if name in self.values and not isinstance(_innermost(msg["fn"]), Delta):
            value = self.values[name]
            msg["value"] = value if name == msg["name"] else biject_to(self.supports[name]).inv(value)
            msg["done"] = True


def _placed_back(density: LogDensity, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Whether each of the values (S, ...) is what its coordinates stand for: no, if it lies outside of the support."""
    back, inside = density.constrain(z), torch.ones(len(z), dtype=torch.bool, device=z.device)
    for latent in density.structure.latents:
        value = values[latent.name].to(back[latent.name])
        close = torch.isclose(back[latent.name], value, rtol=ROUND_TRIP, atol=ROUND_TRIP**2)
        if latent.mask is not None:
            close = close[:, latent.mask]
        inside &= close.reshape(len(z), -1).all(1)
    return inside


def _log_density(trace: poutine.Trace, masks: Mapping[str, Tensor]) -> Tensor:
    """Sum the log densities of all random sites and factors; entries that the model masks out count for nothing."""
    total = torch.zeros(())
    for name, site in messages(trace).items():
        counts = site["type"] == "sample" and (not site["is_observed"] or isinstance(site["fn"], Unit))
        if counts and not site_is_subsample(site):
            density = site["fn"].log_prob(site["value"])
            for mask in (site["mask"], masks.get(name)):
                density = density if mask is None else torch.where(torch.as_tensor(mask), density, 0.0)
            total = total + density.sum()
    return total


# guides that are a distribution of one unconstrained vector -----------------------------------------------------------


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
