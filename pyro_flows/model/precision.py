"""Double precision: models that mix it with single, and models of which single precision loses the digits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_flows.model.faults import is_about_dtypes
from pyro_flows.model.outcomes import is_refused
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Structure, messages

IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
AS_THEY_ARE = {"__get__", "__set__", "__deepcopy__", "__reduce_ex__"}  # attributes and copies of a tensor

_inside = False  # of in_double, whose handlers are the process's


class LostDigits(Exception):
    """Single precision changes a log density by more than its figures bear, where the posterior lies."""


class _Doubled(TorchFunctionMode):
    """Functions of torch take tensors in a lower precision as double ones, and make none in single precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in AS_THEY_ARE:
            found = func(*args, **kwargs)
            return torch.float64 if found is torch.float32 else found  # modules compare precisions
        func = Tensor.double if func is Tensor.float else func
        if args and (name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))):
            return func(args[0], *map(_doubled, args[1:]), **{key: _doubled(part) for key, part in kwargs.items()})
        return func(*map(_doubled, args), **{key: _doubled(part) for key, part in kwargs.items()})


def _doubled(part: Any) -> Any:
    """Return an argument of a function of torch with double precision in the place of lower ones."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() and part.dtype != torch.float64 else part
    if type(part) in (list, tuple):
        return type(part)(map(_doubled, part))
    return torch.float64 if part is torch.float32 else part


@contextmanager
def in_double() -> Iterator[None]:
    """Compute in double precision inside: torch's default, and what tensors in single precision are read as.

    So a model does that was written for single precision: its data, parameters and modules stay as they are.
    """
    global _inside
    if _inside:
        yield
        return
    before, _inside = torch.get_default_dtype(), True
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(before)
        _inside = False


def doubled(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model, run in double precision."""

    @functools.wraps(model, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with in_double():
            return model(*args, **kwargs)

    return run


def read_in_double(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Structure:
    """Read the structure of a model that runs in double precision, and score its sites once.

    Raises:
        Exception: what the model's own code raises in that precision.
    """
    with in_double():
        found = read_structure(model, args, kwargs)
        with torch.no_grad():
            for site in messages(found.trace).values():  # densities are scored when the model has run
                if site["type"] == "sample" and not (site_is_subsample(site) or is_refused(site)):
                    site["fn"].log_prob(site["value"])
    return found


def read_in_one_precision(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Structure, bool]:
    """Read the structure of a model, and say whether it is to run in double precision.

    ``dist.Gamma(2.0, 1.0)`` is in single precision, torch's default. With data in double, a model rounds in the middle:
    torch's Gamma and half-Cauchy densities have the precision of their parameters. Where a latent is in single and data
    are in double, the model runs in double precision, if it can. So does one that ends in an error about precisions
    otherwise.

    Raises:
        ValueError, RuntimeError: as :func:`read_structure`.
    """
    failed: RuntimeError | None = None
    try:
        structure = read_structure(model, args, kwargs)
        if not _mixes(structure):
            return structure, False
    except RuntimeError as error:
        if not is_about_dtypes(error):
            raise
        failed = error
    try:
        return read_in_double(model, args, kwargs), True
    except Exception as error:  # a model's own code may raise anything
        if failed is not None:
            raise (failed if is_about_dtypes(error) else error) from None
    return structure, False


def _mixes(structure: Structure) -> bool:
    """Whether latents are in torch's default precision, and others, data or densities of data, in double."""
    if torch.get_default_dtype() == torch.float64:
        return False
    nodes = messages(structure.trace)
    if not any(nodes[latent.name]["value"].dtype == torch.float32 for latent in structure.latents):
        return False
    return structure.dtype == torch.float64 or any(_is_double(nodes[name]) for name in structure.observed)


def _is_double(site: Any) -> bool:
    """Whether the density of observed values is in double: counts have no precision, columns beside them do."""
    with torch.no_grad(), suppress(Exception):  # a distribution's own code may raise anything; the first run tells
        return bool(site["fn"].log_prob(site["value"]).dtype == torch.float64)
    return False
