"""Observed outcomes that torch refuses: truth values, and whole numbers as those of a Bernoulli."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli

from pyro_flows.model.sites import Structure, messages
from pyro_flows.model.supports import WRAPPERS


def refused_sites(structure: Structure) -> frozenset[str]:
    """Return the names of observed sites whose density refuses their values."""
    return frozenset(name for name in structure.observed if is_refused(messages(structure.trace)[name]))


def is_refused(site: Any) -> bool:
    """Whether the density of a site refuses its observed values."""
    value = site["value"]
    if not site["is_observed"] or not isinstance(value, Tensor) or value.is_floating_point():
        return False
    return value.dtype == torch.bool or isinstance(_family(site), Bernoulli)


def _family(site: Any) -> Any:
    fn = site["fn"]
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def in_floats(model: Callable[..., Any], names: frozenset[str]) -> Callable[..., Any]:
    """Return the model with observed values of these sites as floating-point numbers."""

    @functools.wraps(model, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Floats(names):
            return model(*args, **kwargs)

    return run


class _Floats(Messenger):
    """Give observed values of these sites the precision of their distributions."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and is_refused(msg):
            own = (value.dtype for value in vars(_family(msg)).values() if isinstance(value, Tensor))
            dtype = next((dtype for dtype in own if dtype.is_floating_point), torch.get_default_dtype())
            msg["value"] = msg["value"].to(dtype)
