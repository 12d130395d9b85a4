"""Power scaling: how much the posterior hangs on the prior, and on the likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_flows.model.faults import where_it_runs
from pyro_flows.model.log_density import LogDensity
from pyro_flows.model.sites import messages
from pyro_flows.support import arviz, checks

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from pyro_flows.inference.record import Record

THRESHOLD = 0.05  # Kallioinen et al. 2024
STRETCH = 1.5  # of a site and, inversely, of a scale: the product of both stays as it is
SAME = 1e-3  # change of the log likelihood under both, relative to that under the first alone


@dataclass(frozen=True, eq=False)
class Sensitivity:
    r"""How much each scalar of the posterior changes as prior and likelihood are raised to powers near 1.

    Attributes:
        table: ``prior``, ``likelihood`` and ``diagnosis`` of each scalar. From .05 on a change is large: of both, prior
            and likelihood are in conflict; of the prior alone, it is strong, or the likelihood weak.
        prior_sites: the sites whose priors were scaled together.
        left_out: for each other latent site, why its prior was not.

    The change is the cumulative Jensen-Shannon distance of the weighted draws, over the change of the power
    :math:`\log_2 \alpha`. Source: Kallioinen et al. 2024 (arXiv 2107.14054). Cost: the log prior and the log likelihood
    at each draw.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 1.01, 1.01**-0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> found = posterior.sensitivity("mu")
    >>> found.prior_sites, bool(found.table.loc["mu", "prior"] < 0.05)
    (('mu',), True)
    """

    table: pd.DataFrame = field(repr=False)
    prior_sites: tuple[str, ...]
    left_out: dict[str, str]

    def __str__(self) -> str:
        first = f"Power scaling of the priors of {', '.join(self.prior_sites)}, and of the likelihood."
        left = [f"{name} {why}" for name, why in self.left_out.items()]
        second = f" Not scaled: {'; '.join(left)}." if left else ""
        return f"{first}{second}\n{self.table.to_string()}"

    __repr__ = __str__


def sensitivity(posterior: Record, draws: xr.Dataset, *, prior_sites: str | Sequence[str] | None = None) -> Sensitivity:
    """Scale prior and likelihood, and see what labeled draws do; see :meth:`Posterior.sensitivity`."""
    density = posterior._need_density()
    top, left_out = top_level(density, posterior._used)
    if prior_sites is not None:
        wanted = [prior_sites] if isinstance(prior_sites, str) else list(prior_sites)
        top = [checks.choice("prior_sites", name, density.names) for name in wanted]
        left_out = {name: "was not asked for" for name in density.names if name not in top}
    if not top:
        raise ValueError(f"prior_sites: no prior stands at the top; name the sites to scale, of {density.names}.")
    priors = {name: _summed(value) for name, value in density.log_prior(posterior._used).items()}
    total = posterior._used_log_p.double() - density.log_jacobian(posterior._used).double()
    likelihood = total - sum(priors.values(), torch.zeros_like(total))
    prior = sum((priors[name] for name in top), torch.zeros_like(total))
    chains = posterior.chain_count
    table = arviz.power_scaling(draws, prior.reshape(chains, -1), likelihood.reshape(chains, -1)).round(3)
    table["diagnosis"] = [_diagnosis(row.prior, row.likelihood) for row in table.itertuples()]
    return Sensitivity(table, tuple(top), left_out)


def _summed(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1).sum(1)


def _diagnosis(prior: float, likelihood: float) -> str:
    if prior < THRESHOLD:
        return "-"
    return "prior and likelihood conflict" if likelihood >= THRESHOLD else "strong prior or weak likelihood"


# which priors stand at the top ----------------------------------------------------------------------------------------


def top_level(density: LogDensity, z: Tensor) -> tuple[list[str], dict[str, str]]:
    """Return the latent sites with priors of their own, and why the others are group effects.

    A prior that depends on other latents is that of a group effect. So is that of a site, written non-centered, which
    the likelihood knows only as a product with a scale, itself a latent: if it is stretched and the scale (a site with
    fewer entries) is shrunk by the same factor, the likelihood stays as it is.
    """
    points = z[[0, len(z) // 2]]
    left_out = dict.fromkeys(_dependent(density, points), "has a prior that depends on other latents")
    if not density.structure.enumerated and density.structure.observed:
        for name in density.names:
            scale = _scale_of(density, points, name) if name not in left_out else None
            if scale is not None:
                left_out[name] = f"is a group effect with the scale {scale}"
    return [name for name in density.names if name not in left_out], left_out


def _dependent(density: LogDensity, points: Tensor) -> list[str]:
    """Return the sites whose log prior density at one and the same value differs between two points."""
    with torch.no_grad():
        runs = where_it_runs(density.trace_at, lambda size: points, 2)
    if len(runs) < 2:
        return list(density.names)
    first, second = map(messages, runs)
    found = []
    for name in density.names:
        value = first[name]["value"]
        with density.precisely():
            before, after = (nodes[name]["fn"].log_prob(value) for nodes in (first, second))
        if before.shape != after.shape or not torch.allclose(before, after, rtol=1e-6, atol=1e-6, equal_nan=True):
            found.append(name)
    return found


def _scale_of(density: LogDensity, points: Tensor, name: str) -> str | None:
    """Return the site whose product with this one is all that the likelihood knows of it."""
    sizes = {latent.name: latent.size for latent in density.structure.latents}
    values = {site: value for site, value in density.constrain(points).items() if site in density.names}
    here = _log_likelihood(density, values)
    stretched = {**values, name: STRETCH * values[name]}
    moved = (_log_likelihood(density, stretched) - here).abs()
    for other in density.names:
        if other == name or sizes[other] >= sizes[name]:
            continue
        both = (_log_likelihood(density, {**stretched, other: values[other] / STRETCH}) - here).abs()
        if bool((moved > 0).all() and (both <= SAME * moved).all()):
            return other
    return None


def _log_likelihood(density: LogDensity, values: dict[str, Tensor]) -> Tensor:
    """Return the log likelihood (S,) at constrained values; NaN where they leave their supports."""
    z = density.unconstrain(values)
    found = density.log_likelihood(z)
    back = density.constrain(z)
    total = sum((_summed(value) for value in found.values()), torch.zeros(len(z), dtype=torch.float64))
    for name, value in values.items():
        close = torch.isclose(back[name], value, rtol=1e-3, atol=1e-6).reshape(len(z), -1).all(1)
        total = torch.where(close, total, torch.nan)
    return total
