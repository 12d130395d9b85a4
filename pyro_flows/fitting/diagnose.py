"""The verdict for any Pyro guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._fallbacks import fallback
from pyro_flows._seeding import seeded
from pyro_flows._turns import alone
from pyro_flows.fitting.mcmc import from_mcmc
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.batching import over_rows, quiet, usable
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.sites import Noncentered, messages
from pyro_flows.posterior.draws import from_draws
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.results.scoring import MAX_DRAWS
from pyro_flows.verdict.deciding import Draw

LOG_Q = " log q"  # beside the sites' values
ROUND_TRIP = 1e-3
NO_DENSITY = "a point-mass guide such as AutoDelta has no density, so it cannot be weighed against the posterior"


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> Posterior:
    r"""Judge any Pyro guide as :func:`fit` judges its own: draws, weights, verdict, ArviZ.

    Draws :math:`\theta \sim q` are weighted by :math:`\tilde p(\theta) / q(\theta)`, in unconstrained coordinates
    :math:`\log q(z) = \log q(\theta) + \log |d\theta / dz|`. The guide is taken as it is, trained or not; one that has
    never run is run once, which makes its parameters. Draws come from ``get_posterior`` of continuous autoguides, else
    from running the guide.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, function or module, over all its continuous latent sites. Auxiliary sites are
            allowed where the latent sites are a one-to-one function of them, as in Pyro's autoguides. A ``MCMC`` that
            has run is judged by :func:`from_mcmc`.
        args: positional arguments of both (the data).
        model_kwargs: keyword arguments of both.
        draws: how many draws to judge and keep, 100 at least.
        seed: the same seed gives the same result; Pyro's and torch's own random state is left as it was. Calls from
            several threads take turns, as those of :func:`fit` do.

    Returns:
        A :class:`Posterior`; read its ``verdict`` first.

    Cost: four times ``draws`` evaluations of model and guide, and a search for missed modes: a second or two for small
    models.

    Source of k-hat: Vehtari et al. 2024 (arXiv 1507.02646).

    Raises:
        ValueError: for guides without a density (``AutoDelta``, an ``AutoLaplaceApproximation`` that is not finished),
            that lack latent sites of the model, have other ones, or hide their density behind auxiliary sites.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
    >>> def guide(y):
    ...     pyro.sample("x", dist.Normal(y / 2, 0.71))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=1000)
    >>> posterior.verdict.status, posterior.samples["x"].shape
    ('ok', torch.Size([1000]))
    """
    chains: Any = guide
    if isinstance(chains, MCMC):
        return from_mcmc(chains, model, *args, model_kwargs=model_kwargs, seed=seed)
    _checks.integer("draws", draws, 100, MAX_DRAWS)
    with alone():
        return _diagnose(model, guide, usable(args), usable(dict(model_kwargs or {})), draws, seed)


def _diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    draws: int,
    seed: int,
) -> Posterior:
    noncentered: Noncentered = ()
    if isinstance(guide, AutoFlow):
        with seeded(seed):
            noncentered = guide.initialize(*args, **kwargs)._built_structure.noncentered
    density = LogDensity(model, args, kwargs, noncentered=noncentered)
    warn_if_nothing_observed(density.structure, density.trace_at, model, args, kwargs)
    with torch.no_grad(), seeded(seed, density.device):
        trace = _run(guide, args, kwargs)  # makes the parameters of a guide that has never run
    with torch.no_grad(), seeded(seed, density.device):
        if _same_coordinates(guide, density):
            draw = _from_distribution(guide, density, args, kwargs)
        else:
            _check_sites(guide, trace, density)
            draw = _from_traces(guide, density, args, kwargs)
        settings = {"diagnosed": True}
        return from_draws(density, draw, draws=draws, seed=seed, guide=guide, losses=torch.zeros(0), settings=settings)


def _run(guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> poutine.Trace:
    with poutine.block(hide_fn=lambda msg: msg["type"] == "sample"):
        return poutine.trace(guide).get_trace(*args, **kwargs)


# continuous autoguides ------------------------------------------------------------------------------------------------


def _same_coordinates(guide: Any, density: LogDensity) -> bool:
    """Whether the guide's unconstrained vector is ours: same sites, sizes, and fixed bijections."""
    if not isinstance(guide, AutoContinuous) or guide.master is not None:
        return False
    ours = {latent.name: latent.size for latent in density.structure.latents}
    if isinstance(guide, AutoFlow):
        return ours == {latent.name: latent.size for latent in guide._built_structure.latents}
    theirs = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    return list(ours.items()) == list(theirs.items()) and not density.structure.dependent


def _from_distribution(guide: Any, density: LogDensity, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Draw:
    if isinstance(guide, AutoLaplaceApproximation):
        raise ValueError(
            "guide: an AutoLaplaceApproximation is a point until it is finished; "
            "pass the guide that guide.laplace_approximation(*args) returns."
        )

    def draw(count: int) -> tuple[Tensor, Tensor]:
        with quiet():
            posterior = guide.get_posterior(*args, **kwargs)
            z = posterior.rsample((count,))
            log_q = posterior.log_prob(z)
        return z.to(density.dtype), log_q.to(density.dtype)

    return draw


# any other guide ------------------------------------------------------------------------------------------------------


def _random_sites(trace: poutine.Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in messages(trace).items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }


def _check_sites(guide: Any, trace: poutine.Trace, density: LogDensity) -> None:
    """Check that the guide's density is one of the model's latents alone, and of all of them."""
    sites = _random_sites(trace)
    auxiliary = {name for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    lacking = [name for name in density.names if name not in sites]
    extra = [name for name in sites if name not in density.names and name not in auxiliary]
    if lacking or extra:
        found = [f"none for {', '.join(map(repr, lacking))}"] if lacking else []
        found += [f"others: {', '.join(map(repr, extra))}"] if extra else []
        raise ValueError(
            f"guide: expected the model's latent sites {', '.join(map(repr, density.names))} "
            f"(and others only with infer={{'is_auxiliary': True}}), got {'; '.join(found)}."
        )
    for latent in density.structure.latents:
        if sites[latent.name]["value"].shape != latent.shape:
            got = tuple(sites[latent.name]["value"].shape)
            raise ValueError(f"guide: site {latent.name!r} has shape {got}, in the model {tuple(latent.shape)}.")
    points = [latent for latent in density.structure.latents if isinstance(_innermost(sites[latent.name]["fn"]), Delta)]
    own = sum(
        sites[name]["value"].numel() for name in auxiliary if not isinstance(_innermost(sites[name]["fn"]), Delta)
    )
    needed = sum(latent.size for latent in points)
    if own < needed:
        names = ", ".join(repr(latent.name) for latent in points)
        raise ValueError(f"guide: {NO_DENSITY}. Point masses are at {names}.")
    if own > needed:
        masked = ", ".join(repr(latent.name) for latent in density.structure.latents if latent.free is not None)
        hint = (
            f" The model masks entries of {masked}; a flow guide such as AutoRealNVP leaves these out."
            if masked
            else ""
        )
        raise ValueError(
            f"guide: its auxiliary sites have {own} coordinates, the latent sites made from them {needed}, so the "
            f"density of the latent sites alone is not known. Use a guide without extra randomness.{hint}"
        )


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn


def _from_traces(
    guide: Callable[..., Any], density: LogDensity, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Draw:
    masks = {latent.name: latent.mask for latent in density.structure.latents if latent.mask is not None}

    def one(_: Tensor) -> dict[str, Tensor]:
        trace = _run(guide, args, kwargs)
        values = {name: messages(trace)[name]["value"] for name in density.names}
        return {**values, LOG_Q: _log_density(trace, masks)}

    def draw(count: int) -> tuple[Tensor, Tensor]:
        with quiet():
            values = over_rows(
                one, torch.zeros(count), randomness="different", otherwise=partial(fallback, "drawn one by one")
            )
        log_q = values.pop(LOG_Q)
        z = density.unconstrain(values)
        log_q = log_q + density.log_jacobian(z)
        return z, torch.where(_placed_back(density, z, values), log_q, torch.inf).to(density.dtype)

    return draw


def _placed_back(density: LogDensity, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Whether each of the values (S, ...) is what its coordinates stand for: no, if it lies outside of the support."""
    back, inside = density.constrain(z), torch.ones(len(z), dtype=torch.bool, device=z.device)
    for latent in density.structure.latents:
        value = values[latent.name].to(back[latent.name])
        close = torch.isclose(back[latent.name], value, rtol=ROUND_TRIP, atol=ROUND_TRIP**2)
        if latent.mask is not None:
            close = close[:, latent.mask]
        inside &= close.reshape(len(z), -1).all(1)
    return inside


def _log_density(trace: poutine.Trace, masks: Mapping[str, Tensor]) -> Tensor:
    """Sum the log densities of all random sites and factors; entries that the model masks out count for nothing."""
    total = torch.zeros(())
    for name, site in messages(trace).items():
        counts = site["type"] == "sample" and (not site["is_observed"] or isinstance(site["fn"], Unit))
        if counts and not site_is_subsample(site):
            density = site["fn"].log_prob(site["value"])
            for mask in (site["mask"], masks.get(name)):
                density = density if mask is None else torch.where(torch.as_tensor(mask), density, 0.0)
            total = total + density.sum()
    return total
