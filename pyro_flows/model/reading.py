"""What a Pyro model consists of, read from one run, and from a second one that moves the latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import NanMaskedMultivariateNormal, NanMaskedNormal, Unit
from torch import Tensor

from pyro_flows.model.batching import apart, quiet
from pyro_flows.model.faults import Subsampled, is_about_dtypes, where_it_runs
from pyro_flows.model.handlers import Place, masks_over
from pyro_flows.model.masks import coordinates, used
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
    is_data,
    is_deterministic,
    is_enumerated,
    is_subsample,
    messages,
)
from pyro_flows.model.start import first_run, initial_value, prior_run, transform_of
from pyro_flows.model.supports import check_density, family


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
    seen += [site["fn"].log_factor for site in sites if isinstance(site["fn"], Unit)]
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
        plate_nesting=max((-frame.dim for site in sites for frame in site["cond_indep_stack"] if frame.dim), default=0),
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
    if any(frame.dim is None for frame in site["cond_indep_stack"]):
        raise ValueError(f"site {name!r}: a latent in a sequential plate. Use a vectorized one (with pyro.plate(...)).")
    with torch.no_grad(), quiet():
        check_density(name, site["fn"], site["value"])
    unconstrained = transform.inv(site["value"])
    mask, free, improper = coordinates(site, unconstrained, unmasked)
    size = unconstrained.numel() if free is None else len(free)
    shapes = site["value"].shape, unconstrained.shape, site["fn"].event_dim
    return Latent(name, *shapes, _plates(site), offset, size, mask, free, improper=improper)


def _plates(site: Site) -> tuple[Plate, ...]:
    stack = site["cond_indep_stack"]
    return tuple(Plate(frame.name, frame.dim, frame.size) for frame in stack if frame.dim is not None)


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
