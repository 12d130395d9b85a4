"""Arguments that are no tensors, numpy arrays, pandas tables and lists of numbers, become tensors if need be."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_with_path

from pyro_flows.model.batching import apart
from pyro_flows.model.faults import is_about_dtypes, is_of_a_point
from pyro_flows.model.precision import doubled
from pyro_flows.model.sites import Keywords, Model, Positional, Site, messages
from pyro_flows.model.start import FromPrior
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.process.fallbacks import Tried, first_line
from pyro_flows.support.process.seeding import derive, seeded

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("array", "table", "list", "list of whole numbers")
DRAWS = 3  # of the prior at which a model is tried
REMEDIES = {
    "category": "Use its codes, .cat.codes",
    "times": "Use a number of days, (t - t.min()) / np.timedelta64(1, 'D')",
    "masked values": "Pass y.filled(0), and mark what is missing with obs_mask=~y.mask",
    "a sparse matrix": "Use .toarray()",
    "whole numbers above the range of int64": "Use floating-point numbers",
}
OTHERWISE = "Use pd.to_numeric for digits, pd.factorize(...)[0] for names"


class _NoNumbers(ValueError):
    """An argument that cannot become a tensor."""


def usable(model: Model, args: Positional, kwargs: Keywords | None) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return arguments with which the model runs, with tensors of inference mode, which have no gradients, copied.

    Arrays, tables and lists of numbers stay what they are if the model runs with them. Otherwise as few of
    :data:`KINDS` become tensors as suffice, or all if none of this suffices. Each is tried at draws of the prior, with
    gradients. A ValueError says what is no model: what cannot be called, or a guide.
    """
    if not callable(model):
        raise ValueError(f"model: expected a callable Pyro model, got a {type(model).__name__}.")
    if isinstance(model, AutoGuide):
        raise ValueError(f"model: expected a Pyro model, got the guide {type(model).__name__}. Give its model first.")
    given = tuple(args), dict(kwargs or {})
    if any(isinstance(part, Tensor) and part.is_inference() for part in tree_leaves(given)):
        given = tree_map(lambda part: part.clone() if isinstance(part, Tensor) and part.is_inference() else part, given)
    there = {
        _kind(part)
        for value in (*given[0], *given[1].values())
        for part in tree_leaves(value, is_leaf=_may_become_a_tensor)
    }
    kinds = [kind for kind in KINDS if kind in there]
    if not kinds:
        return given
    failed: Exception | None = None
    refused: _NoNumbers | None = None
    for chosen in itertools.chain(*(itertools.combinations(kinds, count) for count in range(len(kinds) + 1))):
        try:
            found = _converted(model, *given, chosen)
        except _NoNumbers as error:
            refused = error
            continue
        lacking = _error(model, *found)
        if lacking is None:
            return found
        failed = failed or lacking
    assert failed is not None
    if refused is not None:
        raise ValueError(f"{refused} The model does not run with what was given: {first_line(failed)}.") from failed
    return given if isinstance(failed, KeyError) else found


def _kind(value: object) -> str | None:
    """Return the kind of what may become a tensor; None for all else."""
    if isinstance(value, Tensor):
        return None
    if type(value) in (list, tuple):
        if not value or _shape(value) is None:
            return None
        return "list" if any(isinstance(part, float) for part in tree_leaves(value)) else "list of whole numbers"
    if "DataFrame" in _pandas(value):
        return "table"
    return "array" if hasattr(type(value), "__array__") or hasattr(value, "toarray") else None


def _may_become_a_tensor(value: object) -> bool:
    return _kind(value) is not None


def _shape(value: object) -> tuple[int, ...] | None:
    """Return the shape of nested lists of numbers; None if they are of something else, or have different lengths."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        shapes = {_shape(part) for part in value}
        inner = shapes.pop() if len(shapes) == 1 else None
        return None if inner is None else (len(value), *inner)
    whole = isinstance(value, (int, np.integer)) and abs(int(value)) < 2**63
    return () if whole or isinstance(value, (float, np.floating, np.bool_)) else None


def _pandas(value: object) -> set[str]:
    """Return the names of the classes of pandas that a value is of."""
    return {one.__name__ for one in type(value).__mro__ if one.__module__.partition(".")[0] == "pandas"}


def _error(model: Model, args: Positional, kwargs: Keywords, *, double: bool = False) -> Exception | None:
    """Return what stands in the way of a run with gradients; None if it goes through, and observes tensors."""
    found: Exception | None = None
    for number in range(DRAWS):
        drawing = seeded(derive(number, "arguments"))
        with Tried() as tried, apart(), torch.enable_grad(), drawing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _WithGradients(), FromPrior(torch.zeros(())):
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        if tried.error is not None:
            if is_about_dtypes(tried.error):
                # what precisions have to do with it is found out as the model is read
                return None if double else _error(doubled(model), args, kwargs, double=True)
            found = tried.error
            if not is_of_a_point(found):
                break
            continue
        sites = [site for site in messages(trace).values() if site["type"] == "sample" and site["is_observed"]]
        bad = [site for site in sites if not isinstance(site["value"], Tensor)]
        return TypeError(f"site {bad[0]['name']!r}: obs= is a {type(bad[0]['value']).__name__}") if bad else None
    return found


class _WithGradients(Messenger):
    """Let gradients be taken of latents: numbers cannot be handed to numpy then."""

    def _pyro_post_sample(self, msg: Site) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].detach().requires_grad_()


def _converted(
    model: Model, args: tuple[object, ...], kwargs: dict[str, object], kinds: Sequence[str]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return arguments with what is of these kinds as tensors."""

    def converted(name: str, value: object) -> object:
        def tensor(path: tuple[object, ...], part: object) -> object:
            return _tensor(f"argument {name!r}{''.join(map(str, path))}", part) if _kind(part) in kinds else part

        return tree_map_with_path(tensor, value, is_leaf=_may_become_a_tensor) if kinds else value

    positional = tuple(converted(name, value) for name, value in zip(names_of(model, args), args, strict=True))
    return positional, {name: converted(name, value) for name, value in kwargs.items()}


def names_of(model: Model, args: Positional) -> list[str]:
    """Return the names of positional arguments: those of the parameters that they go to, or else their numbers."""
    names = list[str]()
    with suppress(TypeError, ValueError):
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, one in signature_of(model).parameters.items() if one.kind in positional]
    return [*names, *map(str, range(len(args)))][: len(args)]


def _tensor(name: str, value: object) -> Tensor:
    """Return numbers as a tensor of their own: as ``torch.as_tensor`` does, with whole numbers as int64."""
    if isinstance(value, (list, tuple)):
        return torch.tensor(value)
    if "DataFrame" in _pandas(value):
        table = cast("pd.DataFrame", value)
        columns = [_array(f"{name}, column {label!r}", table.iloc[:, at]) for at, label in enumerate(table.columns)]
        return torch.from_numpy(np.stack(columns, axis=1))
    return torch.from_numpy(_array(name, value))


def _array(name: str, value: object) -> np.ndarray:
    """Return numbers as an array of a dtype that torch has, which owns its memory."""
    dtype = getattr(value, "dtype", None)
    plain = getattr(dtype, "numpy_dtype", None)
    if _pandas(value) and _pandas(dtype) and plain is not None:  # those that know of NA
        series = cast("pd.Series", value)
        missing = bool(series.isna().any())
        value = series.to_numpy(dtype=np.float64, na_value=np.nan) if missing else series.to_numpy(plain)
    if hasattr(value, "toarray"):
        raise _refused(name, "a sparse matrix")
    if isinstance(value, np.ma.MaskedArray) and np.ma.getmaskarray(value).any():
        raise _refused(name, "masked values")
    if str(dtype) == "category":
        raise _refused(name, "category")
    array = np.asarray(value)
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biufc":
        raise _refused(name, {"M": "times", "m": "times"}.get(kind, f"values of dtype {dtype or array.dtype}"))
    if kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise _refused(name, "whole numbers above the range of int64")
    wanted = {
        "b": np.bool_,
        "f": np.float32 if size <= 4 else np.float64,
        "c": np.complex64 if size <= 8 else np.complex128,
    }
    return np.array(array, dtype=wanted.get(kind, np.int64), order="C")


def _refused(name: str, what: str) -> _NoNumbers:
    return _NoNumbers(f"{name}: expected numbers, got {what}. {REMEDIES.get(what, OTHERWISE)}.")
