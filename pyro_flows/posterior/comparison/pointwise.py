"""Log likelihoods of observations at draws, and what each observation's weights say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_flows.inference.verdict.psis import largest_k, psis
from pyro_flows.posterior.comparison.draws import Draws, Regression, every
from pyro_flows.posterior.comparison.moving import Space
from pyro_flows.posterior.export import arviz_groups as export
from pyro_flows.support import arviz, checks
from pyro_flows.support.numbers import arrays

if TYPE_CHECKING:
    import xarray as xr

    from pyro_flows.inference.record import Record


Sites = str | Sequence[str] | None  # that observations are left out of; None for all
GOOD = 0.5  # k-hat of weights that have a variance
PIECE = 4_000_000  # log likelihoods that are worked out at a time


@dataclass(frozen=True)
class Observations:
    """The observations' log likelihoods (S, N) at draws, a label of each, where each site's stand, control variates.

    ``chosen`` says which of a larger set of draws these are.
    """

    draws: Draws
    values: Tensor
    labels: list[str]
    places: dict[str, tuple[int, int]]
    half: Tensor
    regression: Regression
    chains: int
    chosen: Tensor | None = None

    @property
    def limit(self) -> float:
        """What k-hat must be below."""
        return largest_k(len(self.values))

    def error(self, influence: Tensor) -> float:
        """Return the standard error of a sum to which each draw adds so much (S,), less what controls explain."""
        return standard_error(self.regression.rest(influence), self.draws.copies, self.chains)


@dataclass(frozen=True)
class Estimates:
    """Elpd of some of the observations (N,), k-hat of the draws as they are, and of those that the estimate is from.

    ``influence`` (S,) is what each draw adds to the error of the sum, or, of moved draws, (N, S) to that of each one.
    """

    elpd: Tensor
    k_hat: Tensor
    k_moved: Tensor
    influence: Tensor

    def only(self, which: Sequence[int]) -> Estimates:
        """Return some of the estimates from moved draws."""
        index = torch.tensor(list(which), dtype=torch.long)
        return Estimates(self.elpd[index], self.k_hat[index], self.k_moved[index], self.influence[index])


class Tally:
    """The Monte Carlo error of a sum whose terms are from several sets of draws, or from some of the draws of one.

    Draws of different sets are independent, but for chains, which go on: their errors are added.
    """

    def __init__(self, independent: bool) -> None:
        self.independent = independent
        self._sums: list[tuple[Observations, Tensor]] = []
        self._errors: list[float] = []

    def add(self, given: Observations, influence: Tensor, some: Observations | None = None) -> None:
        """Add what the draws ``given`` (S,) do to the sum, or ``some`` of these."""
        if some is not None and not self.independent:
            self._errors.append(some.error(influence))
            return
        total = next((total for known, total in self._sums if known is given), None)
        if total is None:
            total = torch.zeros(len(given.values), dtype=torch.float64)
            self._sums.append((given, total))
        if some is None:
            total += given.regression.rest(influence)
        else:
            total[some.chosen] += some.regression.rest(influence)

    def error(self) -> float:
        """Return the standard error."""
        errors = [standard_error(total, given.draws.copies, given.chains) for given, total in self._sums]
        errors += self._errors
        return math.hypot(*errors) if self.independent else sum(errors)


def likelihood(posterior: Record, z: Tensor) -> xr.Dataset:
    """Return the pointwise log likelihood at draws z, one variable for each observed site.

    Where latents of rows are integrated out, a row is one observation, and there is one variable for each plate.
    """
    if posterior.density is None and posterior._stored is not None and "log_likelihood" in posterior._stored[0]:
        return posterior._stored[0]["log_likelihood"]
    density = posterior._need_model()
    if density.by_rows:
        rows = export.rows_group(density, z)
        if not rows.data_vars:
            raise ValueError(
                "loo: no latents in plates were integrated out, so there are no rows to leave out. Fit the model "
                "without subsample_size=."
            )
        return rows
    if density.structure.enumerated:
        raise ValueError(
            f"model: no pointwise log likelihood, since {', '.join(map(repr, density.structure.enumerated))} are "
            "summed out over all data at once. Write them as a mixture (MixtureSameFamily)."
        )
    if not density.structure.observed:
        raise ValueError("model: expected an observed site (pyro.sample with obs=), got none.")
    return export.likelihood_group(density, z)


def _names(sites: Sites, group: xr.Dataset) -> list[str]:
    """Return the variables of these sites, of all without any."""
    if sites is None:
        return list(map(str, group))
    wanted = [sites] if isinstance(sites, str) else list(sites)
    return [checks.choice("sites", name.replace("/", "."), map(str, group)) for name in wanted]


def _columns(group: xr.Dataset, names: list[str]) -> tuple[Tensor, list[str], dict[str, tuple[int, int]]]:
    """Return the log likelihoods (S, N), a label for each of N observations, and where each site's stand."""
    columns, labels, places = [], list[str](), {}
    for name in names:
        values = group[name]
        flat = values.stack(sample=arrays.SAMPLE_DIMS).transpose("sample", ...)
        rows = torch.as_tensor(flat.to_numpy()).double().reshape(flat.sizes["sample"], -1)
        places[name] = (len(labels), len(labels) + rows.shape[1])
        labels += arrays.entry_labels(values)
        columns.append(rows)
    return torch.cat(columns, 1), labels, places


def observations(posterior: Record, draws: Draws, sites: Sites) -> Observations:
    """Return the log likelihoods of the observations of ``sites`` (all of them with None) at draws."""
    parts, labels, places = list[Tensor](), list[str](), dict[str, tuple[int, int]]()
    for z in draws.z.split(_piece(posterior, len(draws.z))):
        group = likelihood(posterior, z)
        rows, labels, places = _columns(group, _names(sites, group))
        parts.append(rows.to(posterior._used.dtype))
    half = _first_half(draws, posterior.chain_count)
    regression = Regression(draws.controls, half)
    return Observations(draws, torch.cat(parts), labels, places, half, regression, posterior.chain_count)


def thinned(posterior: Record, given: Observations, step: int) -> Observations:
    """Return the observations at one in ``step`` of the draws."""
    draws, chosen = every(posterior, given.draws, step)
    half = given.half[chosen]
    some = replace(given, draws=draws, values=given.values[chosen], half=half, chosen=chosen)
    return replace(some, regression=Regression(draws.controls, half))


def _piece(posterior: Record, count: int) -> int:
    """Return at how many of the draws the log likelihood is worked out at a time."""
    if posterior.density is None:
        return max(count, 1)  # it is stored
    each = sum(site.numel() for site in posterior.density.structure.observed.values())
    return max(PIECE // max(each, 1), 1)


def plain(given: Observations, which: Sequence[int] | None = None) -> Estimates:
    r"""Estimate the elpd of observations, all by default, from their log likelihoods at the draws as they are.

    :math:`w_{si} \propto p(z_s) / (q(z_s)\, p(y_i \mid z_s))`, without p / q for draws of the
    posterior; :math:`\text{elpd}_i = \log \sum_s w_{si}\, p(y_i \mid z_s)`.
    """
    elpd, shapes, total = list[Tensor](), list[float](), torch.zeros(len(given.values), dtype=torch.float64)
    for index in range(given.values.shape[1]) if which is None else which:
        found, k_hat, influence = one(given.values[:, index].double(), given.draws.ratio)
        elpd.append(found - given.regression.shift(influence))
        shapes.append(k_hat)
        total += influence
    k_hats = torch.tensor(shapes, dtype=torch.float64)
    return Estimates(torch.stack(elpd) if elpd else torch.zeros(0).double(), k_hats, k_hats.clone(), total)


def one(values: Tensor, base: Tensor | None) -> tuple[Tensor, float, Tensor]:
    """Return elpd, k-hat and influence (S,) of one observation with these log likelihoods (S,)."""
    weights, k_hat = psis(-values if base is None else base - values)
    elpd = torch.logsumexp(weights + values, 0)
    return elpd, k_hat, torch.nan_to_num((weights + values - elpd).exp() - weights.exp())


def errors_without(given: Observations, order: Sequence[int], counts: Sequence[int]) -> list[float]:
    """Return the standard error of the sum without the first n observations of an order, for each n of ``counts``."""
    total, found, last = torch.zeros(len(given.values), dtype=torch.float64), dict[int, float](), len(order)
    for count in sorted(counts, reverse=True):
        for index in order[count:last]:
            total += one(given.values[:, index].double(), given.draws.ratio)[2]
        found[count], last = given.error(total), count
    return [found[count] for count in counts]


def moved(posterior: Record, given: Observations, which: Sequence[int]) -> Estimates:
    """Estimate the elpd of some observations from moved draws, where their k-hat is lower or below 1/2."""
    density = posterior._need_model()
    space = Space(density, posterior.flow, given.draws.z, given.draws.ratio, given.half)
    entries = [(name, entry) for name, (first, last) in given.places.items() for entry in range(last - first)]
    elpd, k_hat, k_moved = (torch.zeros(len(which), dtype=torch.float64) for _ in range(3))
    influences = torch.zeros(len(which), len(given.values), dtype=torch.float64)
    for place, index in enumerate(which):
        values = given.values[:, index].double()
        found, k_hat[place], influence = one(values, given.draws.ratio)
        k_moved[place] = k_hat[place]
        other = space.leave_out(export.likelihood_entry(density, *entries[index]), values, GOOD)
        if other.k_hat < max(float(k_hat[place]), GOOD):
            found, k_moved[place], influence = torch.as_tensor(other.elpd), other.k_hat, other.influence
        elpd[place] = found - given.regression.shift(influence)
        influences[place] = influence
    return Estimates(elpd, k_hat, k_moved, influences)


def _first_half(draws: Draws, chains: int) -> Tensor:
    """Return which draws (S,) make the first half: of each chain, or, copies of one together, of all."""
    if draws.copies is not None:
        return draws.copies % 2 == 0
    each = len(draws.z) // chains
    return torch.arange(len(draws.z)) % each < each // 2


def log_score(values: Tensor, base: Tensor | None) -> Tensor:
    """Return the log predictive density of the data in hand (N,)."""
    equal = torch.full((len(values),), -math.log(len(values)), dtype=torch.float64)
    weights = equal if base is None else psis(base)[0]
    return torch.stack([torch.logsumexp(weights + column.double(), 0) for column in values.T])


def standard_error(influence: Tensor, copies: Tensor | None, chains: int) -> float:
    """Return the standard error of a sum over draws: copies of a draw are one, chains have their effective size."""
    if copies is not None:
        influence = influence.new_zeros(int(copies.max()) + 1).index_add(0, copies, influence)
    squares = float(influence.square().sum())
    if chains > 1:
        squares *= len(influence) / arviz.effective_draws(influence.reshape(chains, -1))
    return math.sqrt(squares)
