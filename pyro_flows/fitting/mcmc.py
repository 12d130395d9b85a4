"""Markov chains from elsewhere, Pyro's MCMC first of all, as a judged posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arviz, _checks
from pyro_flows._turns import alone
from pyro_flows.fitting.chain_verdict import ChainVerdict, judge_chains
from pyro_flows.model.batching import usable
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.observations import warn_if_nothing_observed
from pyro_flows.posterior.posterior import KINDS, Posterior
from pyro_flows.results import arviz_groups as export
from pyro_flows.results.dims import coordinate_names
from pyro_flows.verdict.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

LEAST_DRAWS = 10  # of a chain
CUT = ("posterior", "log_likelihood", "log_prior", "posterior_predictive", "unconstrained_posterior")
NO_GUIDE = "the draws are Markov chains, no guide was fitted"
OF_GUIDE = ("k_hat", "ess", "elbo", "log_evidence")


@dataclass(frozen=True, eq=False, repr=False)
class Chains(Posterior):
    """A posterior of Markov chains: what :func:`from_mcmc` returns.

    ``samples``, ``used`` and ``used_log_p`` hold one chain after the other. What belongs to a guide (``log_q``,
    ``k_hat``, ``ess``, ``elbo``, ``log_evidence``) is NaN, and ``guide`` and ``flow`` are None. ``to_arviz`` has the
    dimensions (chain, draw), ``summary`` R-hat and effective sample sizes, ``verdict`` is a :class:`ChainVerdict`.

    Attributes:
        count: how many chains.
        stats: of each draw (S,): ``diverging``, where the sampler tells.
    """

    count: int = 1
    stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def used_log_weights(self) -> Tensor:
        """Equal normalized log weights (S,)."""
        return torch.full_like(self.used_log_p, -math.log(len(self.used)))

    @property
    def effective(self) -> float:
        """The smallest bulk effective sample size; NaN if unreliable."""
        assert isinstance(self.verdict, ChainVerdict)
        return math.nan if self.verdict.status == "unreliable" else self.verdict.ess_bulk

    def __str__(self) -> str:
        sites, each = ", ".join(self.samples), len(self.used) // self.count
        about = f"{self.count} chains of {each} draws, {self.used.shape[1]} unconstrained coordinates"
        return f"Posterior of {sites}: {about}, by {self.guide_name}\n{self.verdict}"

    __repr__ = __str__

    def _table_of(self, draws: Any, *, kind: str, prob: float, round_to: int | str) -> pd.DataFrame:
        return _arviz.chain_summary(draws, kind=kind, prob=prob, round_to=round_to)

    def _draws(self) -> Any:
        found = super()._draws()
        return found if self.stored is not None else _arviz.cut(found, self.count)

    def _groups(self, predictive: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        groups, attrs = super()._groups(predictive)
        return (groups, attrs) if self.stored is not None else (self._cut(groups), self._attributes())

    def _cut(self, groups: Mapping[str, Any]) -> dict[str, Any]:
        """Give the groups their chains, and those about a guide what is known of chains instead."""
        found = {name: _arviz.cut(group, self.count) if name in CUT else group for name, group in groups.items()}
        stats = {"lp": self.used_log_p.double(), **self.stats}
        arrays = {name: value.reshape(self.count, -1).cpu().numpy() for name, value in stats.items()}
        found["sample_stats"] = _arviz.dataset(arrays, {})
        found["fit"] = _arviz.scalars({"status": self.verdict.status, **_figures(self.verdict)})
        return found

    def _attributes(self) -> dict[str, str | float]:
        return {**export.attributes(self), "sampling": "mcmc"}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.stored is None:
            state["stored"] = self._cut(state["stored"][0]), self._attributes()
        return state

    def _extra(self) -> dict[str, Any]:
        return {"count": self.count, "stats": self.stats, "figures": _figures(self.verdict)}

    @classmethod
    def _restored(cls, fields: dict[str, Any], extra: Mapping[str, Any]) -> Chains:
        verdict = ChainVerdict(**vars(fields.pop("verdict")), **extra["figures"])
        return cls(**fields, verdict=verdict, count=extra["count"], stats=extra["stats"])


KINDS["Chains"] = Chains


def _figures(verdict: Verdict) -> dict[str, Any]:
    names = ("count", "r_hat", "r_hat_where", "ess_bulk", "ess_tail", "divergences")
    return {name: getattr(verdict, name) for name in names}


def from_mcmc(
    mcmc: Any, model: Callable[..., Any], *args: Any, model_kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> Chains:
    r"""Judge the output of Pyro's ``MCMC``, and hand it over to ArviZ as a fit's.

    ``ok`` takes rank-normalized split R-hat below 1.01 in all unconstrained coordinates, at least 400 effective draws
    (bulk and tail), finite log densities, and divergences in at most one draw of a thousand.

    Args:
        mcmc: a ``pyro.infer.MCMC`` that has run; or draws of all latent sites, constrained,
            ``{name: (chains, draws, *shape)}``, from whatever sampler.
        model: the model that was sampled.
        args: its positional arguments (the data).
        model_kwargs: its keyword arguments.
        seed: of later predictive draws.

    Returns:
        :class:`Chains`, a :class:`Posterior`: ``summary``, ``to_arviz``, ``predictive``, ``loo``, ``evidence`` (by
        bridge sampling), ``sensitivity``, ``save``.

    Raises:
        ValueError: naming the site, for one that was not sampled or has another shape in the model; for fewer than ten
            draws a chain; and for models that :class:`LogDensity` refuses.

    Cost: one evaluation of the model a draw.

    Reference: Vehtari et al. 2021, *Rank-normalization, folding, and localization: an improved R-hat*.

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
        args, kwargs = usable(args), usable(dict(model_kwargs or {}))
        density = LogDensity(model, args, kwargs)
        warn_if_nothing_observed(density.structure, density.trace_at, model, args, kwargs)
        draws, diverging, sampler = _read(mcmc)
        values, chains = _flat(draws, density)
        with torch.no_grad():
            z = density.unconstrain(values)
            log_p = density(z)
            samples = density.constrain(z)
    names = coordinate_names(density.structure)
    stats = {} if diverging is None else {"diverging": diverging}
    nothing = torch.full_like(log_p, math.nan)
    of_guide: dict[str, Any] = dict.fromkeys(OF_GUIDE, math.nan)
    return Chains(
        samples=samples,
        z=z,
        log_p=log_p,
        log_q=nothing,
        log_weights=torch.full_like(log_p, -math.log(len(z))),
        used=z,
        used_log_p=log_p,
        used_log_q=nothing,
        **of_guide,
        verdict=judge_chains(z.reshape(chains, -1, density.dim), log_p, names, diverging),
        losses=torch.zeros(0),
        history=(),
        settings={"draws": len(z), "chains": chains, "seed": seed, "noncentered": density.structure.noncentered},
        coordinates=tuple(names),
        guide=None,
        guide_name=sampler,
        flow=None,
        density=density,
        missing={"guide": NO_GUIDE, "flow": NO_GUIDE},
        count=chains,
        stats=stats,
    )


def _read(mcmc: Any) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Return draws by site (chains, draws, *shape), which of them diverged (chains * draws,), the sampler's name."""
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
    return draws, diverging.reshape(-1), sampler


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
    _checks.integer("mcmc: draws of a chain", shape[1], LEAST_DRAWS)
    return {name: draws[name].flatten(0, 1).detach() for name in density.names}, shape[0]
