"""What a posterior shows: text, table, ArviZ object."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pyro_flows import _arrays, _arviz, _checks
from pyro_flows._arrays import ALL, Chosen
from pyro_flows.results import arviz_groups, labeled
from pyro_flows.results.dims import Labeling
from pyro_flows.results.record import Record, attributes, counted

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

ROWS_SHOWN = 30


@_checks.methods
class Shown(Record):
    """A posterior as text, as a table and as an ArviZ object; see :class:`~pyro_flows.Posterior`."""

    def __str__(self) -> str:
        count, chains = len(self._used), self.chain_count
        each = f"{chains} chain{'s' if chains > 1 else ''} of {count // chains}" if self._by_chains else count
        known = self.verdict.supports_evidence
        evidence = f", log evidence {self.log_evidence:.2f}" if known else ""
        told = known and not self._by_chains and self.log_evidence - self.elbo < 1000.0  # else one draw has made it
        elbo = f", ELBO {self.elbo:.2f}" if told else ""
        about = f"{self.described}, {each} draws, {counted(self)}{evidence}{elbo}"
        return f"Posterior of {', '.join(self.samples)}: {about}\n{self.verdict}"

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        table = self._table(ALL)
        hidden = len(table) - ROWS_SHOWN
        note = f"<p>and {hidden} more rows: <code>summary()</code> has them all</p>" if hidden > 0 else ""
        about = html.escape(str(self).partition("\n")[0])
        return f"<p>{about}<br>{self.verdict._repr_html_()}</p>{table.head(ROWS_SHOWN).to_html()}{note}"

    def summary(
        self,
        var_names: str | Sequence[str] | None = None,
        *,
        filter_vars: str | None = None,
        coords: Mapping[str, object] | None = None,
        ci_kind: str | None = None,
        ci_prob: float | None = None,
        round_to: int | str = "auto",
    ) -> pd.DataFrame:
        r"""Return a table of the draws to use, one row a scalar.

        Columns: mean, sd, interval, :math:`\text{sd} / \sqrt{\text{ess}}`, and ``ess``, the number of independent
        posterior draws that these are worth (:attr:`effective`; NaN if the verdict is unreliable). Draws are
        independent, so there is no R-hat; of Markov chains (verdict refined, or :func:`from_mcmc`), each row has
        ``ess_bulk``, ``ess_tail`` and ``r_hat`` of its own.

        Args:
            var_names: variables to show, as in ArviZ (``"~eta"``: all but that one); all by default.
            filter_vars: ``"like"`` or ``"regex"``: ``var_names`` are parts of names, or regular expressions.
            coords: labels of the entries to show, ``{"school": ["Choate"]}``; :meth:`assign_coords` sets labels.
            ci_kind: ``"hdi"`` or ``"eti"``; the installed ArviZ's default otherwise.
            ci_prob: the interval's probability; the installed ArviZ's default otherwise.
            round_to: decimals, ``"auto"`` for three digits of each row's sd, or ``"none"``.

        Raises:
            ValueError: for an unknown name, dimension, label or kind, or a probability outside of (0, 1).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(1.0, 2.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))
        >>> guide = lambda: pyro.sample("x", dist.Normal(0.6, 0.8**0.5))
        >>> posterior = pf.diagnose(model, guide, draws=1000)
        >>> list(posterior.summary("x", ci_kind="eti", ci_prob=0.9).columns)
        ['mean', 'sd', 'eti90_lb', 'eti90_ub', 'mcse_mean', 'ess']
        """
        chosen: Chosen = {"var_names": var_names, "filter_vars": filter_vars, "coords": coords}
        table = self._table(chosen, ci_kind, ci_prob, round_to)
        self._hand_on("summary()")
        return table

    def _table(
        self,
        chosen: Chosen = ALL,
        ci_kind: str | None = None,
        ci_prob: float | None = None,
        round_to: int | str = "auto",
    ) -> pd.DataFrame:
        """Return the table of variables and labels that are chosen as in ArviZ."""
        draws = _arviz.select(labeled.posterior_group(self), **chosen)
        kind, prob = _arviz.default_interval()
        kind = _checks.choice("ci_kind", ci_kind or kind, ("eti", "hdi"))
        ess = None if self._by_chains else self.effective
        return _arviz.summary(draws, ess=ess, kind=kind, prob=prob if ci_prob is None else ci_prob, round_to=round_to)

    def assign_coords(
        self, coords: Mapping[str, object] | None = None, *, dims: Mapping[str, Sequence[str]] | None = None
    ) -> Self:
        """Return the same posterior with labels, which tables, figures, ArviZ objects, reports and files then have.

        Args:
            coords: labels of dimensions, ``{"school": ["Choate", ...]}``; see :meth:`to_arviz` for their names.
            dims: names of the dimensions of variables, ``{"theta": ["school"]}``.

        Raises:
            ValueError: naming the variable, the dimension or the length that does not fit.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     with pyro.plate("school", 2):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> def guide(y):
        ...     with pyro.plate("school", 2):
        ...         pyro.sample("theta", dist.Normal(y / 2, 0.5**0.5))
        >>> posterior = pf.diagnose(model, guide, torch.tensor([1.0, 0.0]), draws=1000)
        >>> list(posterior.assign_coords({"school": ["Choate", "Deerfield"]}).summary().index)
        ['theta[Choate]', 'theta[Deerfield]']
        """
        structure = labeled.structural_groups(self)
        if self._stored is None:
            structure = self._labeling.applied(structure)
        _arrays.relabel(structure, coords, dims)  # all that does not fit is found here
        more = Labeling().joined(coords, dims)
        stored = self._stored and (more.applied(self._stored[0]), self._stored[1])
        return replace(self, _labeling=self._labeling.joined(coords, dims), _stored=stored)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, object] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        predictive: bool = True,
    ) -> Any:
        """Return everything as one ArviZ object: a ``DataTree``, or an ``InferenceData`` where ArviZ 0.x is installed.

        Draws are one chain: they are independent and are not cut into false chains; those of a sampler (verdict
        refined) are as many chains as it had. Dimensions are named after plates (with the suffix ``_dim`` if a variable
        has that name), others ``{site}_dim_0`` and so on. Entries that a mask takes out (``obs_mask``) are left out,
        with one dimension ``{site}_entry`` for what remains.

        Groups: ``posterior``, the draws to use; ``sample_stats`` with their ``log_p``, ``log_q`` (unconstrained
        coordinates), ``log_weight`` (the normalized log weight that a draw still carries) and ``lp``;
        ``log_likelihood``, ``log_prior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``,
        ``constant_data``, ``unconstrained_posterior``, ``fit``; and, if the draws were importance-resampled or are a
        sampler's, the guide's own as ``raw_posterior`` and ``raw_sample_stats``. The ``sample_stats`` of a sampler also
        have ``acceptance_rate``, ``diverging``, ``energy``, ``energy_error``, ``n_steps`` and ``step_size``. Models
        with enumerated latents have neither deterministic sites nor a pointwise log likelihood; improper priors cannot
        be drawn from.

        Args:
            coords: labels of dimensions, ``{"school": ["Choate", ...]}``.
            dims: names of the dimensions of variables, ``{"theta": ["school"]}``.
            predictive: whether to draw from the posterior and prior predictive distributions.

        Raises:
            ValueError: naming the variable, the dimension or the length that does not fit.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     with pyro.plate("school", 3):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 0.0, 2.0])
        >>> def guide(y):
        ...     with pyro.plate("school", 3):
        ...         pyro.sample("theta", dist.Normal(y / 2, 0.5**0.5))
        >>> posterior = pf.diagnose(model, guide, y, draws=1000)
        >>> dict(posterior.to_arviz(predictive=False)["posterior"].sizes)
        {'chain': 1, 'draw': 1000, 'school': 3}
        """
        groups, attrs = self._groups(predictive)
        packed = _arviz.pack(_arrays.relabel(groups, coords, dims), attrs)
        self._hand_on("to_arviz()")
        return packed

    def _groups(self, predictive: bool) -> tuple[dict[str, xr.Dataset], dict[str, str | float]]:
        if self._stored is None:
            groups = arviz_groups.all_groups(self, self._need_density(), predictive=predictive)
            return self._labeling.applied(groups), attributes(self)
        groups, attrs = self._stored
        if "groups" in self.missing:
            warnings.warn(f"only the groups {', '.join(groups)} are there: {self.missing['groups']}.", stacklevel=3)
        drawn = () if predictive else ("posterior_predictive", "prior", "prior_predictive")
        return {name: group for name, group in groups.items() if name not in drawn}, attrs
