"""Models of the same data, compared by predictive score and by evidence."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flows.inference.record import Record
from pyro_flows.posterior.comparison.draws import in_hand
from pyro_flows.posterior.comparison.evidence import Evidence, evidence, improper_priors
from pyro_flows.posterior.comparison.loo import Loo, as_loo, work_for
from pyro_flows.posterior.comparison.pointwise import Sites
from pyro_flows.posterior.comparison.working import Whole, Work, goal_of, over_observations
from pyro_flows.posterior.export.arviz_groups import observed_group
from pyro_flows.support import checks
from pyro_flows.support.process.progress import Bar

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "was not looked at: it is a fit of minibatches"


@dataclass(frozen=True, eq=False)
class Comparison:
    r"""Models of the same data, the best elpd first; :attr:`table` has a row for each.

    Attributes:
        names: of the models.
        loo: leave-one-out cross-validation of each, nats.
        weights: stacking weights, the largest :math:`\sum_i \log \sum_k w_k\, p(y_i \mid y_{-i}, M_k)`.
        evidence: of each, nats; None where it has no honest error, or an improper prior.
        notes: what was left out, and what to know before the figures are used.

    Sources: stacking, Yao et al. 2018 (arXiv 1704.02030). Cost: that of :meth:`Posterior.loo` and of
    :meth:`Posterior.evidence` for each model.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.sum() / 4.01, 4.01**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> posterior = pf.diagnose(model, guide, y, draws=400)
    >>> found = pf.compare({"one": posterior, "the same": posterior})
    >>> sorted(found.table.index), bool(found.table["elpd_diff"].abs().max() < 1e-6)
    (['one', 'the same'], True)
    """

    names: tuple[str, ...]
    loo: dict[str, Loo] = field(repr=False)
    weights: dict[str, float]
    evidence: dict[str, Evidence | None] = field(repr=False)
    notes: tuple[str, ...] = ()

    def difference(self, one: str, other: str) -> tuple[float, float]:
        """Return elpd of ``one`` less that of ``other``, and its standard error over the paired observations."""
        away = self.loo[one].pointwise - self.loo[other].pointwise
        return float(away.sum()), over_observations(away)

    def log_bayes_factor(self, one: str, other: str) -> tuple[float, float]:
        """Return log p(y | one) - log p(y | other), nats, and its standard error; NaN where one has no evidence."""
        first, second = self.evidence[one], self.evidence[other]
        if one == other:
            return 0.0, 0.0
        if first is None or second is None:
            return math.nan, math.nan
        return first.value - second.value, math.hypot(first.standard_error, second.standard_error)

    @property
    def table(self) -> pd.DataFrame:
        """One row a model, with elpd, its error and difference to the best, weight, evidence, Bayes factor and verdict.

        ``log_bf`` is the log Bayes factor against the first row, the model of the best elpd.
        """
        import pandas as pd

        rows = []
        for name in self.names:
            found, (away, error) = self.loo[name], self.difference(name, self.names[0])
            evidence, (factor, factor_error) = self.evidence[name], self.log_bayes_factor(name, self.names[0])
            rows.append(
                {
                    "elpd": found.elpd,
                    "se": found.se,
                    "p": found.p,
                    "elpd_diff": away,
                    "diff_se": error,
                    "weight": self.weights[name],
                    "log_evidence": math.nan if evidence is None else evidence.value,
                    "evidence_se": math.nan if evidence is None else evidence.standard_error,
                    "log_bf": factor,
                    "bf_se": factor_error,
                    "verdict": found.status,
                    "high_k": len(found.high),
                }
            )
        return pd.DataFrame(rows, index=list(self.names))

    def __str__(self) -> str:
        best, *others = self.names
        lines = [self.table.round(3).to_string()]
        for name in others:
            (away, error), (factor, factor_error) = self.difference(best, name), self.log_bayes_factor(best, name)
            said = f"elpd of {best} above that of {name} by {away:.2f}, standard error {error:.2f}"
            if math.isfinite(factor):
                said += f"; log Bayes factor {factor:.3f}, standard error {factor_error:.3f}"
            lines.append(said + ".")
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>Note: {html.escape(note)}.</p>" for note in self.notes)
        return f"{self.table.round(3).to_html()}{notes}"


@checks.options
def compare(
    posteriors: Mapping[str, Record],
    *,
    sites: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    r"""Compare models of the same data: leave-one-out elpd, stacking weights, evidence, Bayes factors, verdicts.

    Elpd, :math:`\sum_i \log p(y_i \mid y_{-i})`, asks which model predicts new data better. The evidence,
    :math:`\log p(y)`, asks which model the data speak for, priors included. Both are in nats. They can disagree, and
    the evidence changes with priors that no prediction feels.

    Args:
        posteriors: two or more posteriors by name.
        sites: observed sites to leave observations out of; all by default.
        seed: of the evidence's draws.
        progress: show what is being done, as :func:`fit` does, if it takes more than two seconds.

    Returns:
        A :class:`Comparison`; its ``table`` has one row a model.

    Raises:
        ValueError: for fewer than two models; naming the models, for other data, another grouping of the data into
            observations, or an unreliable verdict.

    The target for the difference in elpd to the best model is a Monte Carlo error of a fiftieth of its standard error
    over the paired observations, or of .02 nats if that is more. A note says where it is more than a tenth.

    Of fits of minibatches, only the number of rows is compared, and a note says so.

    Cost: leave-one-out and evidence of each model.

    References: Vehtari, Gelman and Gabry 2017 (arXiv 1507.04544); Yao et al. 2018 (stacking, arXiv 1704.02030); Kass
    and Raftery 1995 (doi:10.1080/01621459.1995.10476572).

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y, scale):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, scale))
    ...     with pyro.plate("row", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> def guide(y, scale):
    ...     precision = len(y) + scale**-2
    ...     pyro.sample("mu", dist.Normal(y.sum() / precision, precision**-0.5))
    >>> y = torch.tensor([0.4, 1.3, -0.2, 0.9])
    >>> found = pf.compare({str(scale): pf.diagnose(model, guide, y, scale) for scale in (1.0, 10.0)})
    >>> found.names, round(found.log_bayes_factor("1.0", "10.0")[0], 2)
    (('1.0', '10.0'), 2.05)
    """
    if not isinstance(posteriors, Mapping) or len(posteriors) < 2:
        raise ValueError("posteriors: expected two or more by name, {'a': a, 'b': b}.")
    for name, posterior in posteriors.items():
        if not isinstance(posterior, Record):
            raise ValueError(f"posteriors[{name!r}]: expected a Posterior, got a {type(posterior).__name__}.")
    rows = [name for name, one in posteriors.items() if one.density is not None and one.density.by_rows]
    _check_data({name: one for name, one in posteriors.items() if name not in rows})
    with Bar("compare", progress, quick=True) as bar:
        found = _left_out(posteriors, sites, bar)
        names = tuple(sorted(found, key=lambda name: -found[name].elpd))
        weights = stacking_weights(torch.stack([found[name].pointwise for name in names]))
        evidences, notes = _evidences(posteriors, seed, bar)
        bar.close(f"{names[0]} has the best elpd of {len(names)} models")
    return Comparison(
        names=names,
        loo={name: found[name] for name in names},
        weights=dict(zip(names, weights, strict=True)),
        evidence={name: evidences[name] for name in names},
        notes=(*_about_errors(names, found), *notes, *(f"whether {name} has the same data {UNKNOWN}" for name in rows)),
    )


def stacking_weights(elpd: Tensor) -> list[float]:
    """Return the weights of K models that maximize the log score of their mixture, from pointwise elpd (K, N)."""
    from scipy.optimize import minimize

    densities = (elpd - elpd.amax(0)).double().exp().cpu().numpy()  # weights stay the same, and not all underflow
    count = len(densities)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixture = weights @ densities + np.finfo(float).tiny
        return -np.log(mixture).mean(), -(densities / mixture).mean(1)

    sum_is_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1.0, "jac": np.ones_like}
    options = {"ftol": 1e-15, "maxiter": 1000}
    start, bounds = np.full(count, 1.0 / count), [(0.0, 1.0)] * count
    found = minimize(loss, start, jac=True, method="SLSQP", bounds=bounds, constraints=sum_is_one, options=options)
    weights = np.clip(found.x, 0.0, None)
    return (weights / weights.sum()).tolist()


def _left_out(posteriors: Mapping[str, Record], sites: Sites, bar: Bar) -> dict[str, Loo]:
    """Return leave-one-out of each model, whose Monte Carlo error is small beside that of its differences, too."""
    works, wholes = dict[str, Work](), dict[str, Whole]()
    for name, posterior in posteriors.items():
        bar.task = f"compare, {name}"
        try:
            works[name] = work_for(posterior, sites, 0, bar)
            wholes[name] = works[name].precise(works[name].given(in_hand(posterior)))
        except ValueError as error:
            raise ValueError(f"posteriors[{name!r}]: {error}") from error
    _check_observations(wholes)
    for name, goal in _goals({name: whole.elpd for name, whole in wholes.items()}).items():
        bar.task = f"compare, {name}"
        if goal < wholes[name].error < math.inf:
            wholes[name] = works[name].precise(wholes[name].given, goal)
    bar.task = "compare"
    return {name: as_loo(works[name], whole) for name, whole in wholes.items()}


def _goals(elpd: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what the Monte Carlo error of each model is to come to: a share of that of its difference to the best one.

    The best model's is that of its smallest difference. Both errors add to the difference, so each has half its square.
    """
    best = max(elpd, key=lambda name: float(elpd[name].sum()))
    goals = {name: goal_of(terms - elpd[best]) / math.sqrt(2.0) for name, terms in elpd.items() if name != best}
    return {**goals, best: min(goals.values())}


def _about_errors(names: Sequence[str], found: Mapping[str, Loo]) -> list[str]:
    """Say of which models elpd, or its difference to the best one, hangs on the draws."""
    notes = [f"{name} has k-hats above the limit, so its elpd is not known" for name in names if found[name].high]
    best = found[names[0]]
    for name in names[1:]:
        error = math.hypot(best.mcse, found[name].mcse)
        paired = over_observations(found[name].pointwise - best.pointwise)
        if 0.1 * paired < error < math.inf:
            said = f"the elpd of {name} less that of {names[0]} has a Monte Carlo error of {error:.2g} nats"
            notes.append(f"{said}, and a standard error over observations of {paired:.2g}")
    return notes


def _evidences(posteriors: Mapping[str, Record], seed: int, bar: Bar) -> tuple[dict[str, Evidence | None], list[str]]:
    """Return the evidence of each model, None where there is no honest one, and why."""
    found, notes = dict[str, Evidence | None](), []
    for name, posterior in posteriors.items():
        bar.watch(f"the evidence of {name}")
        found[name] = None
        if improper := improper_priors(posterior):
            notes.append(f"no evidence of {name}: the prior of {', '.join(improper)} is improper")
            continue
        try:
            estimate = evidence(posterior, method="auto", seed=seed)
        except ValueError as error:
            notes.append(f"no evidence of {name}: {error}".rstrip("."))
            continue
        if math.isfinite(estimate.standard_error):
            found[name] = estimate
        else:
            notes.append(f"no evidence of {name}: no method states its error")
    return found, notes


# whether models are of the same data ----------------------------------------------------------------------------------


def _check_data(posteriors: Mapping[str, Record]) -> None:
    """Refuse posteriors whose models observe other values."""
    for posterior in posteriors.values():
        posterior._check_unchanged()
    data = {name: _data(posterior) for name, posterior in posteriors.items()}
    first = next(iter(data), "")
    for name, values in data.items():
        why = _differ(data[first], values)
        if why is not None:
            raise ValueError(
                f"posteriors: {first!r} and {name!r} are of different data, so neither elpd nor evidence can be "
                f"compared: {why}. A transformed outcome is other data too."
            )


def _data(posterior: Record) -> dict[str, np.ndarray]:
    """Return the observed values by site, those that masks leave out excepted."""
    group = posterior._stored[0].get("observed_data") if posterior._stored else observed_group(posterior._need_model())
    return {} if group is None else {str(name): values.to_numpy() for name, values in group.data_vars.items()}


def _differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str | None:
    """Return in words how data differ; sites may have other names, if they come in the same order."""
    pairs = [(name, name) for name in one] if set(one) == set(other) else list(zip(one, other, strict=False))
    if len(one) != len(other):
        return f"sites {', '.join(one) or 'none'} and {', '.join(other) or 'none'}"
    for mine, theirs in pairs:
        a, b = one[mine], other[theirs]
        if a.size != b.size:
            return f"{a.size} values of {mine!r} and {b.size} of {theirs!r}"
        if not np.allclose(a.ravel().astype(float), b.ravel().astype(float), rtol=1e-5, atol=0.0, equal_nan=True):
            return f"the values of {mine!r}" + ("" if mine == theirs else f" and {theirs!r}")
    return None


def _check_observations(found: Mapping[str, Whole]) -> None:
    """Refuse models that group the data into other observations."""
    for one, other in itertools.pairwise(found):
        sizes = len(found[one].elpd), len(found[other].elpd)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"posteriors: {one!r} takes the data for {sizes[0]} observations, {other!r} for {sizes[1]}; give the "
                "outcome the same event dimensions in both."
            )
