"""Labels that a user gives the dimensions of a model, and names of the dimensions of its variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyro_flows import _arrays

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Labeling:
    """What :meth:`~pyro_flows.Posterior.assign_coords` was told."""

    coords: dict[str, list[Any]] = field(default_factory=dict)  # labels of dimensions, numbers or strings
    dims: dict[str, list[str]] = field(default_factory=dict)  # names of the dimensions of variables

    def joined(self, coords: _arrays.Coords, dims: Mapping[str, Sequence[str]] | None) -> Labeling:
        """Return these and further ones, which count where both say something."""
        entries = {str(dim): [_plain(label) for label in labels] for dim, labels in (coords or {}).items()}
        names = {name: [names] if isinstance(names, str) else list(names) for name, names in (dims or {}).items()}
        return Labeling({**self.coords, **entries}, {**self.dims, **names})

    def applied(self, groups: Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
        """Label those dimensions and variables that these groups have."""
        if not self.coords and not self.dims:
            return dict(groups)
        there = {str(name) for group in groups.values() for name in group.data_vars}
        named = _arrays.relabel(groups, None, {name: dims for name, dims in self.dims.items() if name in there})
        sizes = {str(dim) for group in named.values() for dim in group.sizes}
        return _arrays.relabel(named, {dim: labels for dim, labels in self.coords.items() if dim in sizes}, None)


def _plain(label: Any) -> Any:
    """Return a label of NumPy or torch as Python's own, which JSON holds."""
    found = label.item() if hasattr(label, "item") else label
    return found if isinstance(found, (bool, int, float, str)) else str(found)
