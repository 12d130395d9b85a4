"""From a posterior to labeled arrays: what goes into which group of the ArviZ object, and its draws as labeled."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_flows.inference.record import Record
from pyro_flows.model.batching import apart
from pyro_flows.model.dims import Labels, Layout
from pyro_flows.model.handlers import Place, Resample
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import Keywords, Latent, Placed, Positional, is_data, is_deterministic, messages
from pyro_flows.support import arviz
from pyro_flows.support.arguments import signature_of
from pyro_flows.support.numbers import arrays
from pyro_flows.support.process.seeding import derive, seeded

if TYPE_CHECKING:
    import xarray as xr


UNDRAWABLE = (NotImplementedError, RuntimeError, ValueError)  # from distributions that have no sampler
SAMPLER_STATS = ("acceptance_rate", "diverging", "energy", "energy_error", "n_steps", "step_size")
FIGURES = ("chains", "draws", "r_hat", "ess_bulk", "ess_tail", "where", "divergences")  # of another sampler's chains

logger = logging.getLogger("pyro_flows")


def stack(labels: Labels, values: Mapping[str, Tensor], layout: Callable[[str], Layout], chains: int = 1) -> xr.Dataset:
    """Make a group of draws ``{site: (S, *shape)}``, one chain after the other."""
    layouts = {name: layout(name) for name in values}
    named = {labels.variable(name): _in_chains(layouts[name](value), chains) for name, value in values.items()}
    return _labeled(labels, named, layouts, arrays.SAMPLE_DIMS)


def _in_chains(values: np.ndarray, chains: int) -> np.ndarray:
    return values.reshape(chains, len(values) // chains, *values.shape[1:])


def _labeled(
    labels: Labels, named: Mapping[str, np.ndarray], layouts: Mapping[str, Layout], sample_dims: Sequence[str]
) -> xr.Dataset:
    dims = {labels.variable(name): layout.dims for name, layout in layouts.items()}
    coords = {dim: entries for layout in layouts.values() for dim, entries in layout.coords.items()}
    return arviz.dataset(named, dims, coords=coords, sample_dims=sample_dims)


def draws_group(labels: Labels, samples: Mapping[str, Tensor], chains: int = 1) -> xr.Dataset:
    """Latent and deterministic sites as labeled arrays."""
    latents = {latent.name: latent for latent in labels.structure.latents}

    def layout(name: str) -> Layout:
        return labels.latent(latents[name]) if name in latents else labels.deterministic(name)

    return stack(labels, samples, layout, chains)


def observed_group(density: LogDensity) -> xr.Dataset:
    """The data, those that masks leave out excepted."""
    labels = Labels(density.structure)
    layouts = {name: labels.observed(name) for name in density.structure.observed}
    data = {labels.variable(name): layout(labels.data(name)[None])[0] for name, layout in layouts.items()}
    return _labeled(labels, data, layouts, ())


def likelihood_group(density: LogDensity, z: Tensor, chains: int = 1) -> xr.Dataset:
    """The pointwise log likelihood at draws z (S, D), in double precision, without what masks leave out."""
    labels = Labels(density.structure)
    values = _double(density.log_likelihood(z))
    return stack(labels, values, lambda name: labels.observed(name).without_event(), chains)


def rows_group(density: LogDensity, z: Tensor) -> xr.Dataset:
    """The log likelihoods of rows at draws z (S, D), their latents integrated out; one variable for each plate."""
    named = {plate: _in_chains(own.cpu().numpy(), 1) for plate, own in density.row_likelihoods(z).items()}
    dims = {plate: (f"{plate}_dim",) for plate in named}
    return arviz.dataset(named, dims, coords={}, sample_dims=arrays.SAMPLE_DIMS)


def likelihood_entry(density: LogDensity, variable: str, entry: int) -> Callable[[Tensor], Tensor]:
    """The log likelihood (S,) of one entry of :func:`likelihood_group` as a function of z (S, D)."""
    labels = Labels(density.structure)
    site = next(name for name in density.structure.observed if labels.variable(name) == variable)
    layout = labels.observed(site).without_event()
    return lambda z: torch.as_tensor(layout(density.log_likelihood(z)[site])).double().reshape(len(z), -1)[:, entry]


def all_groups(posterior: Record, density: LogDensity, *, predictive: bool, runs: bool = True) -> dict[str, xr.Dataset]:
    """All groups of the ArviZ object, in its usual order; without ``runs``, those that take neither model nor data."""
    labels = Labels(density.structure)
    latents = {latent.name: latent for latent in density.structure.latents}
    chains, used = posterior.chain_count, posterior._used
    groups = {"posterior": draws_group(labels, posterior.samples, chains), "sample_stats": _used_stats(posterior)}
    if runs:
        prior = _double(density.log_prior(used))
        groups["log_likelihood"] = likelihood_group(density, used, chains)
        groups["log_prior"] = stack(labels, prior, lambda name: labels.latent(latents[name]).without_event(), chains)
        groups |= _predictive(labels, density, used, int(posterior.settings["seed"]), chains) if predictive else {}
        groups |= {"observed_data": observed_group(density), "constant_data": constants(density)}
    cut = {name: used[:, latent.offset : latent.offset + latent.size] for name, latent in latents.items()}
    for name, latent in latents.items():
        if latent.free is None:
            cut[name] = cut[name].reshape(len(used), *latent.unconstrained_shape)
    groups["unconstrained_posterior"] = stack(labels, cut, lambda name: labels.unconstrained(latents[name]), chains)
    if posterior._replaced:
        if runs:
            groups["raw_posterior"] = draws_group(labels, density.constrain(posterior.z))
        groups["raw_sample_stats"] = _stats(posterior.log_p, posterior.log_q, posterior.log_weights)
    groups["fit"] = _fit(posterior)
    return {name: group for name, group in groups.items() if group.data_vars}


def _double(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


def _used_stats(posterior: Record) -> xr.Dataset:
    r"""The numbers of the draws to use; those of a sampler have more of them.

    ``log_q`` is the log density of what the draws come from, for importance ratios that other tools form. That is the
    guide, or, of draws that were resampled or are a sampler's, the posterior itself, :math:`\tilde p(z) / Z` with the
    estimated evidence Z: their ratios are constant, so that no tool weights them a second time.
    """
    if posterior._of_mcmc and posterior.chains is not None:
        log_p = posterior._used_log_p.double().reshape(posterior.chain_count, -1)
        of_mcmc = {"lp": log_p, **posterior.chains.stats}
        return arviz.dataset({name: value.cpu().numpy() for name, value in of_mcmc.items()}, {})
    log_p, log_q = posterior._used_log_p, posterior._used_log_q
    log_q = log_p.double() - posterior.log_evidence if posterior._replaced else log_q
    own = {}
    if posterior.verdict.status == "refined" and posterior.chains is not None:
        own = {name: posterior.chains.stats[name].flatten() for name in SAMPLER_STATS}
    return _stats(log_p, log_q, posterior._used_log_weights, chains=posterior.chain_count, **own)


def _stats(log_p: Tensor, log_q: Tensor, log_weights: Tensor, *, chains: int = 1, **more: Tensor) -> xr.Dataset:
    values = _double({"lp": log_p, "log_p": log_p, "log_q": log_q, "log_weight": log_weights}) | more
    return arviz.dataset({name: _in_chains(value.cpu().numpy(), chains) for name, value in values.items()}, {})


def _predictive(labels: Labels, density: LogDensity, z: Tensor, seed: int, chains: int = 1) -> dict[str, xr.Dataset]:
    """Draws of the data and the prior; what a model cannot draw is left out, with a note in the log."""
    structure, groups = density.structure, {}
    try:
        groups["posterior_predictive"] = stack(labels, density.predictive(z, seed=seed), labels.observed, chains)
    except UNDRAWABLE as error:
        logger.warning("no posterior_predictive: %s: %s", type(error).__name__, error)
    try:
        prior = density.prior(500, seed=seed)
    except UNDRAWABLE as error:
        logger.warning("no prior: %s: %s", type(error).__name__, error)
        return groups
    if prior is not None:
        names = [*density.names, *(() if structure.enumerated else structure.deterministic)]
        groups["prior"] = draws_group(labels, {name: prior[name] for name in names})
        data = {name: prior[name] for name in structure.observed}
        groups["prior_predictive"] = stack(labels, data, labels.observed)
    return groups


class _CarryOver(Place):
    """Give the fit's latents the values that they have there in a run on other data, if they still have their shapes.

    Coordinates would not do: what they stand for may depend on the data, by way of a support, a location or a scale.
    """

    def __init__(self, latents: Sequence[Latent], z: Tensor, values: Mapping[str, Placed]) -> None:
        super().__init__(latents, z)
        self.values = values

    def _place(self, latent: Latent, fn: TorchDistribution) -> Placed:
        if fn.shape() != latent.shape:
            raise ValueError(
                f"site {latent.name!r}: shape {tuple(latent.shape)} in the fit, {tuple(fn.shape())} with these "
                "arguments. Only sites that do not grow with the data can be carried over."
            )
        return self.values[latent.name]._replace(prior=fn)


def predict(density: LogDensity, z: Tensor, args: Positional, kwargs: Keywords, *, seed: int) -> dict[str, Tensor]:
    """Run the model on other arguments with its latents at ``z`` (S, D); return all other sites, drawn anew."""
    structure = density.structure

    def run(row: Tensor) -> poutine.Trace:
        values = density.placed(row)
        with apart(), density.writing(row), _CarryOver(structure.latents, row, values):
            return poutine.trace(Resample()(density.model)).get_trace(*args, **kwargs)

    with torch.no_grad(), seeded(derive(seed, "posterior predictive"), density.device):
        nodes = messages(run(z[0]))
        for name in density.names:
            if name not in nodes or nodes[name]["is_observed"]:
                raise ValueError(f"site {name!r}: a latent of the fit, but not one of the model with these arguments.")
        wanted = [
            name
            for name, site in nodes.items()
            if name not in density.names and site["type"] == "sample"
            if is_data(site) or is_deterministic(site)
        ]

        def draw(row: Tensor) -> dict[str, Tensor]:
            found = messages(run(row))
            return {name: found[name]["value"] for name in wanted}

        return density.map(draw, z, randomness="different")


def constants(density: LogDensity) -> xr.Dataset:
    """The model's tensor arguments that are not observed themselves."""
    try:
        arguments = signature_of(density.model).bind(*density.args, **density.kwargs).arguments
    except (TypeError, ValueError):
        arguments = {}
    observed = list(density.structure.observed.values())
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not any(value.shape == y.shape and torch.equal(value, y) for y in observed):
            found[name] = value.detach().cpu().numpy()
    dims = {name: [f"{name}_dim_{axis}" for axis in range(value.ndim)] for name, value in found.items()}
    return arviz.dataset(found, dims, sample_dims=())


def _fit(posterior: Record) -> xr.Dataset:
    values: dict[str, np.ndarray] = {"status": np.array(posterior.verdict.status)}
    if posterior._of_mcmc:
        figures = {name: np.array(getattr(posterior.verdict.chains, name)) for name in FIGURES}
        return arviz.dataset(values | figures, {}, sample_dims=())
    known = ("k_hat", "ess", *(("log_evidence",) if posterior.verdict.supports_evidence else ()))
    values |= {name: np.array(getattr(posterior, name)) for name in known}
    if not math.isnan(posterior.seconds):
        values["seconds"] = np.array(posterior.seconds)
    if len(posterior.losses):
        values["elbo"] = -posterior.losses.detach().double().cpu().numpy()
    return arviz.dataset(values, {"elbo": ["step"]}, sample_dims=())


# as the caller labeled them, stored ones or new ones ------------------------------------------------------------------


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
