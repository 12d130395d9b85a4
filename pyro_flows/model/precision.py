"""Models whose data are in double precision, and whose own numbers are in single."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pyro_flows.model.reading import is_about_dtypes, read_structure
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
        return read_structure(double, args, kwargs), double
    except RuntimeError:
        if failed is not None:
            raise failed from None
    return structure, model


def _mixes(structure: Structure) -> bool:
    """Whether latents are in torch's default precision, and others, or data, in double."""
    if structure.dtype != torch.float64 or torch.get_default_dtype() == torch.float64:
        return False
    nodes = messages(structure.trace)
    return any(nodes[latent.name]["value"].dtype == torch.float32 for latent in structure.latents)


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
