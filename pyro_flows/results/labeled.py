"""The groups of a posterior as its caller labeled them, stored ones or new ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_flows.model.log_density import LogDensity
from pyro_flows.results.arviz_groups import UNDRAWABLE, constants, draws_group, observed_group, stack
from pyro_flows.results.dims import Labels
from pyro_flows.results.record import Record

if TYPE_CHECKING:
    import xarray as xr


class NotThere(ValueError):
    """A posterior has no such draws, for a reason that its caller may know."""


def posterior_group(posterior: Record) -> xr.Dataset:
    """The draws to use, labeled as the caller asked for; of Markov chains one after the other, or as stored."""
    if posterior._stored is not None:
        return posterior._stored[0]["posterior"]
    return named_draws(posterior, posterior.samples, posterior.chain_count)


def named_draws(posterior: Record, samples: Mapping[str, Tensor], chains: int = 1) -> xr.Dataset:
    """Other draws of a posterior's latent and deterministic sites, labeled as its own are."""
    group = draws_group(Labels(posterior._need_model().structure), samples, chains)
    return posterior._labeling.applied({"posterior": group})["posterior"]


def prior_group(posterior: Record) -> xr.Dataset:
    """Draws of the prior of all latent and deterministic sites, labeled as the posterior's."""
    if posterior.density is None and posterior._stored is not None and "prior" in posterior._stored[0]:
        return posterior._stored[0]["prior"]
    density = _density(posterior)
    try:
        prior = density.prior(2000, seed=int(posterior.settings["seed"]))
    except UNDRAWABLE as error:
        raise NotThere(f"posterior: its prior cannot be drawn from ({error}).") from error
    if prior is None:
        raise NotThere("posterior: its prior cannot be drawn from: it is improper, or has factors.")
    names = [*density.names, *(() if density.structure.enumerated else density.structure.deterministic)]
    return named_draws(posterior, {name: prior[name] for name in names})


def _density(posterior: Record) -> LogDensity:
    try:
        return posterior._need_density()
    except ValueError as error:
        raise NotThere(f"posterior: {error}") from None


def predictive_groups(posterior: Record, draws: int) -> tuple[xr.Dataset, xr.Dataset]:
    """The data, and replicates of them at draws to use, which are taken from all chains alike."""
    stored = {} if posterior._stored is None else posterior._stored[0]
    if "posterior_predictive" in stored and "observed_data" in stored:
        found = stored["posterior_predictive"]
        return stored["observed_data"], found.isel(draw=slice(None, None, max(1, found.sizes["draw"] // draws)))
    density = _density(posterior)
    if not density.structure.observed:
        raise NotThere("posterior: the model observes nothing, so there are no data to compare with.")
    chosen = posterior._used[:: max(1, len(posterior._used) // draws)]
    try:
        drawn = density.predictive(chosen, seed=int(posterior.settings["seed"]))
    except UNDRAWABLE as error:
        raise NotThere(f"posterior: the model cannot draw its data ({error}).") from error
    labels = Labels(density.structure)
    groups = {"data": observed_group(density), "replicates": stack(labels, drawn, labels.observed)}
    labeled = posterior._labeling.applied(groups)
    return labeled["data"], labeled["replicates"]


def structural_groups(posterior: Record) -> dict[str, xr.Dataset]:
    """Those groups that have all dimensions which a user may name, and take no evaluation of the model."""
    if posterior._stored is not None:
        return dict(posterior._stored[0])
    density = posterior._need_model()
    draws = draws_group(Labels(density.structure), posterior.samples, posterior.chain_count)
    return {"posterior": draws, "observed_data": observed_group(density), "constant_data": constants(density)}
