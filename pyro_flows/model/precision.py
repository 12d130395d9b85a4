"""Models whose data are in double precision, and whose own numbers are in single."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample

from pyro_flows.model.faults import is_about_dtypes
from pyro_flows.model.reading import read_structure
from pyro_flows.model.sites import Structure, messages


def read_in_one_precision(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Structure, Callable[..., Any]]:
    """Read the structure of a model, and return it with the model, or with the model in double precision.

    ``dist.Gamma(2.0, 1.0)`` is in single precision, torch's default. With data in double, a model rounds in the middle:
    torch's Gamma and half-Cauchy densities have the precision of their parameters. Where a latent is in single and data
    are in double, the model runs with double precision as torch's default, if it can. So does one that ends in an error
    about precisions otherwise.

    Raises:
        ValueError, RuntimeError: as :func:`read_structure`.
    """
    failed: RuntimeError | None = None
    try:
        structure = read_structure(model, args, kwargs)
        if not _mixes(structure):
            return structure, model
    except RuntimeError as error:
        if not is_about_dtypes(error):
            raise
        failed = error
    double = _in_double(model)
    try:
        found = read_structure(double, args, kwargs)
        with torch.no_grad():
            for site in messages(found.trace).values():  # densities are scored when the model has run
                if site["type"] == "sample" and not site_is_subsample(site):
                    site["fn"].log_prob(site["value"])
        return found, double
    except Exception:  # a model's own code may raise anything
        if failed is not None:
            raise failed from None
    return structure, model


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


def _in_double(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model with double precision as torch's default while it runs."""

    @functools.wraps(model, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return model(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)

    return run
