"""The only door to ArviZ, opened lazily: importing ``pyro_flows`` does not import ArviZ.

Everything goes through ``arviz_base`` and ``arviz_stats``, which are the same for ArviZ 0.23 (Python 3.11) and 1.x;
only the last step of :func:`pack` and the default interval differ.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from pyro_flows.support import checks
from pyro_flows.support.figures import verdict_html
from pyro_flows.support.numbers.arrays import SAMPLE_DIMS, Coords, as_tree, entries, entry_labels, rounded, with_attrs
from pyro_flows.support.numbers.mixing import chain_diagnostics as chain_diagnostics

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

MANY_CHAINS = "Found chain dimension to be longer than draw dimension"  # short ones, as they are meant to be
JUDGED = "InferenceData"  # the name of our own class too: arviz_base knows such objects by it


# labeled arrays ------------------------------------------------------------------------------------------------------


def dataset(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    *,
    coords: Coords = None,
    sample_dims: Sequence[str] = SAMPLE_DIMS,
) -> xr.Dataset:
    """Label arrays; their leading axes are ``sample_dims``. Empty arrays are left out."""
    from arviz_base import dict_to_dataset

    make = cast("Callable[..., xr.Dataset]", dict_to_dataset)
    filled = {name: value for name, value in values.items() if value.size}
    names: dict[Hashable, Sequence[Hashable]] = {name: list(dims.get(name, ())) for name in filled}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MANY_CHAINS)
        found = make(filled, dims=names, coords=dict(coords or {}), sample_dims=sample_dims)
    found.attrs = {}
    return found


# the whole object -----------------------------------------------------------------------------------------------------


def pack(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str | float]) -> Any:
    """Return an ``arviz.InferenceData`` where the installed ArviZ is 0.x, a ``DataTree`` elsewhere.

    The attributes ``status`` and ``verdict`` show when it is printed. A ``DataTree`` prints its attributes, but a
    notebook hides them until they are asked for; its name always shows, so it is named by the status.
    """
    if not _is_old():
        tree = as_tree(groups, attrs)
        tree.name = f"verdict: {attrs.get('status', 'not known')}"
        return tree
    return _judged()(attrs=dict(attrs), **with_attrs(groups, attrs))


def _is_old() -> bool:
    return int(version("arviz").split(".")[0]) < 1


@functools.cache
def _judged() -> type:
    """Return the class of ArviZ 0.x's objects that say what the verdict is when they are printed."""

    class InferenceData(_old().InferenceData):  # type: ignore[misc]
        def __repr__(self) -> str:
            return f"Verdict: {self.attrs.get('verdict', 'not known')}\n{super().__repr__()}"

        def _repr_html_(self) -> str:
            return f"<p>Verdict: {verdict_html(str(self.attrs.get('verdict', 'not known')))}</p>{super()._repr_html_()}"

    InferenceData.__module__, InferenceData.__qualname__ = __name__, JUDGED
    return InferenceData


def __getattr__(name: str) -> object:
    """Find the class where a pickle looks for it."""
    if name == JUDGED:
        return _judged()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _old() -> ModuleType:
    """Import ArviZ 0.x without its advertisement for 1.x, which needs another Python."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor", category=FutureWarning)
        import arviz
    return arviz


# the table ------------------------------------------------------------------------------------------------------------


def default_interval() -> tuple[str, float]:
    """Return kind and probability of the installed ArviZ's interval, as its settings have it: hdi .94, or eti .89."""
    if _is_old():
        return "hdi", float(_old().rcParams["stats.ci_prob"])
    from arviz_base import rcParams

    return str(rcParams["stats.ci_kind"]), float(rcParams["stats.ci_prob"])


@np.errstate(invalid="ignore")  # figures of infinite draws, and R-hat of a constant, are NaN
def summary(draws: xr.Dataset, *, ess: float | None, kind: str, prob: float, round_to: int | str) -> pd.DataFrame:
    """Table of draws: mean, sd, interval, Monte Carlo standard error of the mean, effective draws.

    Without ``ess`` they are chains, and each row has effective draws in bulk and tails and R-hat of its own.
    """
    import arviz_stats  # noqa: F401  (registers the accessor azstats)

    dims, index = list(SAMPLE_DIMS), _index(draws)
    draws = _unnamed(draws)
    label = f"{kind}{prob * 100:g}"
    access = draws.azstats
    bounds = getattr(access, kind)(prob=prob, dim=dims)
    low, high = (bounds.isel(ci_bound=side, drop=True) for side in (0, 1))
    spread = draws.std(dims, ddof=1)
    error = access.mcse(method="mean") if ess is None else spread / math.sqrt(ess)
    columns = {"mean": draws.mean(dims), "sd": spread, f"{label}_lb": low, f"{label}_ub": high, "mcse_mean": error}
    found = rounded(_frame(columns, index), round_to)
    if ess is not None:
        found["ess"] = ess if math.isnan(ess) else int(ess)
        return found
    bulk, tail, r_hat = access.ess(method="bulk"), access.ess(method="tail"), _halves(draws).azstats.rhat()
    more = _frame({"ess_bulk": bulk, "ess_tail": tail, "r_hat": r_hat}, index)
    for name in ("ess_bulk", "ess_tail"):
        found[name] = more[name].fillna(0).astype(int)
    found["r_hat"] = more["r_hat"] if round_to == "none" else more["r_hat"].round(3)
    return found


def _index(draws: xr.Dataset) -> list[str]:
    """Return the labels of all scalars."""
    return [label for values in draws.data_vars.values() for label in entry_labels(values)]


def _unnamed(draws: xr.Dataset) -> xr.Dataset:
    """Return draws as floats whose variables and dimensions have names that no table or method of ArviZ has."""
    names = [*draws.data_vars, *(dim for dim in draws.dims if dim not in SAMPLE_DIMS)]
    numbered = {name: f"_{number}" for number, name in enumerate(names)}
    return draws.map(lambda values: values.astype(float)).rename(numbered)


def _frame(columns: Mapping[str, xr.Dataset], index: Sequence[str]) -> pd.DataFrame:
    """Return a table of figures of all scalars, one row a scalar."""
    import pandas as pd

    found = {}
    for name, part in columns.items():
        found[name] = np.concatenate([values.to_numpy().reshape(-1) for values in part.data_vars.values()])
    return pd.DataFrame(found, index=list(index))


# comparison and chains ------------------------------------------------------------------------------------------------


def effective_draws(series: Tensor) -> float:
    """Return the effective sample size of the mean of a series (chains, draws); that of independent draws at most."""
    from arviz_stats.base import array_stats

    given = series.detach().double().cpu().numpy()
    found = float(array_stats.ess(given, chain_axis=0, draw_axis=1, method="mean"))
    return min(found, given.size) if math.isfinite(found) else float(given.size)


def _halves(draws: xr.Dataset) -> xr.Dataset:
    """Return the two halves of one chain as chains, or several chains as they are."""
    import xarray

    if draws.sizes["chain"] > 1:
        return draws
    half = draws.sizes["draw"] // 2
    halves = [draws.isel(draw=slice(first, first + half)) for first in (0, half)]
    return xarray.concat([part.drop_vars("draw", errors="ignore") for part in halves], dim="chain")


def power_scaling(draws: xr.Dataset, log_prior: Tensor, log_likelihood: Tensor) -> pd.DataFrame:
    """Return the power-scaling sensitivity of each scalar to prior and likelihood, summed (chains, draws) each.

    That of a constant is 0, and so is that to a constant: ArviZ divides 0 by 0, or finds no tail.
    """
    import xarray
    from arviz_stats import psense

    index, draws = _index(draws), _unnamed(draws)
    groups = {"posterior": draws}
    scaled = {"prior": log_prior.double(), "likelihood": log_likelihood.double()}
    for name, values in scaled.items():
        groups[f"log_{name}"] = dataset({"total": values.cpu().numpy()}, {})
    tree = xarray.DataTree.from_dict(groups)
    lowest, highest = draws.min(SAMPLE_DIMS), draws.max(SAMPLE_DIMS)
    found = {}
    for name, values in scaled.items():
        found[name] = xarray.zeros_like(lowest)
        if float(values.max() - values.min()) > 1e-4:  # nats, which change no figure of three digits
            with np.errstate(divide="ignore", invalid="ignore"):
                part = psense(tree, group=name)
            found[name] = getattr(part, "dataset", part).where(lowest < highest, 0.0)
    return _frame(found, index)


# selection ------------------------------------------------------------------------------------------------------------


def select(
    draws: xr.Dataset, var_names: str | Sequence[str] | None, filter_vars: str | None, coords: Coords
) -> xr.Dataset:
    """Choose variables and entries as ArviZ does: by name, ``"~name"``, a part of a name, or a regular expression."""
    import xarray
    from arviz_base import extract

    draws = entries(draws, coords)
    checks.choice("filter_vars", str(filter_vars), ("None", "like", "regex"))
    wanted = [var_names] if isinstance(var_names, str) else None if var_names is None else list(var_names)
    known = [str(name) for name in draws.data_vars]
    if filter_vars is None:
        for name in wanted or ():
            checks.choice("var_names", name if name in known else name.removeprefix("~"), known)
    for pattern in (wanted or ()) if filter_vars == "regex" else ():
        _compiles(pattern)
    tree = xarray.DataTree.from_dict({"posterior": draws})
    choose = cast("Callable[..., xr.Dataset]", extract)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Items starting with ~")  # that nothing is left is said below
        found = choose(tree, var_names=wanted, combined=False, keep_dataset=True, filter_vars=filter_vars)
    if not found.data_vars:
        raise ValueError(f"var_names: expected some of {', '.join(map(repr, known))}, but {var_names!r} leaves none.")
    return found


def _compiles(pattern: str) -> None:
    """Refuse what is no regular expression; a leading ``~`` is ArviZ's own."""
    try:
        re.compile(pattern.removeprefix("~"))
    except re.error as error:
        raise ValueError(
            f"var_names: expected regular expressions, got {pattern!r} ({error}). Write a backslash before "
            "characters that stand for themselves, or pass filter_vars='like'."
        ) from None
