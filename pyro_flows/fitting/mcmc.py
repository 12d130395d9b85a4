"""Draws of another sampler, such as Pyro's MCMC, as a posterior with a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_flows import _checks
from pyro_flows._turns import alone
from pyro_flows.model.arguments import usable
from pyro_flows.model.digits import ALLOWED
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.model.unchanged import own
from pyro_flows.posterior.posterior import Posterior
from pyro_flows.results.dims import coordinate_names
from pyro_flows.results.scoring import beyond_priors, infinite_places
from pyro_flows.verdict.chains import McmcDraws
from pyro_flows.verdict.mcmc import judge_mcmc

NO_GUIDE = "the draws are Markov chains, no guide was fitted"


@_checks.options
def from_mcmc(
    mcmc: object, model: Callable[..., object], *args: object, model_kwargs: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Posterior:  # fmt: skip
    r"""Judge the output of Pyro's ``MCMC``, and hand it over to ArviZ as a fit's.

    ``ok`` takes rank-normalized split R-hat below 1.01 in all unconstrained coordinates, at least 400 effective draws
    (bulk and tail), finite log densities, divergences in at most one draw of a thousand, and no mass lost where
    rounding, in the precision of the model, puts draws onto a bound. The many short chains of
    :meth:`Posterior.refine` may have 1.05: of N draws with autocorrelation time t, R-hat is about
    :math:`\sqrt{1 + (t - 1) / N}`, converged or not, and they are held to nested R-hat, which other chains have not.

    Args:
        mcmc: a ``pyro.infer.MCMC`` that has run; or draws of all latent sites, constrained,
            ``{name: (chains, draws, *shape)}``, from whatever sampler.
        model: the model that was sampled.
        args: its positional arguments (the data).
        model_kwargs: its keyword arguments.
        seed: of later predictive draws.

    Returns:
        A :class:`Posterior` whose ``samples`` are the chains, one after the other. ``chains`` holds them apart, with
        ``diverging`` in ``chains.stats`` where the sampler tells. ``summary`` has R-hat and effective sample sizes,
        ``to_arviz`` the dimensions (chain, draw), ``verdict.chains`` the figures. ``evidence`` is by bridge sampling.
        What belongs to a guide (``log_q``, ``k_hat``, ``ess``, ``elbo``, ``log_evidence``) is NaN; ``guide`` and
        ``flow`` are None.

    Raises:
        ValueError: naming the site, for one that was not sampled or has another shape in the model; for fewer than ten
            draws a chain; and for models that :class:`LogDensity` refuses.

    Cost: one evaluation of the model a draw.

    Reference: Vehtari et al. 2021, *Rank-normalization, folding, and localization: an improved R-hat*
    (arXiv 1903.08008).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> from pyro.infer import MCMC, NUTS
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> mcmc = MCMC(NUTS(model), num_samples=100, warmup_steps=50, disable_progbar=True)
    >>> mcmc.run(torch.tensor(1.3))
    >>> chains = pf.from_mcmc(mcmc, model, torch.tensor(1.3))
    >>> chains.samples["mu"].shape, chains.verdict.status  # a hundred draws are too few
    (torch.Size([100]), 'unreliable')
    """
    with alone():
        args, kwargs = usable(model, *own(args, model_kwargs))
        density = LogDensity(model, args, kwargs)
        warn_if_nothing_observed(density.structure, density.trace_at, model, args, kwargs)
        draws, diverging, sampler = _read(mcmc)
        values, count = _flat(draws, density)
        with torch.no_grad():
            z = density.unconstrain(values)
            single = any(part.dtype == torch.float32 for part in values.values())  # so the sampler has lost digits
            failures, rounded = _on_bounds(density, z) if single else [], list[str]()
            if not density.rounding(z) <= ALLOWED:
                if single:
                    lost, rounded = density.lost_digits(z)
                    failures += lost
                density = density.in_double()
                z = density.unconstrain(values)
            failures += [] if single else _on_bounds(density, z)
            log_p, samples = density(z), density.constrain(z)
    failures = [*failures, *infinite_places(density, z, log_p)]
    failures += beyond_priors(density, z, torch.zeros_like(log_p))
    names = coordinate_names(density.structure)
    stats = {} if diverging is None else {"diverging": diverging.to(z.device)}
    chains = McmcDraws(z.reshape(count, -1, density.dim), stats, {}, {"method": "mcmc"})
    verdict = judge_mcmc(chains.z, log_p.reshape(count, -1), names, diverging)
    verdict = replace(verdict, reasons=(*failures, *verdict.reasons), notes=(*rounded, *verdict.notes))
    verdict = replace(verdict, status="unreliable") if failures else verdict
    nothing = torch.full_like(log_p, math.nan)
    return Posterior(
        samples=samples,
        z=z,
        log_p=log_p,
        log_q=nothing,
        log_weights=torch.full_like(log_p, -math.log(len(z))),
        _used=z,
        _used_log_p=log_p,
        _used_log_q=nothing,
        k_hat=math.nan,
        ess=math.nan,
        elbo=math.nan,
        log_evidence=math.nan,
        verdict=verdict,
        losses=torch.zeros(0),
        history=(),
        settings={"draws": len(z), "chains": count, "seed": seed, "noncentered": density.structure.noncentered},
        coordinates=tuple(names),
        guide=None,
        guide_name=sampler,
        flow=None,
        density=density,
        missing={"guide": NO_GUIDE, "flow": NO_GUIDE},
        chains=chains,
    )


def _on_bounds(density: LogDensity, z: Tensor) -> list[str]:
    """Say which site has too many draws on a bound: coordinates of such values return, those next to them do not."""
    return density.on_bounds(z + 0.1 * z.sign())


def _read(mcmc: object) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Return draws by site (chains, draws, *shape), which of them diverged (chains, draws), the sampler's name."""
    if isinstance(mcmc, Mapping):
        return {str(name): torch.as_tensor(value) for name, value in mcmc.items()}, None, "chains"
    if not hasattr(mcmc, "get_samples"):
        raise ValueError(f"mcmc: expected a pyro.infer.MCMC, or draws by site, got a {type(mcmc).__name__}.")
    draws = mcmc.get_samples(group_by_chain=True)
    if not draws:
        raise ValueError("mcmc: expected one that has run, this one has no samples. Call mcmc.run(*args) first.")
    sampler = type(getattr(mcmc, "kernel", mcmc)).__name__
    marks = [entry.get("divergences") for entry in getattr(mcmc, "_diagnostics", None) or [] if entry]
    first = next(iter(draws.values()))
    if len(marks) != len(first) or any(mark is None for mark in marks):
        return draws, None, sampler
    diverging = torch.zeros(first.shape[:2], dtype=torch.bool)
    for chain, places in enumerate(marks):
        diverging[chain, torch.as_tensor(list(places), dtype=torch.long)] = True
    return draws, diverging, sampler


def _flat(draws: Mapping[str, Tensor], density: LogDensity) -> tuple[dict[str, Tensor], int]:
    """Return the latent sites' draws, one chain after the other (S, *shape), and how many chains there are."""
    missing = [name for name in density.names if name not in draws]
    if missing:
        raise ValueError(
            f"mcmc: expected draws of all latent sites, {', '.join(map(repr, missing))} missing; there are "
            f"{', '.join(map(repr, draws))}."
        )
    sizes = {tuple(draws[name].shape[:2]) for name in density.names}
    shape = next(iter(sizes))
    if len(sizes) > 1 or len(shape) < 2:
        raise ValueError(f"mcmc: expected (chains, draws, *shape) alike for all sites, got {sorted(sizes)}.")
    for latent in density.structure.latents:
        if draws[latent.name].shape[2:] != latent.shape:
            got = tuple(draws[latent.name].shape[2:])
            raise ValueError(f"mcmc: site {latent.name!r} has shape {got}, in the model {tuple(latent.shape)}.")
    _checks.integer("mcmc: draws of a chain", shape[1], 10)
    return {name: draws[name].flatten(0, 1).detach() for name in density.names}, shape[0]
