"""From a posterior to labelled arrays: which axes of which sites get which names, and what goes into which group."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_flows import _arviz
from pyro_flows.log_density import LogDensity
from pyro_flows.sites import Latent, Plate, Structure

if TYPE_CHECKING:
    import xarray as xr

    from pyro_flows.posterior import Posterior

PRIOR_DRAWS = 500
PACKAGES = ("pyro-ppl", "torch", "arviz-base", "arviz-stats")

logger = logging.getLogger("pyro_flows")


# names and axes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How values ``(S, *batch, *event)`` of a site become an array: phantom axes dropped, masked entries left out.

    Attributes:
        dims: names of the axes that stay.
        batch: how many batch axes the value has.
        phantom: singleton axes that belong to no plate, counted from the first batch axis.
        keep: the entries that count, if some are masked out: a boolean mask over the batch axes.
    """

    dims: tuple[str, ...]
    batch: int
    phantom: tuple[int, ...] = ()
    keep: Tensor | None = None

    def __call__(self, values: Tensor) -> np.ndarray:
        if self.keep is not None:
            picked = values[:, self.keep.to(values.device)]
        else:
            picked = values.squeeze(tuple(axis + 1 for axis in self.phantom))
        return picked.detach().cpu().numpy()

    def without_event(self) -> Layout:
        """The layout of log densities: batch axes only."""
        kept = self.batch - len(self.phantom) if self.keep is None else 1
        return Layout(self.dims[:kept], self.batch, self.phantom, self.keep)


class Labels:
    """Names of variables and dimensions of one model.

    Slashes, which netCDF reserves for groups, become points; a plate that shares its name with a variable gets the
    suffix ``_dim``.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        sites = [latent.name for latent in structure.latents]
        self._sites = (*sites, *structure.deterministic, *structure.observed)
        self._taken = {self.variable(name) for name in self._sites} | set(_arviz.SAMPLE_DIMS)
        self._sizes: dict[str, int] = {}

    def variable(self, site: str) -> str:
        """Return the variable that holds this site."""
        name = site.replace("/", ".")
        return f"{name}_" if name in _arviz.SAMPLE_DIMS else name

    def layout(
        self, site: str, shape: torch.Size, event_dim: int, plates: Iterable[Plate], keep: Tensor | None = None
    ) -> Layout:
        """Name the axes of one site's value: plates by their names, all others by the site's."""
        batch = len(shape) - event_dim
        by_axis = {batch + plate.dim: plate for plate in plates if batch + plate.dim >= 0}
        variable, dims, phantom, unnamed = self.variable(site), [], [], 0
        axes = range(len(shape))
        if keep is not None:
            dims, axes = [f"{variable}_entry"], range(batch, len(shape))
        for axis in axes:
            plate = by_axis.get(axis)
            if plate is not None and plate.size == shape[axis]:
                dims.append(self._plate(plate, variable))
            elif axis < batch and shape[axis] == 1:
                phantom.append(axis)
            else:
                dims.append(f"{variable}_dim_{unnamed}")
                unnamed += 1
        return Layout(tuple(dims), batch, tuple(phantom), keep)

    def _plate(self, plate: Plate, variable: str) -> str:
        name = plate.name.replace("/", ".")
        name = f"{name}_dim" if name in self._taken else name
        if self._sizes.setdefault(name, plate.size) != plate.size:
            return f"{variable}_{name}"
        return name

    def latent(self, latent: Latent) -> Layout:
        """The layout of a latent site's constrained value."""
        return self.layout(latent.name, latent.shape, latent.event_dim, latent.plates, latent.mask)

    def unconstrained(self, latent: Latent) -> Layout:
        """The layout of a latent site's unconstrained coordinates, each masked-out one left out."""
        if latent.free is None and latent.unconstrained_shape == latent.shape:
            return self.latent(latent)
        if latent.free is not None:
            return Layout((f"{self.variable(latent.name)}_unconstrained_entry",), 1)
        event_dim = latent.event_dim + len(latent.unconstrained_shape) - len(latent.shape)
        found = self.layout(latent.name, latent.unconstrained_shape, event_dim, latent.plates)
        prefix = f"{self.variable(latent.name)}_dim_"
        dims = tuple(dim.replace(prefix, f"{prefix[:-5]}_unconstrained_dim_") for dim in found.dims)
        return Layout(dims, found.batch, found.phantom)

    def observed(self, site: str) -> Layout:
        """The layout of an observed site, without the entries that a mask takes out."""
        node = self.structure.trace.nodes[site]
        shape, event_dim = self.data(site).shape, node["fn"].event_dim
        keep = torch.ones(shape[: len(shape) - event_dim], dtype=torch.bool)
        for mask in (node["mask"], getattr(node["fn"], "_mask", None)):  # poutine.mask, and fn.mask(...)
            keep = keep if mask is None else keep & torch.as_tensor(mask).to(keep.device)
        plates = self.structure.observed_plates[site]
        return self.layout(site, shape, event_dim, plates, None if bool(keep.all()) else keep)

    def data(self, site: str) -> Tensor:
        """The observed values of a site, one for each density that the model evaluates."""
        node = self.structure.trace.nodes[site]
        return node["value"].expand(torch.broadcast_shapes(node["value"].shape, node["fn"].shape()))

    def deterministic(self, site: str) -> Layout:
        """The layout of a deterministic site.

        Pyro takes all its axes for event axes unless told otherwise, inside plates too; so plates are looked for from
        the last axis on.
        """
        node, plates = self.structure.trace.nodes[site], self.structure.deterministic[site]
        shape, event_dim = node["value"].shape, node["fn"].event_dim
        if event_dim == len(shape):
            for event_dim in range(len(shape) + 1):
                batch = len(shape) - event_dim
                if all(batch + plate.dim >= 0 and shape[batch + plate.dim] == plate.size for plate in plates):
                    break
        return self.layout(site, shape, event_dim, plates)


def _stack(labels: Labels, values: Mapping[str, Tensor], layout: Callable[[str], Layout]) -> xr.Dataset:
    """Make a group of draws ``{site: (S, *shape)}``; the draws are one chain."""
    layouts = {name: layout(name) for name in values}
    arrays = {labels.variable(name): layouts[name](value)[None] for name, value in values.items()}
    return _arviz.dataset(arrays, {labels.variable(name): found.dims for name, found in layouts.items()})


# groups ---------------------------------------------------------------------------------------------------------------


def draws_group(labels: Labels, samples: Mapping[str, Tensor]) -> xr.Dataset:
    """Latent and deterministic sites as labelled arrays."""
    latents = {latent.name: latent for latent in labels.structure.latents}

    def layout(name: str) -> Layout:
        return labels.latent(latents[name]) if name in latents else labels.deterministic(name)

    return _stack(labels, samples, layout)


def all_groups(posterior: Posterior, density: LogDensity, *, predictive: bool) -> dict[str, xr.Dataset]:
    """All groups of the ArviZ object, in its usual order."""
    labels = Labels(density.structure)
    latents = {latent.name: latent for latent in density.structure.latents}
    observed = labels.observed
    groups = {"posterior": draws_group(labels, posterior.samples)}
    groups["sample_stats"] = _stats(posterior.used_log_p, posterior.used_log_q, posterior.used_log_weights)
    likelihood, prior = density.log_likelihood(posterior.used), density.log_prior(posterior.used)
    groups["log_likelihood"] = _stack(labels, _double(likelihood), lambda name: observed(name).without_event())
    groups["log_prior"] = _stack(labels, _double(prior), lambda name: labels.latent(latents[name]).without_event())
    if predictive:
        seed = int(posterior.settings["seed"])
        groups |= _predictive(labels, density, posterior.used, seed)
    data = {labels.variable(name): observed(name)(labels.data(name)[None])[0] for name in density.structure.observed}
    dims = {labels.variable(name): observed(name).dims for name in density.structure.observed}
    groups["observed_data"] = _arviz.dataset(data, dims, sample_dims=())
    groups["constant_data"] = _constants(density)
    cut = {latent.name: _cut(latent, posterior.used) for latent in density.structure.latents}
    groups["unconstrained_posterior"] = _stack(labels, cut, lambda name: labels.unconstrained(latents[name]))
    if posterior.resampled:
        groups["raw_posterior"] = draws_group(labels, density.constrain(posterior.z))
        groups["raw_sample_stats"] = _stats(posterior.log_p, posterior.log_q, posterior.log_weights)
    groups["fit"] = _fit(posterior)
    return {name: group for name, group in groups.items() if group.data_vars}


def _double(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


def _cut(latent: Latent, z: Tensor) -> Tensor:
    flat = z[:, latent.offset : latent.offset + latent.size]
    return flat if latent.free is not None else flat.reshape(len(z), *latent.unconstrained_shape)


def _stats(log_p: Tensor, log_q: Tensor, log_weights: Tensor) -> xr.Dataset:
    values = {"lp": log_p, "log_p": log_p, "log_q": log_q, "log_weight": log_weights}
    return _arviz.dataset({name: value.double().cpu().numpy()[None] for name, value in values.items()}, {})


def _predictive(labels: Labels, density: LogDensity, z: Tensor, seed: int) -> dict[str, xr.Dataset]:
    """Draws of the data and the prior; what a model cannot draw is left out, with a note in the log."""
    structure, groups = density.structure, {}
    try:
        groups["posterior_predictive"] = _stack(labels, density.predictive(z, seed=seed), labels.observed)
    except Exception as error:
        logger.warning("no posterior_predictive: %s: %s", type(error).__name__, error)
    try:
        prior = density.prior(PRIOR_DRAWS, seed=seed)
    except Exception as error:
        logger.warning("no prior: %s: %s", type(error).__name__, error)
        return groups
    if prior is not None:
        unknown = structure.deterministic if structure.enumerated else ()
        values = {name: value for name, value in prior.items() if name not in structure.observed and name not in unknown}
        groups["prior"] = draws_group(labels, values)
        data = {name: prior[name] for name in structure.observed}
        groups["prior_predictive"] = _stack(labels, data, labels.observed)
    return groups


def _constants(density: LogDensity) -> xr.Dataset:
    """The model's tensor arguments that are not observed themselves."""
    try:
        arguments = inspect.signature(density.model).bind(*density.args, **density.kwargs).arguments
    except (TypeError, ValueError):
        arguments = {}
    observed = [value for value in density.structure.observed.values()]
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not any(value.shape == y.shape and torch.equal(value, y) for y in observed):
            found[name] = value.detach().cpu().numpy()
    dims = {name: [f"{name}_dim_{axis}" for axis in range(value.ndim)] for name, value in found.items()}
    return _arviz.dataset(found, dims, sample_dims=())


def _fit(posterior: Posterior) -> xr.Dataset:
    values: dict[str, np.ndarray] = {"k_hat": np.array(posterior.k_hat), "ess": np.array(posterior.ess)}
    values["log_evidence"] = np.array(posterior.log_evidence)
    seconds = posterior.seconds
    if not math.isnan(seconds):
        values["seconds"] = np.array(seconds)
    if len(posterior.losses):
        values["elbo"] = -posterior.losses.detach().double().cpu().numpy()
    return _arviz.dataset(values, {"elbo": ["step"]}, sample_dims=())


def attributes(posterior: Posterior) -> dict[str, str | float]:
    """What the object says of itself: numbers and strings only."""
    kind = "psis-resampled" if posterior.resampled else "flow" if posterior.flow is not None else "guide"
    found: dict[str, str | float] = {
        "inference_library": "pyro_flows",
        "inference_library_version": _version("pyro-flows"),
        **{f"{name.replace('-', '_')}_version": _version(name) for name in PACKAGES},
        "settings": json.dumps(plain(posterior.settings)),
        "seed": int(posterior.settings["seed"]),
        "device": str(posterior.z.device),
        "dtype": str(posterior.z.dtype).removeprefix("torch."),
        "status": posterior.verdict.status,
        "verdict": str(posterior.verdict),
        "sampling": kind,
    }
    return found


def plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: lists, dicts, strings, finite numbers; other numbers as strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
