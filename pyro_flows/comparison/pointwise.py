"""Log likelihoods of observations at draws, and what each observation's weights say of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arrays, _arviz, _checks
from pyro_flows.comparison.controls import explained
from pyro_flows.comparison.draws import Draws
from pyro_flows.comparison.moving import Space
from pyro_flows.results import arviz_groups as export
from pyro_flows.verdict.psis import largest_k, psis

if TYPE_CHECKING:
    import xarray as xr

    from pyro_flows.results.record import Record


GOOD = 0.5  # k-hat of weights that have a variance


@dataclass(frozen=True)
class Observations:
    """The observations' log likelihoods (S, N) at draws, a label of each, and where each site's stand."""

    draws: Draws
    values: Tensor
    labels: list[str]
    places: dict[str, tuple[int, int]]

    @property
    def limit(self) -> float:
        """What k-hat must be below."""
        return largest_k(len(self.values))


@dataclass(frozen=True)
class Estimates:
    """Elpd (N,), k-hat of the draws as they are and of those that the estimate is from, influence of draws (S, N)."""

    elpd: Tensor
    k_hat: Tensor
    k_moved: Tensor
    influence: Tensor


def likelihood(posterior: Record, z: Tensor) -> xr.Dataset:
    """Return the pointwise log likelihood at draws z, one variable for each observed site.

    Raises:
        ValueError: for models with enumerated latents or without data, and for posteriors without their model whose
            files lack the group.
    """
    if posterior.density is None and posterior.stored is not None and "log_likelihood" in posterior.stored[0]:
        found: xr.Dataset = posterior.stored[0]["log_likelihood"]
        return found
    density = posterior._need_density()
    if density.structure.enumerated:
        raise ValueError(
            f"model: no pointwise log likelihood, since {', '.join(map(repr, density.structure.enumerated))} are "
            "summed out over all data at once. Write them as a mixture (MixtureSameFamily)."
        )
    if not density.structure.observed:
        raise ValueError("model: expected an observed site (pyro.sample with obs=), got none.")
    return export.likelihood_group(density, z)


def _names(sites: Any, group: xr.Dataset) -> list[str]:
    wanted = [sites] if isinstance(sites, str) else list(sites)
    return [_checks.choice("sites", name.replace("/", "."), map(str, group)) for name in wanted]


def _columns(group: xr.Dataset, names: list[str]) -> tuple[Tensor, list[str], dict[str, tuple[int, int]]]:
    """Return the log likelihoods (S, N), a label for each of N observations, and where each site's stand."""
    columns, labels, places = [], list[str](), {}
    for name in names:
        values = group[name]
        flat = values.stack(sample=_arrays.SAMPLE_DIMS).transpose("sample", ...)
        rows = torch.as_tensor(flat.to_numpy()).double().reshape(flat.sizes["sample"], -1)
        places[name] = (len(labels), len(labels) + rows.shape[1])
        labels += _arrays.entry_labels(values)
        columns.append(rows)
    return torch.cat(columns, 1), labels, places


def observations(posterior: Record, draws: Draws, sites: Any) -> Observations:
    """Return the log likelihoods of the observations of ``sites`` (all of them with None) at draws."""
    group = likelihood(posterior, draws.z)
    return Observations(draws, *_columns(group, list(map(str, group)) if sites is None else _names(sites, group)))


def plain(values: Tensor, base: Tensor | None) -> Estimates:
    r"""Estimate the elpd of each observation from its log likelihoods (S, N) at the draws as they are.

    Draw s has the weight :math:`w_{si} \propto p(z_s) / (q(z_s)\, p(y_i \mid z_s))`, without p / q for draws of the
    posterior; :math:`\text{elpd}_i = \log \sum_s w_{si}\, p(y_i \mid z_s)`.
    """
    elpd, shapes, influence = list[Tensor](), list[float](), list[Tensor]()
    for column in values.T:
        weights, k_hat = psis(-column if base is None else base - column)
        found = torch.logsumexp(weights + column, 0)
        elpd.append(found)
        shapes.append(k_hat)
        influence.append(torch.nan_to_num((weights + column - found).exp() - weights.exp()))
    k_hats = torch.tensor(shapes, dtype=values.dtype)
    return Estimates(torch.stack(elpd), k_hats, k_hats.clone(), torch.stack(influence, 1))


def moved(posterior: Record, given: Observations, found: Estimates, which: Iterable[int]) -> Estimates:
    """Replace the estimates of some observations by those of moved draws, where their k-hat is lower or below 1/2."""
    half = halves(given.draws, len(given.values), posterior.chain_count)
    space = Space(posterior._need_density(), posterior.flow, given.draws.z, given.draws.ratio, half)
    sites = [name for name, _ in sorted(given.places.items(), key=lambda place: place[1])]
    elpd, k_moved, influence = found.elpd.clone(), found.k_moved.clone(), found.influence.clone()
    for index in which:

        def alone(z: Tensor, index: int = index) -> Tensor:
            return _columns(likelihood(posterior, z), sites)[0][:, index]

        one = space.leave_out(alone, given.values[:, index], GOOD)
        if one.k_hat < max(float(k_moved[index]), GOOD):
            elpd[index], k_moved[index], influence[:, index] = one.elpd, one.k_hat, one.influence
    return Estimates(elpd, found.k_hat, k_moved, influence)


def halves(draws: Draws, count: int, chains: int) -> Tensor:
    """Return which draws (S,) make the first half: of each chain, or, copies of one together, of all."""
    if draws.copies is not None:
        return draws.copies % 2 == 0
    each = count // chains
    return torch.arange(count) % each < each // 2


def controlled(posterior: Record, given: Observations, found: Estimates) -> Estimates:
    """Take off the part of the errors that control variates explain, in each half of the draws by itself."""
    columns = given.draws.controls
    if columns is None:
        return found
    half = halves(given.draws, len(given.values), posterior.chain_count)
    elpd, influence = found.elpd.clone(), found.influence.clone()
    for rows in (half, ~half):
        error, influence[rows] = explained(influence[rows], columns[rows])
        elpd -= error
    return Estimates(elpd, found.k_hat, found.k_moved, influence)


def log_score(values: Tensor, base: Tensor | None) -> Tensor:
    """Return the log predictive density of the data in hand (N,)."""
    weights = values.new_full((len(values),), -math.log(len(values))) if base is None else psis(base)[0]
    return torch.logsumexp(weights[:, None] + values, 0)


def standard_error(influence: Tensor, copies: Tensor | None, chains: int) -> float:
    """Return the standard error of a sum over draws: copies of a draw are one, chains have their effective size."""
    if copies is not None:
        influence = influence.new_zeros(int(copies.max()) + 1).index_add(0, copies, influence)
    squares = float(influence.square().sum())
    if chains > 1:
        squares *= len(influence) / _arviz.effective_draws(influence.reshape(chains, -1))
    return math.sqrt(squares)
