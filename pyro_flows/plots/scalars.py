"""What is drawn: scalars of one or several posteriors, by the names that ArviZ has for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows import _arrays, _arviz, _checks
from pyro_flows.results.arviz_groups import named_draws, posterior_group
from pyro_flows.results.record import Record
from pyro_flows.verdict.methods import GUIDE

if TYPE_CHECKING:
    import xarray as xr

Posteriors = Record | Mapping[str, Record]
Names = str | Sequence[str] | None
Transform = Mapping[str, Callable[[Tensor], Tensor]]


def scalars_of(
    draws: xr.Dataset, var_names: Names, filter_vars: str | None, coords: _arrays.Coords
) -> dict[str, np.ndarray]:
    """Return the draws (S,) of each scalar by its label, ``theta[Choate]``, of those that are chosen as in ArviZ."""
    found = _arviz.select(draws, var_names, filter_vars, coords)
    return {label: column for values in found.data_vars.values() for label, column in _columns(values)}


def named(posteriors: Posteriors) -> dict[str, Record]:
    """Return posteriors by name; one that comes without is called by its method or guide. Refuse anything else."""
    found = posteriors if isinstance(posteriors, Mapping) else {"": posteriors}
    if not found or not all(isinstance(posterior, Record) for posterior in found.values()):
        kinds = ", ".join(sorted({type(posterior).__name__ for posterior in found.values()})) or "none"
        raise ValueError(f"posterior: expected a Posterior, or several by name, {{'flow': a, 'NUTS': b}}, got {kinds}.")
    if isinstance(posteriors, Record):
        return {_label(posteriors, posteriors.method): posteriors}
    return {str(name): posterior for name, posterior in found.items()}


def _label(posterior: Record, method: str) -> str:
    """Return what made draws: the method, or the class of a guide or sampler that is the caller's."""
    return posterior.guide_name if posterior._of_mcmc or method == GUIDE else method


def raw_label(posterior: Record) -> str:
    """Return what made the guide's own draws."""
    return _label(posterior, posterior.verdict.guide_method)


def raw(posterior: Record) -> xr.Dataset:
    """Return the guide's own draws, before any resampling or sampler; they may take the model."""
    if not posterior._replaced:
        return posterior_group(posterior)
    if posterior._stored is not None and "raw_posterior" in posterior._stored[0]:
        return posterior._stored[0]["raw_posterior"]
    if posterior.density is None:
        raise ValueError("posterior: its raw draws need its model; load(path, model, *args) with the fit's arguments.")
    return named_draws(posterior, posterior._need_density().constrain(posterior.z))


def common(layers: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Return the labels that all layers have, in the first one's order, or raise a ValueError if there are none."""
    first, *others = layers.values()
    found = [label for label in first if all(label in other for other in others)]
    if not found:
        raise ValueError(f"posterior: {', '.join(layers)} have no scalar in common; compare posteriors of one model.")
    return found


# scalars by label -----------------------------------------------------------------------------------------------------


def scalar(draws: xr.Dataset, label: str, transform: Transform | None = None) -> np.ndarray:
    """Return the draws (S,) of one scalar, such as ``mu``, ``theta[3]`` or ``theta[Choate]``, transformed."""
    name = label if label in draws else variable(label)
    values = draws[_checks.choice("var_names", name, map(str, draws.data_vars))]
    found = dict(_columns(values))
    key = re.sub(r",\s*", ", ", label)
    shape = tuple(size for dim, size in values.sizes.items() if dim not in _arrays.SAMPLE_DIMS)
    if key not in found:  # by position, whatever the labels
        key = dict(zip(_arrays.indexed(name, map(range, shape)), found, strict=True)).get(key, key)
    if key not in found:
        example = next(iter(found))
        raise ValueError(f"{label!r}: expected one scalar; site {name!r} has shape {shape}, so {example!r}, say.")
    return transformed(found[key], name, transform)


def transformed(values: np.ndarray, name: str, transform: Transform | None) -> np.ndarray:
    """Return draws (S,) of a variable after its function, if it has one."""
    function = (transform or {}).get(name)
    return values if function is None else function(torch.as_tensor(values)).double().cpu().numpy()


def variable(label: str) -> str:
    """Return the variable's name of a label, ``theta`` of ``theta[3]``."""
    return re.sub(r"\[[^\]]*\]$", "", label)


def axis_label(label: str, transform: Transform | None) -> str:
    """Return what an axis is called: the label, after the name of the function that was applied."""
    function = (transform or {}).get(variable(label))
    return label if function is None else f"{getattr(function, '__name__', 'transformed')} {label}"


def _columns(values: xr.DataArray) -> list[tuple[str, np.ndarray]]:
    array = values.to_numpy()
    flat = array.reshape(array.shape[0] * array.shape[1], -1).astype(float)
    return list(zip(_arrays.entry_labels(values), flat.T, strict=True))
