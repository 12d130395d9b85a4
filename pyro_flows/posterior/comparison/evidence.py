"""The evidence of a model, with an honest standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_flows.inference.verdict.psis import largest_k, psis
from pyro_flows.inference.verdict.weighing import has_no_tail
from pyro_flows.posterior.comparison.bridge import DF, Bridged, Latent, bridge, enough, finite, fit_proposal
from pyro_flows.posterior.comparison.draws import MOST_NUMBERS
from pyro_flows.support import checks
from pyro_flows.support.process.seeding import derive, seeded
from pyro_flows.support.process.threads import alone, few_threads

if TYPE_CHECKING:
    from pyro_flows.inference.record import Record
    from pyro_flows.model.log_density import LogDensity

DRAWS = 16_000  # of the flow, scored anew: an error of .008 nats at ESS/S = .5
LEAST = 100  # draws that are added at a time
ERROR_OF_ROWS = 0.05  # nats: the standard error that is asked by default where a draw is a pass over all rows
MORE = 4  # times as many draws of a Student t with the moments of chains
APART = 3  # joint errors: estimates so far apart are of different posteriors
ROUNDS, FINE = 3, 0.003  # rounds of moments of weighted draws at most; nats, an error with which no further one is made
NAMES = {"importance": "importance sampling", "bridge": "bridge sampling"}


@dataclass(frozen=True)
class Estimate:
    r"""One method's estimate of the log evidence :math:`\log p(y)`, nats.

    Attributes:
        method: ``"importance"`` or ``"bridge"``.
        value: the estimate; NaN where the method cannot be used.
        standard_error: its standard error; infinite where no error can be stated.
        note: why a method was not used, or has no error; empty otherwise.

    Cost: nothing is computed here; :meth:`Posterior.evidence` makes it.

    >>> from pyro_flows import Estimate
    >>> print(Estimate("importance", -31.3113, 0.0006))
    importance sampling: -31.3113, standard error 0.0006
    """

    method: str
    value: float
    standard_error: float
    note: str = ""

    def __str__(self) -> str:
        name = NAMES[self.method]
        if math.isnan(self.value):
            return f"{name}: {self.note}"
        if not math.isfinite(self.standard_error):
            return f"{name}: {self.value:.4f}, no error can be stated: {self.note}"
        return f"{name}: {self.value:.4f}, standard error {self.standard_error:.4f}" + (self.note and f", {self.note}")


@dataclass(frozen=True)
class Evidence:
    r"""The log evidence :math:`\log p(y)` of a model, nats; it unpacks as ``value, standard_error, method``.

    Attributes:
        value: the estimate with the smallest standard error.
        standard_error: its standard error, nats; infinite where no method can state one.
        method: which method it comes from.
        estimates: of all methods, those that could not be used too.
        notes: what to know before it is used.

    Importance sampling estimates :math:`p(y) = \mathrm{E}_q[\tilde p(z) / q(z)]`; bridge sampling is Meng and Wong's
    (1996), as in Gronau et al. 2017 (arXiv 1703.05984). Cost: 16 000 evaluations of the density, and as many of the
    guide; bridge sampling takes as many again. For a standard error e that is asked, :math:`(1/r - 1) / e^2`
    evaluations in all, with r the share of effective draws, less those that the posterior has.

    >>> from pyro_flows import Estimate, Evidence
    >>> found = Evidence(-31.3113, 0.0006, "importance", (Estimate("importance", -31.3113, 0.0006),))
    >>> value, error, method = found
    >>> print(found)
    log evidence -31.3113 nats by importance sampling, standard error 0.0006, 95 % interval -31.3125 to -31.3101.
    - importance sampling: -31.3113, standard error 0.0006
    """

    value: float
    standard_error: float
    method: str
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[float | str]:
        return iter((self.value, self.standard_error, self.method))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, nats."""
        away = 1.959964 * self.standard_error  # the quantile .975 of a normal distribution
        return self.value - away, self.value + away

    def __str__(self) -> str:
        low, high = self.interval
        known = math.isfinite(self.standard_error)
        error = f"standard error {self.standard_error:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        first = f"log evidence {self.value:.4f} nats by {NAMES[self.method]}, {error if known else 'error not known'}."
        lines = [f"- {estimate}" for estimate in self.estimates]
        return "\n".join([first, *lines, *(f"Note: {note}." for note in self.notes)])

    __repr__ = __str__


def evidence(
    posterior: Record, *, method: str, seed: int, draws: int | None = None, error: float | None = None
) -> Evidence:
    """Estimate the evidence by all methods that the posterior allows; see :meth:`Posterior.evidence`."""
    checks.choice("method", method, ("auto", *NAMES))
    if draws is not None and error is not None:
        raise ValueError("error: expected draws or error, got both.")
    error = None if error is None else checks.positive("error", error)
    if draws is None and error is None and posterior.density is not None and posterior.density.by_rows:
        error = ERROR_OF_ROWS
    count = DRAWS if draws is None else draws
    wanted = NAMES if method == "auto" else (method,)
    makers: dict[str, Callable[[Record, int], Estimate]]
    makers = {"importance": partial(_importance, error=error), "bridge": _bridge}
    posterior._check_unchanged()
    numbers = 0 if posterior.density is None else posterior.density.numbers
    device = posterior._used.device
    with alone(), few_threads(numbers), torch.no_grad(), seeded(derive(seed, "evidence"), device):
        rounding = 0.0 if posterior.density is None else posterior.density.known_rounding(posterior._used)
        found = [makers[name](posterior, count) for name in wanted]
    # draws have in common what rounding does to the log density
    found = [replace(estimate, standard_error=math.hypot(estimate.standard_error, rounding)) for estimate in found]
    estimates = tuple(map(_doubted, found) if posterior.verdict.status == "unreliable" else compared(found))
    usable = [estimate for estimate in estimates if not math.isnan(estimate.value)]
    if not usable:
        raise ValueError(f"evidence: {'; '.join(map(str, estimates))}.")
    improper, notes = ", ".join(improper_priors(posterior)), tuple[str, ...]()
    if improper:
        notes = (f"the prior of {improper} is improper, so the evidence has an arbitrary factor",)
    best = min(usable, key=lambda estimate: estimate.standard_error)
    return Evidence(best.value, best.standard_error, best.method, estimates, notes)


def _doubted(estimate: Estimate) -> Estimate:
    """Take the error away: draws that miss a part of the posterior know nothing of what the part weighs."""
    if math.isnan(estimate.value):
        return estimate
    return Estimate(estimate.method, estimate.value, math.inf, "the verdict on the draws is unreliable")


def compared(estimates: list[Estimate]) -> list[Estimate]:
    """Take the error away from importance sampling far from bridge sampling: its proposal misses a part of the chains'.

    Weights say nothing of what their proposal does not draw. Bridge sampling has draws of the chains from there.
    """
    by_method = {estimate.method: estimate for estimate in estimates}
    if not {"importance", "bridge"} <= by_method.keys():
        return estimates
    weighted, bridged = by_method["importance"], by_method["bridge"]
    errors = math.hypot(weighted.standard_error, bridged.standard_error)
    if not math.isfinite(errors) or abs(weighted.value - bridged.value) <= APART * errors:
        return estimates
    note = "bridge sampling, which has the draws of the chains, gives another value"
    weighted = replace(weighted, standard_error=math.inf, note=", ".join(filter(None, (weighted.note, note))))
    return [weighted if estimate.method == "importance" else estimate for estimate in estimates]


def improper_priors(posterior: Record) -> list[str]:
    """Return the latent sites with an improper prior; none are known without the model."""
    return [] if posterior.density is None else posterior.density.structure.improper


# importance sampling --------------------------------------------------------------------------------------------------


def _importance(posterior: Record, count: int, *, error: float | None) -> Estimate:
    if not posterior._by_chains:
        return importance(_ratio(posterior, count)) if error is None else _to_error(posterior, count, error)
    fitted = _from_moments(posterior, MORE * count)
    by_flow = None if posterior.flow is None else importance(_ratio(posterior, count))
    found = [estimate for estimate in (fitted, by_flow) if estimate is not None]
    if not found:
        return Estimate("importance", math.nan, math.inf, "the draws are chains, there is no density to weigh them by")
    return min(found, key=lambda estimate: estimate.standard_error)


def _to_error(posterior: Record, most: int, error: float) -> Estimate:
    """Add draws to those of the posterior until the standard error is as asked, at most as many as can be afforded."""
    ratio = posterior.log_p.double() - posterior.log_q.double()
    most = most if posterior.density is None else max(posterior.density.affordable(most), len(ratio))
    while True:
        found = importance(ratio)
        left = most - len(ratio) if posterior._raw_draws() is not None and posterior.density is not None else 0
        if found.standard_error <= error or left < LEAST:
            break
        wanted = len(ratio) * ((found.standard_error / error) ** 2 - 1.0)
        more = left if not wanted < left else max(LEAST, math.ceil(1.1 * wanted))
        ratio = torch.cat([ratio, _ratio(posterior, min(more, left))])
    if found.standard_error > error and not found.note:
        return replace(found, note=f"more than {error:.2g} nats after {len(ratio):,} draws")
    return found


def _from_moments(posterior: Record, count: int) -> Estimate | None:
    """Weigh draws of a Student t that has the moments of chains; then of one with those of the weighted draws."""
    density, dim = posterior.density, posterior._used.shape[1]
    if density is None or not enough(len(posterior._used), dim):
        return None
    latent = Latent(density, posterior.flow, posterior._used)
    x = latent.back(posterior._used)[0]
    if not bool(torch.isfinite(x).all()):
        return None
    df, weights, count = max(DF, 2.0 * dim), None, max(min(count, MOST_NUMBERS // dim), 100)
    for _ in range(ROUNDS):
        proposal = fit_proposal(x, df, weights)
        x, log_q = proposal.draw(count)
        ratio = latent(x) - log_q
        found = importance(ratio)
        if found.standard_error < FINE or not math.isfinite(found.standard_error):
            break
        weights = psis(ratio)[0]
    return replace(found, note=", ".join(filter(None, ("from a Student t with the moments of the chains", found.note))))


def importance(ratio: Tensor) -> Estimate:
    r"""Estimate :math:`\log Z` by the mean of the ratios :math:`e^\ell`, :math:`\ell = \log \tilde p - \log q` (S,).

    .. math:: \text{se} = \frac{\text{sd}(e^\ell)}{\text{mean}(e^\ell)}\, S^{-r(\hat k) / 2}

    The rate r falls from 1 to 0 as the shape of the ratios' tail goes from 0 to 1: the mean of heavy-tailed ratios
    converges slower than :math:`S^{-1/2}`. Where k-hat is not below min(1 - 1 / log10(S), .7), no error is stated.
    Ratios of which none is above 1.5 times their mean have no tail.

    Reference: Vehtari et al. 2024, *Pareto smoothed importance sampling*.
    """
    ratio = finite(ratio)
    size, largest = len(ratio), float(ratio.max())
    if not math.isfinite(largest):
        return Estimate("importance", math.nan, math.inf, "no draw has a finite log density")
    weights = (ratio - largest).exp()
    value = largest + math.log(float(weights.mean()))
    k_hat = psis(ratio)[1] if size >= 30 else math.inf
    if has_no_tail(ratio):
        k_hat = min(k_hat, 0.0)
    limit = largest_k(size)
    if not k_hat < limit:
        return Estimate("importance", value, math.inf, f"k-hat of the weights {k_hat:.2f} is not below {limit:.2f}")
    spread = float(weights.std() / weights.mean())
    return Estimate("importance", value, spread * size ** (-0.5 * convergence_rate(k_hat, size)))


def convergence_rate(k: float, size: int) -> float:
    """Return how fast the variance of a mean of ``size`` ratios with Pareto shape ``k`` falls: 1 is as 1 / size.

    Reference: Vehtari et al. 2024, *Pareto smoothed importance sampling*, section 3.2.4.

    >>> round(convergence_rate(0.0, 4000), 2), round(convergence_rate(0.6, 4000), 2)
    (1.0, 0.75)
    """
    if k <= 0.0:
        return 1.0
    if k >= 1.0:
        return 0.0
    if abs(k - 0.5) < 1e-6:
        return 1.0 - 1.0 / math.log(size)
    power = size ** (2.0 * k)
    above = 2.0 * (k - 1.0) * size * power + (1.0 - 2.0 * k) * power + size**2
    return max(0.0, above / ((size - 1) * (size - power)))


def _ratio(posterior: Record, count: int) -> Tensor:
    """Return log ratios at fresh draws of the guide; at the raw draws where there can be no others."""
    draw = posterior._raw_draws()
    if draw is None or posterior.density is None:
        return posterior.log_p.double() - posterior.log_q.double()
    z, log_q = draw(count)
    return posterior.density(z).double() - log_q.double()


# bridge sampling ------------------------------------------------------------------------------------------------------


def _bridge(posterior: Record, count: int) -> Estimate:
    if not posterior._by_chains:
        note = "not used: it takes draws of the posterior, and these are the method's own or weighted ones"
        return Estimate("bridge", math.nan, math.inf, note)
    if posterior.flow is not None:
        at_p = posterior._used_log_p.double() - posterior.flow.log_prob(posterior._used).double()
        found = bridge(at_p, _ratio(posterior, count), posterior.chain_count)
    elif posterior.density is not None:
        found = _bridge_by_halves(posterior, posterior.density, count)
    else:
        return Estimate("bridge", math.nan, math.inf, "not used: it scores new draws, which takes the model")
    if not found.settled or not math.isfinite(found.standard_error):
        return Estimate("bridge", found.value, math.inf, "the iteration did not settle")
    return Estimate("bridge", found.value, found.standard_error)


def _bridge_by_halves(posterior: Record, density: LogDensity, count: int) -> Bridged:
    """Bridge to a Student t that is fitted to the first half of each chain, from the second halves."""
    chains, dim = posterior.chain_count, posterior._used.shape[1]
    draws = posterior._used.reshape(chains, -1, dim)
    half = draws.shape[1] // 2
    proposal = fit_proposal(draws[:, :half].reshape(-1, dim))
    z, log_q = proposal.draw(count)
    rest = draws[:, half:].reshape(-1, dim)
    log_p = posterior._used_log_p.reshape(chains, -1)[:, half:].reshape(-1)
    at_p = log_p.double().cpu() - proposal.log_prob(rest)
    at_q = density(z.to(posterior._used)).double().cpu() - log_q
    return bridge(at_p, at_q, chains)
