"""Leave-one-out cross-validation that is right for the draws at hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_flows.model.sites import is_factor, messages
from pyro_flows.posterior.comparison.draws import can_draw, in_hand
from pyro_flows.posterior.comparison.pointwise import Sites, log_score
from pyro_flows.posterior.comparison.working import Whole, Work, over_observations
from pyro_flows.support import checks
from pyro_flows.support.process.progress import Bar

if TYPE_CHECKING:
    import pandas as pd

    from pyro_flows.inference.record import Record

METHODS = {
    "plain": "PSIS-LOO of draws of the posterior",
    "approximate": "approximate-posterior PSIS-LOO of the method's own draws",
}


@dataclass(frozen=True, eq=False)
class Loo:
    r"""Leave-one-out cross-validation: :math:`\text{elpd} = \sum_i \log p(y_i \mid y_{-i})`, nats.

    Attributes:
        elpd: expected log pointwise predictive density, summed over observations.
        se: its standard error over observations, :math:`\sqrt{N \operatorname{var}_i}`.
        mcse: its Monte Carlo standard error, over draws: a fiftieth of ``se`` or .02 nats, unless that took more draws
            than the limits allow; infinite where some k-hat is above its limit.
        p: effective number of parameters, the log score of the data in hand less ``elpd``.
        method: ``"approximate"``: draws of q, weighted by p / q as well (Magnusson et al. 2019); ``"plain"``: draws of
            the posterior, resampled or by Markov chains (Vehtari et al. 2017).
        status: of the verdict on the draws.
        draws: how many there are, of those that most of the estimates are from.
        k_limit: what k-hat must be below.
        labels: of the observations, ``y[Choate]``.
        pointwise: elpd of each observation (N,).
        k_hat: Pareto shape of the weights that leave it out (N,): how much the posterior hangs on it.
        k_moved: the same for the draws that its estimate is from (N,): moved to where the posterior without it lies,
            or as they are.
        p_pointwise: what it adds to ``p`` (N,).
        sites: for each observed site, its first observation and the one after its last.
        joint: the sites that are one observation of several values, in words.
        factors: the names of each ``pyro.factor`` that depends on latents. It counts as a prior, in no observation.

    Sources: Vehtari, Gelman and Gabry 2017 (arXiv 1507.04544); approximate-posterior LOO, Magnusson et al. 2019
    (arXiv 1904.10679); moved draws, after Paananen et al. 2021 (arXiv 1906.08850). Cost: the log likelihood of all
    observations at each draw, up to 64 000 further draws, and up to two million moved ones.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.sum() / 4.01, 4.01**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)
    >>> found = posterior.loo()
    >>> found.method, found.labels[0], found.high
    ('approximate', 'y[0]', ())
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
    k_moved: Tensor = field(repr=False)
    p_pointwise: Tensor = field(repr=False)
    sites: dict[str, tuple[int, int]] = field(repr=False)
    joint: tuple[str, ...] = field(default=(), repr=False)
    factors: tuple[str, ...] = field(default=(), repr=False)

    @property
    def high(self) -> tuple[str, ...]:
        """The observations whose elpd is not known, since k-hat is not below the limit, for moved draws either."""
        return tuple(self.labels[i] for i in (~(self.k_moved < self.k_limit)).nonzero().flatten().tolist())

    @property
    def moved(self) -> tuple[str, ...]:
        """The observations whose estimate is from moved draws."""
        return tuple(self.labels[i] for i in (self.k_moved != self.k_hat).nonzero().flatten().tolist())

    def __str__(self) -> str:
        lines = [
            f"elpd {self.elpd:.2f} nats, standard error {_known(self.se, 2)}, p {self.p:.2f}, by "
            f"{METHODS[self.method]} ({self.draws} draws, {self.status}); Monte Carlo error {_known(self.mcse, 3)}. "
            f"{self._about_k()}"
        ]
        if len(self.sites) > 1:
            for site, elpd, se, count in self.by_site()[["elpd", "se", "observations"]].itertuples():
                lines.append(f"- {site}: elpd {elpd:.2f}, standard error {_known(se, 2)}, of {count}")
        if self.factors:
            named = ", ".join(map(repr, self.factors))
            lines.append(
                f"Not in the likelihood: pyro.factor {named}, which counts as a prior. If it is a part of the "
                "likelihood, this elpd is wrong: write it into the distribution of the data."
            )
        return "\n".join(lines)

    def _about_k(self) -> str:
        if self.joint and len(self.joint) == len(self.labels):
            return f"{'; '.join(self.joint)}: write the values in a plate to leave them out one by one."
        if not self.high:
            moved = f", with draws moved for {len(self.moved)} of them" if self.moved else ""
            return f"All {len(self.labels)} k-hats are below {self.k_limit:.2f}{moved}."
        said = ", ".join(self.high[:3]) + (f" and {len(self.high) - 3} more" if len(self.high) > 3 else "")
        return f"k-hat is not below {self.k_limit:.2f} for {said}: leave them out in fits of their own."

    __repr__ = __str__

    def by_site(self) -> pd.DataFrame:
        """Return a table of the observed sites: observations, elpd, its standard error, p, number of high k-hats.

        An observation of one site is left out while those of the other sites stay, as ArviZ's ``var_name`` does it.
        """
        import pandas as pd

        rows = {}
        for site, (first, last) in self.sites.items():
            part = slice(first, last)
            rows[site] = {
                "observations": last - first,
                "elpd": float(self.pointwise[part].sum()),
                "se": over_observations(self.pointwise[part]),
                "p": float(self.p_pointwise[part].sum()),
                "high_k": int((~(self.k_moved[part] < self.k_limit)).sum()),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def leverage(self, count: int | None = 10) -> pd.DataFrame:
        """Return a table of the observations with the largest k-hat, the largest first; all of them with None.

        The posterior without an observation of large k-hat differs much from the one with it: an outlier, a wrong
        value, or one that alone tells of a parameter.
        """
        import pandas as pd

        table = pd.DataFrame(
            {"k_hat": self.k_hat.numpy(), "elpd": self.pointwise.numpy(), "p": self.p_pointwise.numpy()},
            index=list(self.labels),
        ).sort_values("k_hat", ascending=False, kind="stable")
        return table if count is None else table.head(checks.integer("count", count, 1))


def loo(posterior: Record, *, sites: Sites, draws: int | None, seed: int, progress: bool) -> Loo:
    """Estimate leave-one-out elpd; see :meth:`Posterior.loo`."""
    with Bar("loo", progress, quick=True) as bar:
        work = work_for(posterior, sites, seed, bar)
        if draws is not None and can_draw(posterior):
            found = as_loo(work, work.moved(work.drawn(draws)))
        else:
            found = as_loo(work, work.precise(work.given(in_hand(posterior))))
        bar.close(f"elpd {found.elpd:.2f}, standard error {_known(found.se, 2)}")
    return found


def work_for(posterior: Record, sites: Sites, seed: int, bar: Bar) -> Work:
    """Return what does the work, unless the draws are not to be used."""
    if posterior.verdict.status == "unreliable":
        raise ValueError(
            f"loo: the verdict on the draws is unreliable ({'; '.join(posterior.verdict.reasons)}), and "
            "cross-validation with them is wrong without a sign of it."
        )
    posterior._check_unchanged()
    return Work(posterior, sites, seed, bar.watch)


def as_loo(work: Work, found: Whole) -> Loo:
    """Put estimates into the result."""
    posterior, given, elpd = work.posterior, found.given, found.elpd
    p = log_score(given.values, given.draws.ratio) - elpd
    return Loo(
        elpd=float(elpd.sum()),
        se=over_observations(elpd),
        mcse=math.hypot(found.error, _level_error(posterior)),
        p=float(p.sum()),
        method="approximate" if given.draws.ratio is not None else "plain",
        status=posterior.verdict.status,
        draws=len(given.values),
        k_limit=given.limit,
        labels=tuple(given.labels),
        pointwise=elpd,
        k_hat=found.k_hat,
        k_moved=found.k_moved,
        p_pointwise=p,
        sites=given.places,
        joint=tuple(_joint(posterior, given.places)),
        factors=tuple(_factors(posterior)),
    )


def _level_error(posterior: Record) -> float:
    """Return the error that likelihoods of rows, estimated by draws, have at all draws alike, nats; 0 without any."""
    density = posterior.density
    return density.known_rounding(posterior._used) if density is not None and density.by_rows else 0.0


def _joint(posterior: Record, places: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Say which sites are one observation of several values; of a posterior without its model, none are known."""
    observed = {} if posterior.density is None else posterior.density.structure.observed
    for name, (first, last) in places.items():
        if last - first == 1 and name in observed and observed[name].numel() > 1:
            yield f"{name!r} is one observation of {observed[name].numel()} values"


def _factors(posterior: Record) -> Iterator[str]:
    """Name the factors whose values differ between two draws."""
    density = posterior.density
    if density is None or not any(map(is_factor, messages(density.structure.trace).values())):
        return
    with torch.no_grad():
        first, second = (messages(density.trace_at(z)) for z in posterior._used[[0, len(posterior._used) // 2]])
    for name in filter(second.__contains__, first):
        here, there = first[name], second[name]
        if is_factor(here) and not torch.equal(here["fn"].log_factor, there["fn"].log_factor):
            yield name


def _known(error: float, digits: int) -> str:
    return f"{error:.{digits}f}" if math.isfinite(error) else "not known"
