"""Leave-one-out cross-validation that is right for the draws at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arrays, _arviz, _checks
from pyro_flows.comparison.controls import explained
from pyro_flows.comparison.draws import Draws, can_draw, in_hand, more
from pyro_flows.results import arviz_groups as export
from pyro_flows.verdict.psis import psis

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from pyro_flows.results.record import Record

METHODS = {
    "plain": "PSIS-LOO of draws of the posterior",
    "approximate": "approximate-posterior PSIS-LOO of the guide's draws",
}
SHOWN = 10
ERROR = 0.005  # nats: more draws are taken until the Monte Carlo error is as small,
MOST_DRAWS = 64_000  # or they are as many,
NUMBERS = 20_000_000  # or their log likelihoods


@dataclass(frozen=True, eq=False)
class Loo:
    r"""Leave-one-out cross-validation: :math:`\text{elpd} = \sum_i \log p(y_i \mid y_{-i})`, nats.

    Attributes:
        elpd: expected log pointwise predictive density, summed over observations.
        se: its standard error over observations, :math:`\sqrt{N \operatorname{var}_i}`.
        mcse: its Monte Carlo standard error, over draws; infinite where some k-hat is above its limit.
        p: effective number of parameters, the log score of the data in hand less ``elpd``.
        method: ``"approximate"``: draws of q, weighted by p / q as well (Magnusson et al. 2019); ``"plain"``: draws of
            the posterior, resampled or by Markov chains (Vehtari et al. 2017).
        status: of the verdict on the draws.
        draws: how many there are.
        k_limit: what k-hat must be below.
        labels: of the observations, ``y[Choate]``.
        pointwise: elpd of each observation (N,).
        k_hat: Pareto shape of its weights (N,): how much the posterior hangs on it.
        p_pointwise: what it adds to ``p`` (N,).
        sites: for each observed site, its first observation and the one after its last.

    Sources: Vehtari, Gelman and Gabry 2017 (arXiv 1507.04544); approximate-posterior LOO, Magnusson et al. 2019
    (arXiv 1904.10679). Cost: the log likelihood of all observations at each draw, and up to 64 000 further draws.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> def guide(y):
    ...     precision = len(y) + 0.01
    ...     pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)

    >>> found = posterior.loo()
    >>> found.method, found.labels[0], bool(found.k_hat.max() < found.k_limit)
    ('approximate', 'y[0]', True)
    """

    elpd: float
    se: float
    mcse: float
    p: float
    method: str
    status: str
    draws: int
    k_limit: float
    labels: tuple[str, ...] = field(repr=False)
    pointwise: Tensor = field(repr=False)
    k_hat: Tensor = field(repr=False)
    p_pointwise: Tensor = field(repr=False)
    sites: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def high(self) -> tuple[str, ...]:
        """The observations whose k-hat is not below the limit: their elpd is not known."""
        return tuple(self.labels[i] for i in (~(self.k_hat < self.k_limit)).nonzero().flatten().tolist())

    def __str__(self) -> str:
        first = (
            f"elpd {self.elpd:.2f} nats, standard error {self.se:.2f}, p {self.p:.2f}, by {METHODS[self.method]} "
            f"({self.draws} draws, {self.status}); Monte Carlo error "
            f"{f'{self.mcse:.3f}' if math.isfinite(self.mcse) else 'not known'}."
        )
        return f"{first} {self._about_k()}"

    def _about_k(self) -> str:
        if not self.high:
            return f"All {len(self.labels)} k-hats are below {self.k_limit:.2f}."
        said = ", ".join(self.high[:3]) + (f" and {len(self.high) - 3} more" if len(self.high) > 3 else "")
        return f"k-hat is not below {self.k_limit:.2f} for {said}: leave them out in fits of their own."

    __repr__ = __str__

    def by_site(self) -> dict[str, float]:
        """Return the elpd of each observed site."""
        return {site: float(self.pointwise[first:last].sum()) for site, (first, last) in self.sites.items()}

    def leverage(self, count: int | None = SHOWN) -> pd.DataFrame:
        """Return a table of the observations with the largest k-hat, the largest first; all of them with None.

        The posterior without an observation of large k-hat differs much from the one with it: an outlier, a wrong
        value, or one that alone tells of a parameter.
        """
        import pandas as pd

        table = pd.DataFrame(
            {"k_hat": self.k_hat.numpy(), "elpd": self.pointwise.numpy(), "p": self.p_pointwise.numpy()},
            index=list(self.labels),
        ).sort_values("k_hat", ascending=False, kind="stable")
        return table if count is None else table.head(_checks.integer("count", count, 1))


def loo(posterior: Record, *, sites: Any, draws: int | None, seed: int) -> Loo:
    """Estimate leave-one-out elpd; see :meth:`Posterior.loo`."""
    if draws is not None:
        _checks.integer("draws", draws, 100)
    if posterior.verdict.status == "unreliable":
        raise ValueError(
            f"loo: the verdict on the draws is unreliable ({'; '.join(posterior.verdict.reasons)}), and "
            "cross-validation with them is wrong without a sign of it."
        )
    found = _judged(posterior, in_hand(posterior), sites) if draws is None else None
    count = _more_draws(found) if found is not None else draws
    if count is None or not can_draw(posterior):
        return found or _judged(posterior, in_hand(posterior), sites)
    return _judged(posterior, more(posterior, count, seed=seed, purpose="leave-one-out"), sites)


def _more_draws(found: Loo) -> int | None:
    """Return how many draws bring the Monte Carlo error down to its goal; None if those in hand do."""
    wanted = found.draws * (found.mcse / ERROR) ** 2 if math.isfinite(found.mcse) else math.inf
    count = int(min(wanted, MOST_DRAWS, NUMBERS / len(found.labels)))
    return count if count > found.draws else None


def _judged(posterior: Record, draws: Draws, sites: Any) -> Loo:
    group = likelihood(posterior, draws.z)
    names = list(map(str, group)) if sites is None else _names(sites, group)
    values, labels, places = _columns(group, names)
    pointwise, k_hat, influence = _pointwise(values, draws.ratio)
    if draws.controls is not None:
        error, influence = explained(influence, draws.controls)
        pointwise = pointwise - error
    limit = min(1.0 - 1.0 / math.log10(max(len(values), 11)), 0.7)
    p = _log_score(values, draws.ratio) - pointwise
    known = bool((k_hat < limit).all())
    return Loo(
        elpd=float(pointwise.sum()),
        se=math.sqrt(len(labels) * float(pointwise.var())) if len(labels) > 1 else math.nan,
        mcse=_error(influence.sum(1), draws.copies, posterior.chain_count) if known else math.inf,
        p=float(p.sum()),
        method="approximate" if draws.ratio is not None else "plain",
        status=posterior.verdict.status,
        draws=len(values),
        k_limit=limit,
        labels=tuple(labels),
        pointwise=pointwise,
        k_hat=k_hat,
        p_pointwise=p,
        sites=places,
    )


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


def _pointwise(values: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return elpd and k-hat of each observation (N,), and what each draw moves each elpd by (S, N).

    Draw s has the weight :math:`w_{si} \propto p(z_s) / (q(z_s)\, p(y_i \mid z_s))`, without p / q for draws of the
    posterior; :math:`\text{elpd}_i = \log \sum_s w_{si}\, p(y_i \mid z_s)`.
    """
    elpd, shapes, influence = [], [], []
    for column in values.T:
        weights, k_hat = psis(-column if base is None else base - column)
        found = torch.logsumexp(weights + column, 0)
        elpd.append(found)
        shapes.append(k_hat)
        influence.append(torch.nan_to_num((weights + column - found).exp() - weights.exp()))
    return torch.stack(elpd), torch.tensor(shapes, dtype=values.dtype), torch.stack(influence, 1)


def _log_score(values: Tensor, base: Tensor | None) -> Tensor:
    """Return the log predictive density of the data in hand (N,)."""
    weights = values.new_full((len(values),), -math.log(len(values))) if base is None else psis(base)[0]
    return torch.logsumexp(weights[:, None] + values, 0)


def _error(influence: Tensor, copies: Tensor | None, chains: int) -> float:
    """Return the standard error of a sum over draws: copies of a draw are one, chains have their effective size."""
    if copies is not None:
        influence = influence.new_zeros(int(copies.max()) + 1).index_add(0, copies, influence)
    squares = float(influence.square().sum())
    if chains > 1:
        squares *= len(influence) / _arviz.effective_draws(influence.reshape(chains, -1))
    return math.sqrt(squares)
