"""Labeled arrays: names of their dimensions, their entries, their bytes, tables of them. None of it takes ArviZ."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict, cast

from pyro_flows import _checks
from pyro_flows._untrusted import require

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
WIDER = 16  # times the bytes of a file, that its arrays may have in memory


def relabel(
    groups: Mapping[str, xr.Dataset], coords: Coords, dims: Mapping[str, Sequence[str]] | None
) -> dict[str, xr.Dataset]:
    """Rename the dimensions of variables, and label dimensions with coordinates, in all groups that have them."""
    renamed = {name: _rename(group, _renamings(groups, dims or {})) for name, group in groups.items()}
    known = {str(dim): size for group in renamed.values() for dim, size in group.sizes.items()}
    for dim, given in (coords or {}).items():
        _checks.choice("coords", dim, known)
        labels = list(cast("Iterable[object]", given))
        for name, group in renamed.items():
            if dim in group.sizes:
                if len(labels) != group.sizes[dim]:
                    raise ValueError(f"coords[{dim!r}]: expected {group.sizes[dim]} labels, got {len(labels)}.")
                renamed[name] = group.assign_coords({dim: labels})
    return renamed


def _renamings(groups: Mapping[str, xr.Dataset], dims: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    widest: dict[str, tuple[str, ...]] = {}
    for group in groups.values():
        for name, values in group.data_vars.items():
            own = tuple(str(dim) for dim in values.dims if dim not in SAMPLE_DIMS)
            widest[str(name)] = max(widest.get(str(name), ()), own, key=len)
    renamings = {}
    for name, names in dims.items():
        old = widest[_checks.choice("dims", name, widest)]
        if len(names) != len(old) or isinstance(names, str):
            raise ValueError(f"dims[{name!r}]: expected {len(old)} names for its dimensions {old}, got {names!r}.")
        renamings[name] = dict(zip(old, names, strict=True))
    return renamings


def _rename(group: xr.Dataset, renamings: Mapping[str, Mapping[str, str]]) -> xr.Dataset:
    if not any(name in group for name in renamings):
        return group
    variables = {}
    for name, values in group.data_vars.items():
        mapping = renamings.get(str(name), {})
        variables[name] = values.rename({old: new for old, new in mapping.items() if old in values.dims and old != new})
    return group.drop_vars(list(group)).drop_dims(list(group.dims)).assign(variables)


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
        _checks.choice("coords", dim, [str(name) for name in draws.dims if name not in SAMPLE_DIMS])
        wanted = [labels] if isinstance(labels, (str, int, float)) else list(cast("Iterable[object]", labels))
        there = draws[dim].to_numpy().tolist()
        for label in wanted:
            if label not in there:
                shown = ", ".join(map(repr, there[:8])) + (", ..." if len(there) > 8 else "")
                raise ValueError(f"coords[{dim!r}]: expected labels among {shown}, got {label!r}.")
        draws = draws.sel({dim: wanted})
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
        return table.round(_checks.integer("round_to", round_to, 0))
    scales = table["sd"].where(table["sd"] > 0, table["mean"].abs())
    for row, scale in scales.items():
        if math.isfinite(scale) and scale > 0:
            table.loc[row] = table.loc[row].round(max(SD_DIGITS - 1 - math.floor(math.log10(scale)), 0))
    return table
