"""Names for the axes of a model's sites: plates by their names, phantom axes dropped, masked entries left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows.model.sites import Latent, Plate, Structure, messages
from pyro_flows.support.numbers import arrays
from pyro_flows.support.numbers.tensors import broadcast

if TYPE_CHECKING:
    import xarray as xr


def coordinate_names(structure: Structure) -> list[str]:
    """Label the unconstrained coordinates by site and index: ``theta[3]``, ``theta[3] (non-centered)``.

    Those of which the data say something are ``theta[3] (partly non-centered)``.
    """
    names = []
    for latent in structure.latents:
        single = latent.size == 1 and not latent.unconstrained_shape
        found = [latent.name] if single else [f"{latent.name}[{i}]" for i in range(latent.size)]
        suffix = "" if not latent.noncentered else " (partly non-centered)" if latent.data else " (non-centered)"
        names += [name + suffix for name in found]
    return names


@dataclass(frozen=True)
class Layout:
    """How values ``(S, *batch, *event)`` of a site become an array: phantom axes dropped, masked entries left out."""

    dims: tuple[str, ...]  # names of the axes that stay
    batch: int  # how many batch axes the value has
    phantom: tuple[int, ...] = ()  # singleton axes that belong to no plate, counted from the first batch axis
    keep: Tensor | None = None  # the entries that count, if some are masked out: a boolean mask over the batch axes

    def __call__(self, values: Tensor) -> np.ndarray:
        if self.keep is not None:
            picked = values[:, self.keep.to(values.device)]
        else:
            picked = values.squeeze(tuple(axis + 1 for axis in self.phantom))
        return picked.detach().cpu().numpy()

    @property
    def coords(self) -> dict[str, list[int] | list[str]]:
        """Labels of the entries that masks leave: their index in the whole, ``2``, or ``"0,2"`` of several axes."""
        if self.keep is None:
            return {}
        entries = self.keep.nonzero().tolist()
        single = self.keep.dim() == 1
        return {self.dims[0]: [row[0] for row in entries] if single else [",".join(map(str, row)) for row in entries]}

    def without_event(self) -> Layout:
        """The layout of log densities: batch axes only."""
        kept = self.batch - len(self.phantom) if self.keep is None else 1
        return Layout(self.dims[:kept], self.batch, self.phantom, self.keep)


class Labels:
    """Names of variables and dimensions of one model.

    Slashes, which netCDF reserves for groups, become points; a plate that shares its name with a variable gets the
    suffix ``_dim``; a site called ``chain`` or ``draw``, and a dimension whose name is taken, get an underscore.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._variables: dict[str, str] = {}
        self._taken = set(arrays.SAMPLE_DIMS)
        self._sizes: dict[str, int] = {}
        self._kept: dict[str, tuple[str | None, ...]] = {}  # names of axes, by the sites of a fitted prior of several
        for latent in structure.latents:
            self._kept.update(getattr(messages(structure.trace)[latent.name]["fn"], "site_dims", {}))
        latents = [latent.name for latent in structure.latents]
        for site in (*latents, *structure.deterministic, *structure.observed):
            self._variables[site] = _free(_plain(site), self._taken)
            self._taken.add(self._variables[site])
        on = (*(latent.plates for latent in structure.latents), *structure.deterministic.values())
        of_sites = itertools.chain(*on, *structure.observed_plates.values())
        self._plates = {_plain(plate.name) for plate in of_sites}

    def variable(self, site: str) -> str:
        """Return the name of the variable that holds this site."""
        return self._variables[site]

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
                dims.append(_free(f"{variable}_dim_{unnamed}", self._taken | self._plates))
                unnamed += 1
        return Layout(tuple(dims), batch, tuple(phantom), keep)

    def _plate(self, plate: Plate, variable: str) -> str:
        name = _plain(plate.name)
        name = _free(f"{name}_dim" if name in self._taken else name, self._taken)
        if self._sizes.setdefault(name, plate.size) != plate.size:
            return _free(f"{variable}_{name}", self._taken)
        return name

    def latent(self, latent: Latent) -> Layout:
        """The layout of a latent site's constrained value."""
        found = self.layout(latent.name, latent.shape, latent.event_dim, latent.plates, latent.mask)
        fn = messages(self.structure.trace)[latent.name]["fn"]
        return self._named(found, latent.name, latent.shape, getattr(fn, "event_dims", ()))

    def _named(self, layout: Layout, site: str, shape: torch.Size, names: Sequence[str | None]) -> Layout:
        """Give the last axes the names that a fitted prior kept of them, None where it has none."""
        dims = list(layout.dims)
        for place, name in enumerate(names, start=-len(names)):
            if name is not None:
                dims[place] = self._plate(Plate(name, place, shape[place]), self.variable(site))
        return replace(layout, dims=tuple(dims))

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
        node = messages(self.structure.trace)[site]
        shape, event_dim = self.data(site).shape, node["fn"].event_dim
        keep = torch.ones(shape[: len(shape) - event_dim], dtype=torch.bool)
        for mask in (node["mask"], getattr(node["fn"], "_mask", None)):  # poutine.mask, and fn.mask(...)
            keep = keep if mask is None else keep & torch.as_tensor(mask).to(keep.device)
        plates = self.structure.observed_plates[site]
        return self.layout(site, shape, event_dim, plates, None if bool(keep.all()) else keep)

    def data(self, site: str) -> Tensor:
        """The observed values of a site, one for each density that the model evaluates."""
        node = messages(self.structure.trace)[site]
        return node["value"].expand(broadcast(node["value"].shape, node["fn"].shape()))

    def deterministic(self, site: str) -> Layout:
        """The layout of a deterministic site.

        Pyro takes all its axes for event axes unless told otherwise, inside plates too; so plates are looked for from
        the last axis on.
        """
        node = messages(self.structure.trace)[site]
        plates = self.structure.deterministic[site]
        shape, event_dim = node["value"].shape, node["fn"].event_dim
        if event_dim == len(shape):
            for event_dim in range(len(shape) + 1):
                batch = len(shape) - event_dim
                if all(batch + plate.dim >= 0 and shape[batch + plate.dim] == plate.size for plate in plates):
                    break
        return self._named(self.layout(site, shape, event_dim, plates), site, shape, self._kept.get(site, ()))


def _plain(name: str) -> str:
    """Return a name that files can hold."""
    return name.replace("/", ".") or "_"


def _free(name: str, taken: set[str]) -> str:
    """Return a name with as many underscores as make it a new one."""
    while name in taken:
        name += "_"
    return name


# labels that a user gives ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labeling:
    """What :meth:`~pyro_flows.Posterior.assign_coords` was told."""

    coords: dict[str, list[object]] = field(default_factory=dict)  # labels of dimensions, numbers or strings
    dims: dict[str, list[str]] = field(default_factory=dict)  # names of the dimensions of variables

    def joined(
        self, labeled: Mapping[str, xr.Dataset], coords: arrays.Coords, dims: Mapping[str, Sequence[str]] | None
    ) -> Labeling:
        """Return these and further ones, which count where both say something, as the groups have them now."""
        told = {*self.coords, *(coords or {}), *itertools.chain(*(dims or {}).values())}
        entries = dict[str, list[object]]()
        for group in labeled.values():
            for dim in told & set(map(str, group.sizes)):
                own = arrays.listed(dim, group[dim].to_numpy().tolist())
                entries[dim] = arrays.of_both(dim, entries.get(dim, own), own)
        return Labeling(entries, {**self.dims, **{name: list(names) for name, names in (dims or {}).items()}})

    def applied(self, groups: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Label those dimensions and variables that these groups have."""
        if not self.coords and not self.dims:
            return dict(groups)
        there = {str(name) for group in groups.values() for name in group.data_vars}
        named = arrays.relabel(groups, None, {name: dims for name, dims in self.dims.items() if name in there})
        sizes = {str(dim) for group in named.values() for dim in group.sizes}
        return arrays.relabel(named, {dim: labels for dim, labels in self.coords.items() if dim in sizes}, None)
