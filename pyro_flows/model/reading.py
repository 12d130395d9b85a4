"""What a Pyro model consists of, read from one run, and from a second one that moves the latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, NanMaskedMultivariateNormal, NanMaskedNormal
from torch import Tensor

from pyro_flows.model.batching import apart, quiet
from pyro_flows.model.bijections import bijection
from pyro_flows.model.faults import OF_POINTS, Subsampled, at_a_point, is_about_dtypes, where_it_runs
from pyro_flows.model.handlers import Given, Place, masks_over
from pyro_flows.model.noncentered import moves
from pyro_flows.model.sites import (
    Keywords,
    Latent,
    Model,
    Plate,
    Positional,
    Site,
    Structure,
    comes_and_goes,
    innermost,
    is_data,
    is_deterministic,
    is_enumerated,
    is_factor,
    is_subsample,
    messages,
    vectorized,
)
from pyro_flows.model.start import first_run, initial_value, prior_run, transform_of
from pyro_flows.model.supports import check_density, family
from pyro_flows.support.process.seeding import seeded

SHIFTS = 1.0, -0.5  # of the unconstrained values of masked entries, to see whether the density changes


def read_structure(
    model: Model,
    args: Positional,
    kwargs: Keywords,
    start: Callable[[Site], Tensor] = initial_value,
    *,
    like: Structure | None = None,
) -> Structure:
    """Run ``model`` once at a starting value (``start`` of each latent site's message) and read its structure.

    What moves with the latents is as in ``like``, the structure with other data, or is found out by further runs.
    """
    run, trace = functools.partial(model, *args, **kwargs), first_run(model, args, kwargs, start)
    structure = _structure(trace, used(run, trace))
    if like is not None:
        moves = {name: getattr(like, name) for name in ("dtype", "dependent", "hierarchical", "drawn")}
        return replace(structure, **moves)
    try:
        return _dependence(run, structure)
    except RuntimeError as error:
        own = functools.reduce(
            torch.promote_types, [messages(trace)[latent.name]["value"].dtype for latent in structure.latents]
        )
        if own == structure.dtype or not is_about_dtypes(error):
            raise
    structure = replace(structure, dtype=own)  # wider data, and a model that does not mix
    return _dependence(run, structure)


def _structure(trace: poutine.Trace, unmasked: Mapping[str, Tensor]) -> Structure:
    """Return what one run tells; what a second one has to tell is left open.

    ``unmasked`` are elements of sites that are coordinates although a mask leaves them without a prior.
    """
    sites = [site for site in messages(trace).values() if site["type"] == "sample" and not is_subsample(site)]
    stochastic = [site for site in sites if not site["is_observed"]]
    latents: list[Latent] = []
    for site in stochastic:
        if not is_enumerated(site):
            latents.append(_read_latent(site, sum(latent.size for latent in latents), unmasked.get(site["name"])))
    if not sum(latent.size for latent in latents):
        raise ValueError(
            "model: expected at least one continuous latent site (pyro.sample without obs=), got none. "
            f"Sites seen: {', '.join(repr(site['name']) for site in sites) or 'none'}."
        )
    data = {site["name"]: site for site in sites if site["is_observed"] and is_data(site)}
    for site in data.values():
        check_observed(site)
    seen = [site["value"] for site in (*stochastic, *data.values())]
    seen += [site["fn"].log_factor for site in sites if is_factor(site)]
    floats = [value for value in seen if value.is_floating_point()]
    return Structure(
        latents=tuple(latents),
        observed={name: site["value"] for name, site in data.items()},
        observed_plates={name: _plates(site) for name, site in data.items()},
        deterministic={site["name"]: _plates(site) for site in sites if is_deterministic(site)},
        enumerated=tuple(site["name"] for site in stochastic if is_enumerated(site)),
        subsampled=tuple(sorted({name for site in sites for name in _subsampled(site)})),
        hierarchical=(),
        dependent=False,
        plate_nesting=max((-frame.dim for site in sites for frame in vectorized(site)), default=0),
        dtype=functools.reduce(torch.promote_types, [value.dtype for value in floats]),
        device=next((value.device for value in floats if value.device.type != "cpu"), floats[0].device),
        trace=trace,
    )


def _read_latent(site: Site, offset: int, unmasked: Tensor | None) -> Latent:
    name = site["name"]
    transform = transform_of(site)
    for plate in _subsampled(site):
        raise Subsampled(
            f"site {name!r}: a latent in the subsampled plate {plate!r}; a guide over one vector would learn only as "
            f"many latents as one subsample holds. Give {plate!r} its full size, or use an AutoHierarchicalFlow."
        )
    if site["value"].shape != site["fn"].shape():
        raise ValueError(
            f"site {name!r}: expected a starting value of shape {tuple(site['fn'].shape())}, got "
            f"{tuple(site['value'].shape)}. Give init_loc_fn one number for each entry."
        )
    with torch.no_grad(), quiet():
        check_density(name, site["fn"], site["value"])
    unconstrained = transform.inv(site["value"])
    mask, free, improper = coordinates(site, unconstrained, unmasked)
    size = unconstrained.numel() if free is None else len(free)
    shapes = site["value"].shape, unconstrained.shape, site["fn"].event_dim
    return Latent(name, *shapes, _plates(site), offset, size, mask, free, improper=improper)


def _plates(site: Site) -> tuple[Plate, ...]:
    return tuple(Plate(frame.name, frame.dim, frame.size) for frame in vectorized(site))


def _subsampled(site: Site) -> list[str]:
    return [frame.name for frame in site["cond_indep_stack"] if frame.full_size not in (None, frame.size)]


def _is_text(value: object) -> bool:
    """Whether a value is text, or a list of texts."""
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and any(_is_text(part) for part in value))


def check_observed(site: Site) -> None:
    """Refuse data that are no tensor, or NaN where no mask leaves them out."""
    name, value = site["name"], cast(object, site["value"])
    if not isinstance(value, Tensor):
        a_tensor = f"a tensor as obs=, got a {type(value).__name__}. Use torch.as_tensor."
        expected = "numbers as obs=, got text." if _is_text(value) else a_tensor
        raise ValueError(f"site {name!r}: expected {expected}")
    if not value.is_floating_point() or site["mask"] is False:
        return
    if isinstance(family(site["fn"]), (NanMaskedNormal, NanMaskedMultivariateNormal)):
        return
    bad = torch.isnan(value)
    for mask, axes in masks_over(site):
        bad = bad & mask.reshape(mask.shape + (1,) * (site["fn"].event_dim - axes))
    bad = bad.reshape(*bad.shape[: bad.dim() - site["fn"].event_dim], -1).any(-1)
    if bool(bad.any()):
        raise ValueError(
            f"site {name!r}: {int(bad.sum())} of {bad.numel()} observed values are NaN. "
            "Drop them, or mark them as missing with obs_mask=."
        )


def _dependence(run: Callable[[], object], structure: Structure) -> Structure:
    """Find out, from a run near a draw of the prior, whether supports move, and which locations and scales.

    Where there is no such run, supports are taken to move, which costs a run of the model wherever they are needed.
    """
    like = torch.zeros((), dtype=structure.dtype, device=structure.device)
    drawn = prior_run(run, structure.trace, like)
    if drawn is not None:
        structure = replace(structure, drawn={latent.name: _there(drawn, latent.name) for latent in structure.latents})

    def at(point: Tensor) -> tuple[Tensor, poutine.Trace]:
        with apart(), torch.no_grad(), pyro.validation_enabled(False), Place(structure.latents, point):
            return point, poutine.trace(run).get_trace()

    found = where_it_runs(at, structure.points)
    if not found:
        return replace(structure, dependent=True)
    point, second = found[0]
    hierarchical, dependent = [], False
    for latent in structure.latents:
        priors = [_there(trace, latent.name)["fn"] for trace in (structure.trace, second)]
        first, other = (latent.place(point, prior).value for prior in priors)
        dependent = dependent or not torch.equal(first, other)
        # where discrete latents are summed out, a location may have one value for each of theirs
        if latent.mask is None and not structure.enumerated and moves(*priors):
            hierarchical.append(latent.name)
    return replace(structure, dependent=dependent, hierarchical=tuple(hierarchical))


def _there(trace: poutine.Trace, name: str) -> Site:
    """Return a latent site of a run, which has to have it."""
    if name not in messages(trace):
        raise comes_and_goes(name)
    return messages(trace)[name]


# entries that a mask leaves without a prior: coordinates, if the rest of the model uses them --------------------------


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
        with apart(), seeded(0, next(iter(bases.values())).device), pyro.validation_enabled(False), Given(values):
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
