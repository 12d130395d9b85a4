"""Entries of latent sites that a mask leaves without a prior: coordinates, if the rest of the model uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flows._seeding import seeded
from pyro_flows.model.batching import apart
from pyro_flows.model.bijections import bijection
from pyro_flows.model.faults import OF_POINTS, at_a_point
from pyro_flows.model.handlers import masks_over
from pyro_flows.model.sites import Site, innermost, is_enumerated, is_open, is_subsample, messages

SHIFTS = 1.0, -0.5  # of the unconstrained values of all such entries, to see whether the density changes


def _masks(site: Site) -> list[tuple[Tensor, int]]:
    """The masks over a latent site and inside of its prior, each with the number of axes of one event that it has.

    A mask may be wider than the site: an element has a prior if any of its copies has one.
    """
    value, found = site["value"], []
    none = [(torch.zeros((), dtype=torch.bool), 0)] if site["mask"] is False else []
    for mask, axes in none + masks_over(site):
        if not bool(mask.all()):
            shape = value.shape[: value.dim() - site["fn"].event_dim + axes]
            wider = mask.to(value.device)
            while wider.dim() > len(shape):
                wider = wider.any(0)
            for axis in range(-1, -wider.dim() - 1, -1):
                wider = wider.any(axis, keepdim=True) if shape[axis] == 1 else wider
            found.append((wider.expand(shape), axes))
    return found


def inside(site: Site) -> Tensor | None:
    """Return which batch elements of a latent site have a prior, in a part at least; None for all of them."""
    value, event_dim = site["value"], site["fn"].event_dim
    found = torch.ones(value.shape[: value.dim() - event_dim], dtype=torch.bool, device=value.device)
    for mask, axes in _masks(site):
        found = found & (mask.flatten(-axes).any(-1) if axes else mask)
    return None if bool(found.all()) else found


def coordinates(
    site: Site, unconstrained: Tensor, unmasked: Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Return which batch elements of a latent site are coordinates, the places of these numbers, those without a prior.

    ``unconstrained`` is its value there; ``unmasked`` says which elements are coordinates although a mask leaves them
    without a prior. None stands for all.
    """
    mask, free = inside(site), None
    mask = mask if mask is None or unmasked is None else mask | unmasked
    mask = None if mask is None or bool(mask.all()) else mask
    flat = torch.full(unconstrained.shape, innermost(site["fn"]) is ImproperUniform, device=unconstrained.device)
    for part, axes in _masks(site):
        flat = flat | ~_numbers(part, axes, site, unconstrained)
    flat = flat.reshape(-1)
    if mask is not None:
        free = _numbers(mask, 0, site, unconstrained).reshape(-1).nonzero()[:, 0]
        flat = flat[free]
    return mask, free, tuple(flat.nonzero()[:, 0].tolist())


def _numbers(mask: Tensor, axes: int, site: Site, unconstrained: Tensor) -> Tensor:
    """Spread a mask over batch elements, and ``axes`` axes of an event, to all unconstrained numbers of a site."""
    batch = site["value"].dim() - site["fn"].event_dim + axes
    shape = unconstrained.shape[:batch]
    return mask.expand(shape).reshape(shape + (1,) * (unconstrained.dim() - batch)).expand(unconstrained.shape)


def used(run: Callable[[], object], trace: poutine.Trace) -> dict[str, Tensor]:
    """Return, for sites under a mask, which of the elements without a prior the rest of the density depends on.

    ``run`` calls the model, and ``trace`` is that of a run. These elements have a flat prior. The others, such as those
    that pad a ragged array, would be flat altogether.
    """
    left_out = {}
    for name, site in messages(trace).items():
        latent = site["type"] == "sample" and not site["is_observed"] and not is_subsample(site)
        mask = inside(site) if latent and not is_enumerated(site) else None
        if mask is not None:
            left_out[name] = mask
    if not left_out:
        return {}
    everything = {name: ~mask for name, mask in left_out.items()}
    sites = {name: messages(trace)[name] for name in left_out}
    bases = {name: bijection(site["fn"]).inv(site["value"]).detach() for name, site in sites.items()}

    def density(free: Mapping[str, Tensor]) -> Tensor:
        values = {name: site["value"] for name, site in messages(trace).items() if site["type"] == "sample"}
        for name, site in sites.items():
            has_prior = left_out[name].reshape(left_out[name].shape + (1,) * site["fn"].event_dim)
            values[name] = torch.where(has_prior, site["value"], bijection(site["fn"])(free[name]))
        with apart(), seeded(0, next(iter(bases.values())).device), pyro.validation_enabled(False), _At(values):
            return torch.as_tensor(poutine.trace(run).get_trace().log_prob_sum())

    with at_a_point() as tried, torch.no_grad():
        here, *others = (density({name: base + shift for name, base in bases.items()}) for shift in (0.0, *SHIFTS))
    if tried.error is not None:
        return everything  # it depends on these values
    if all(torch.equal(here.nan_to_num(), other.nan_to_num()) for other in others):
        return {}
    found = {name: torch.zeros_like(mask) for name, mask in left_out.items()}
    with torch.enable_grad(), suppress(*OF_POINTS):  # a model may do what has no gradient
        leaves = {name: base.requires_grad_() for name, base in bases.items()}
        slopes = torch.autograd.grad(density(leaves), [*leaves.values()], allow_unused=True)
        for (name, mask), slope in zip(left_out.items(), slopes, strict=True):
            if slope is not None:
                found[name] = everything[name] & (slope != 0.0).reshape(*mask.shape, -1).any(-1)
    return found if any(bool(mask.any()) for mask in found.values()) else everything


class _At(Messenger):
    """Give sites that are not observed the values of a run."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Site) -> None:
        if is_open(msg) and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
