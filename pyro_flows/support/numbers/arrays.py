"""Labeled arrays: names of their dimensions, their entries, their bytes, tables of them. None of it takes ArviZ."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np

from pyro_flows.support import checks
from pyro_flows.support.files.untrusted import require

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Coords = Mapping[str, object] | None  # labels of dimensions


class Chosen(TypedDict):
    """Which variables, and which labels of their dimensions, a table or a figure shows."""

    var_names: str | Sequence[str] | None
    filter_vars: str | None
    coords: Coords


ALL = Chosen(var_names=None, filter_vars=None, coords=None)
SAMPLE_DIMS = ("chain", "draw")
SD_DIGITS = 3
UNORDERED = (str, set, frozenset)  # what is no list of labels
OF_SITES = "coords, dimensions of sites"
WIDER = 16  # times the bytes of a file, that its arrays may have in memory


def relabel(
    groups: Mapping[str, xr.Dataset], coords: Coords, dims: Mapping[str, Sequence[str]] | None
) -> dict[str, xr.Dataset]:
    """Rename the dimensions of variables, and label dimensions with coordinates, in all groups that have them.

    A ValueError says what does not fit: a dimension has one name and one list of labels in all variables of a group.
    """
    renamings = {name: _renaming(groups, name, names) for name, names in (dims or {}).items()}
    renamed = {name: _rename(group, renamings) for name, group in groups.items()}
    known = {str(dim) for group in renamed.values() for dim in group.sizes}
    for dim, given in (coords or {}).items():
        checks.choice(OF_SITES, dim, known)
        labels = listed(dim, given)
        for name, group in renamed.items():
            if dim in group.sizes:
                if len(labels) != group.sizes[dim]:
                    raise ValueError(f"coords[{dim!r}]: expected {group.sizes[dim]} labels, got {len(labels)}.")
                renamed[name] = group.assign_coords({dim: labels})
    return renamed


def listed(dim: str, given: object) -> list[object]:
    """Return the labels of a dimension as a list of Python's own numbers and texts, which JSON holds."""
    several = isinstance(given, Iterable) and not isinstance(given, UNORDERED) and getattr(given, "ndim", 1) == 1
    labels = [_plain(label) for label in cast("Iterable[object]", given)] if several else []
    if not several or None in labels:
        raise ValueError(f"coords[{dim!r}]: expected a list of labels, numbers or texts, got {given!r}.")
    return labels


def _plain(label: Any) -> object:
    """Return a label as a number or text of Python's own; None for what has entries of its own."""
    found = label.item() if getattr(label, "ndim", None) == 0 and not isinstance(label, np.datetime64) else label
    if isinstance(found, (list, tuple, set, dict)) or getattr(found, "ndim", 0) > 0:
        return None
    return found if isinstance(found, (bool, int, float, str)) else str(found)


def _renaming(groups: Mapping[str, xr.Dataset], name: str, names: Sequence[str]) -> dict[str, str]:
    """Return the new names of one variable's dimensions by the earlier ones; other groups may have fewer of them."""
    there = [group for group in groups.values() if name in group.data_vars]
    checks.choice("dims", name, {str(one) for group in groups.values() for one in group.data_vars})
    each = (tuple(str(dim) for dim in group[name].dims if dim not in SAMPLE_DIMS) for group in there)
    old = max(each, key=len)
    texts = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(new, str) for new in names)
    if not texts or len(names) != len(old):
        raise ValueError(f"dims[{name!r}]: expected {len(old)} names for its dimensions {old}, got {names!r}.")
    variables = {str(one) for group in there for one in group.data_vars}
    for place, new in enumerate(names):
        taken = {"a dimension of the draws": SAMPLE_DIMS, "a variable": variables, "there twice": names[:place]}
        why = [f"is {what}" for what, those in taken.items() if new in those]
        why += ["is empty"] if not new else ["has a slash, which separates groups in files"] if "/" in new else []
        if why and new != old[place]:
            raise ValueError(f"dims[{name!r}]: expected names of dimensions, but {new!r} {why[0]}. Name another.")
    return dict(zip(old, names, strict=True))


def _rename(group: xr.Dataset, renamings: Mapping[str, Mapping[str, str]]) -> xr.Dataset:
    if not any(name in group for name in renamings):
        return group
    variables, labels = {}, dict[str, list[object]]()
    for name, values in group.data_vars.items():
        mapping = renamings.get(str(name), {})
        for dim in map(str, values.dims):
            new, own = mapping.get(dim, dim), group[dim].to_numpy().tolist()
            labels[new] = of_both(new, labels.get(new, own), own)
        changed = {old: new for old, new in mapping.items() if old in values.dims and old != new}
        variables[name] = values.drop_vars(list(values.coords)).rename(changed)
    blank = group.drop_vars(list(group)).drop_dims(list(group.dims))
    return blank.assign_coords(labels).assign(variables)


def of_both(dim: str, one: list[object], other: list[object]) -> list[object]:
    """Return the labels of a dimension that two variables share: numbers of entries give way to labels."""
    count = list(range(len(other)))
    if len(one) != len(other) or not (one == other or count in (one, other)):
        raise ValueError(
            f"dims: expected dimensions with the same entries under the name {dim!r}, got {indexed(dim, [one[:3]])} of "
            f"{len(one)} and {indexed(dim, [other[:3]])} of {len(other)}. Name them apart."
        )
    return other if one == count else one


def entry_labels(values: xr.DataArray) -> list[str]:
    """Return a label for each entry of an array of draws, in row-major order: ``y[Choate]``, ``y``."""
    dims = [str(dim) for dim in values.dims if dim not in SAMPLE_DIMS]
    return indexed(str(values.name), [values[dim].to_numpy().tolist() for dim in dims])


def indexed(name: str, axes: Iterable[Iterable[object]]) -> list[str]:
    """Return the name of each entry of an array whose axes have these labels: ``y[0, 1]``, ``y`` without axes."""
    return [f"{name}[{', '.join(map(str, entry))}]" if entry else name for entry in itertools.product(*axes)]


def entries(draws: xr.Dataset, coords: Coords) -> xr.Dataset:
    """Choose entries by the labels of dimensions, ``{"school": ["Choate"]}``; a variable without one stays whole."""
    for dim, labels in (coords or {}).items():
        checks.choice(OF_SITES, dim, [str(name) for name in draws.dims if name not in SAMPLE_DIMS])
        single = isinstance(labels, (str, int, float)) or getattr(labels, "ndim", None) == 0
        wanted, there = listed(dim, [labels] if single else labels), draws[dim].to_numpy().tolist()
        for label in wanted:
            if label not in there:
                shown = ", ".join(map(repr, there[:8])) + (", ..." if len(there) > 8 else "")
                raise ValueError(f"coords[{dim!r}]: expected labels among {shown}, got {label!r}.")
        draws = draws.isel({dim: [place for label in wanted for place, one in enumerate(there) if one == label]})
    return draws


def write(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str | float]) -> bytes:
    """Return all groups as the bytes of one netCDF file. HDF5 writes to memory: a full disk would crash it."""
    file = io.BytesIO()
    as_tree(groups, attrs).to_netcdf(file, engine="h5netcdf")
    return file.getvalue()


def read(data: bytes) -> tuple[dict[str, xr.Dataset], dict[str, str | float]]:
    """Read what :func:`write` wrote: groups and attributes, all in memory."""
    import xarray

    with xarray.open_datatree(io.BytesIO(data), engine="h5netcdf") as tree:
        size = sum(node.dataset.nbytes for node in tree.subtree)
        require(size <= WIDER * len(data), f"its arrays have {size} bytes, in a file of {len(data)}")
        # tree.load() leaves out variables that have the name of a group, such as a site "prior"
        groups = {name: node.to_dataset().load() for name, node in tree.children.items()}
        attrs = {str(name): value.item() if hasattr(value, "item") else value for name, value in tree.attrs.items()}
    for group in groups.values():
        group.attrs = {}
    return groups, attrs


def as_tree(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str | float]) -> xr.DataTree:
    import xarray

    tree = xarray.DataTree.from_dict(with_attrs(groups, attrs))
    tree.attrs = dict(attrs)
    return tree


def with_attrs(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str | float]) -> dict[str, xr.Dataset]:
    """Put the attributes, which belong to the whole, on the first group too, where tools look for them."""
    first = next(iter(groups))
    return {name: group.assign_attrs(attrs) if name == first else group.copy() for name, group in groups.items()}


def rounded(table: pd.DataFrame, round_to: int | str) -> pd.DataFrame:
    """Round to decimals, or (``"auto"``) row by row to three digits of the sd (of the mean, where sd is 0)."""
    if round_to == "none":
        return table
    if round_to != "auto":
        return table.round(checks.integer("round_to", round_to, 0))
    scales = table["sd"].where(table["sd"] > 0, table["mean"].abs())
    for row, scale in scales.items():
        if math.isfinite(scale) and scale > 0:
            table.loc[row] = table.loc[row].round(max(SD_DIGITS - 1 - math.floor(math.log10(scale)), 0))
    return table
