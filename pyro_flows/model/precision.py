"""Dtypes: double precision for models that mix it with single or lose digits, and outcomes that torch refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli
from torch.overrides import TorchFunctionMode

from pyro_flows.model.faults import is_about_dtypes
from pyro_flows.model.handlers import within
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Keywords, Model, Positional, Site, Structure, is_subsample, messages
from pyro_flows.model.supports import family
from pyro_flows.support.numbers.tensors import Args, Function, Kwargs
from pyro_flows.support.process.fallbacks import Tried

IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
AS_THEY_ARE = {"__get__", "__set__", "__deepcopy__", "__reduce_ex__"}  # attributes and copies of a tensor

_inside = False  # of in_double, whose handlers are the process's


class LostDigits(Exception):
    """Single precision changes a log density by more than its figures bear, where the posterior lies."""


class _Doubled(TorchFunctionMode):
    """Functions of torch take tensors in a lower precision as double ones, and make none in single precision."""

    def __torch_function__(self, func: Function, types: object, args: Args = (), kwargs: Kwargs = None) -> object:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in AS_THEY_ARE:
            found = func(*args, **kwargs)
            return torch.float64 if found is torch.float32 else found  # modules compare precisions
        func = cast(Function, Tensor.double) if func is Tensor.float else func
        if args and (name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))):
            return func(args[0], *map(_doubled, args[1:]), **{key: _doubled(part) for key, part in kwargs.items()})
        return func(*map(_doubled, args), **{key: _doubled(part) for key, part in kwargs.items()})


def _doubled(part: object) -> object:
    """Return an argument of a function of torch with double precision in the place of lower ones."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() and part.dtype != torch.float64 else part
    if isinstance(part, (list, tuple)) and type(part) in (list, tuple):
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


def doubled(model: Model) -> Model:
    """Return the model, run in double precision."""
    return within(model, in_double)


def read_in_double(model: Model, args: Positional, kwargs: Keywords, like: Structure | None = None) -> Structure:
    """Read the structure of a model that runs in double precision, and score its sites once."""
    with in_double():
        found = read_structure(model, args, kwargs, like=like)
        with torch.no_grad():
            for site in messages(found.trace).values():  # densities are scored when the model has run
                if site["type"] == "sample" and not (is_subsample(site) or is_refused(site)):
                    site["fn"].log_prob(site["value"])
    return found


def read_in_one_precision(
    model: Model, args: Positional, kwargs: Keywords, like: Structure | None = None
) -> tuple[Structure, bool]:
    """Read the structure of a model, and say whether it is to run in double precision.

    ``dist.Gamma(2.0, 1.0)`` is in single precision, torch's default. With data in double, a model rounds in the middle:
    torch's Gamma and half-Cauchy densities have the precision of their parameters. Where a latent is in single and data
    are in double, the model runs in double precision, if it can. So does one that ends in an error about precisions
    otherwise.
    """
    failed: RuntimeError | None = None
    try:
        structure = read_structure(model, args, kwargs, like=like)
        if not _mixes(structure):
            return structure, False
    except RuntimeError as error:
        if not is_about_dtypes(error):
            raise
        failed = error
    with Tried() as tried:
        return read_in_double(model, args, kwargs, like), True
    if failed is not None and tried.error is not None:
        raise (failed if is_about_dtypes(tried.error) else tried.error) from None
    return structure, False


def _mixes(structure: Structure) -> bool:
    """Whether latents are in torch's default precision, and others, data or densities of data, in double."""
    if torch.get_default_dtype() == torch.float64:
        return False
    nodes = messages(structure.trace)
    if not any(nodes[latent.name]["value"].dtype == torch.float32 for latent in structure.latents):
        return False
    return structure.dtype == torch.float64 or any(_is_double(nodes[name]) for name in structure.observed)


def _is_double(site: Site) -> bool:
    """Whether the density of observed values is in double: counts have no precision, columns beside them do."""
    with torch.no_grad(), Tried():  # the first run tells of errors
        return bool(site["fn"].log_prob(site["value"]).dtype == torch.float64)
    return False


# outcomes that torch refuses: truth values, and whole numbers as those of a Bernoulli ---------------------------------


def is_refused(site: Site) -> bool:
    """Whether the density of a site refuses its observed values."""
    value = site["value"]
    if not site["is_observed"] or not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return value.dtype == torch.bool or isinstance(family(site["fn"]), Bernoulli)


def in_floats(model: Model, names: frozenset[str]) -> Model:
    """Return the model with observed values of these sites in the precision of their distributions."""
    return within(model, lambda: _Floats(names))


class _Floats(Messenger):
    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self.names and is_refused(msg):
            own = (value.dtype for value in vars(family(msg["fn"])).values() if isinstance(value, Tensor))
            dtype = next((dtype for dtype in own if dtype.is_floating_point), torch.get_default_dtype())
            msg["value"] = msg["value"].to(dtype)
