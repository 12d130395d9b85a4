"""The draws of a posterior: as text, table and ArviZ object; more of them, resampled, refined, new, predictive."""

from __future__ import annotations

import html
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from pyro_flows.inference.record import Record, attributes, counted
from pyro_flows.inference.verdict.weighing import resample
from pyro_flows.model.arguments import usable
from pyro_flows.posterior.export import arviz_groups
from pyro_flows.support import arviz, checks
from pyro_flows.support.numbers import arrays
from pyro_flows.support.numbers.arrays import ALL, Chosen
from pyro_flows.support.process.threads import alone

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

ROWS_SHOWN = 30


@checks.methods
class Drawn(Record):
    """A posterior that shows its draws and gives more of them; see :class:`~pyro_flows.Posterior`."""

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
        draws = arviz.select(arviz_groups.posterior_group(self), **chosen)
        kind, prob = arviz.default_interval()
        kind = checks.choice("ci_kind", ci_kind or kind, ("eti", "hdi"))
        ess = None if self._by_chains else self.effective
        return arviz.summary(draws, ess=ess, kind=kind, prob=prob if ci_prob is None else ci_prob, round_to=round_to)

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
        structure = arviz_groups.structural_groups(self)
        if self._stored is None:
            structure = self._labeling.applied(structure)
        labeled = arrays.relabel(structure, coords, dims)
        stored = self._stored and (labeled, self._stored[1])
        return replace(self, _labeling=self._labeling.joined(labeled, coords, dims), _stored=stored)

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
        packed = arviz.pack(arrays.relabel(groups, coords, dims), attrs)
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

    # more draws -------------------------------------------------------------------------------------------------------

    def resample(self, draws: int | None = None, *, seed: int = 0, force: bool = False) -> dict[str, Tensor]:
        """Resample the raw draws by their importance weights: ``{name: (draws, *shape)}``, constrained.

        With verdict refined, the chains' draws are resampled, all with the same weight.

        Args:
            draws: how many; as many as there are raw draws by default.
            seed: of the resampling.
            force: resample even if the verdict is unreliable.

        Raises:
            ValueError: if the verdict is unreliable, so that weighting cannot mend the draws; or if a loaded posterior
                needs its model for this.
        """
        if self.verdict.status == "unreliable" and not force:
            raise ValueError(
                f"resample: the importance weights cannot be relied on ({'; '.join(self.verdict.reasons)}). "
                "Pass force=True to resample all the same."
            )
        count = len(self.z) if draws is None else draws
        self._hand_on("resample()")
        weights = self._used_log_weights if self.verdict.status == "refined" else self.log_weights
        index = resample(weights, count, seed=seed)
        if not self.resampled:
            return {name: values[index] for name, values in self.samples.items()}
        return self._need_density().constrain(self.z[index])

    def refine(
        self,
        method: str = "auto",
        *,
        chains: int = 64,
        max_steps: int = 2000,
        max_seconds: float = math.inf,
        seed: int | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Self:
        r"""Let a sampler finish the work: many short chains in the flow's latent space, begun at its draws.

        Where the flow T is close to the posterior, the target in latent space,
        :math:`\log\tilde p(T(x)) + \log|\det J_T(x)|`, is close to the base distribution, and a few leaps of
        microcanonical dynamics (MAMS) make a new draw. Step size, trajectory length and units are adapted.
        Chains begin in superchains of eight, half of them at importance-resampled draws and half at places where the
        flow is thin, and go on until nested R-hat is at most 1.01, R-hat 1.05, and the effective sample size 1000 in
        the bulk and in the tails of each coordinate and of the log density. Then the search for missed modes is made
        once more, from the chains' draws. The verdict is ``refined`` if nothing speaks against that; if chains need
        more time, it is what it was, with a reason or a note.

        Called again, it goes on where it was, as if it had not been cut short. The guide's own draws stay: ``z``.

        Args:
            method: ``"hmc"``: Hamiltonian moves alone; ``"auto"``: with one independent proposal of the flow before
                each move, unless its weights tell that it would be in vain. Chains of a mixture move in the latent
                space of one part at a time, and change parts.
            chains: how many, a multiple of 8.
            max_steps: bound on the moves of each chain, warm-up included; a move takes a few gradients.
            max_seconds: bound on the seconds.
            seed: of all moves; the posterior's own by default. One seed, one answer.
            progress: show what is being done, as :func:`fit` does.
            checkpoint: a file that keeps what chains have come to, as that of :func:`fit` does.

        Returns:
            A new posterior. Its draws to use are the chains', at least as many as before, if it is refined.

        Raises:
            ValueError: for a bad option, a checkpoint that is damaged or of another call, or if a
                loaded posterior needs its model for this.

        References: Hoffman et al. 2019 (arXiv 1903.03704); Hoffman, Radul and Sountsov 2021 (ChEES); Margossian et al.
        2024 (nested R-hat, arXiv 2110.13017); Li et al. 2024 (arXiv 2409.04332).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.3))
        >>> narrow = pf.diagnose(model, guide, torch.tensor(1.0), draws=1000)
        >>> narrow.verdict.status, narrow.refine().verdict.status
        ('unreliable', 'refined')
        """
        from pyro_flows.inference.chains.refine import refine

        return refine(
            self, method=method, chains=chains, progress=progress, checkpoint=checkpoint, max_steps=max_steps,
            max_seconds=max_seconds, seed=seed,
        )  # fmt: skip

    def sample(self, draws: int, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw anew in the way of the verdict: ``{name: (draws, *shape)}``, constrained.

        From the flow if it is ok (or unreliable, with a warning); resampled by importance weights from four times as
        many new draws if it is corrected; by going on with the chains if it is refined.

        Args:
            draws: how many.
            seed: of the draws: the same seed gives the same values.

        Raises:
            ValueError: if a loaded posterior has no model, if the guide is no flow, or for chains of NUTS.
        """
        from pyro_flows.inference.chains.refine import more_draws

        z = more_draws(self, draws, seed=seed)
        self._hand_on("sample()")
        return self._need_model().constrain(z)

    def local_samples(
        self,
        names: str | Sequence[str] | None = None,
        *,
        rows: Tensor | Sequence[int] | None = None,
        draws: int | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        r"""Draw latents of rows that a fit of minibatches has integrated out: ``{name: (draws, *shape)}``, constrained.

        .. math:: \theta_s \sim p(\theta \mid x), \qquad y_{is} \sim p(y_i \mid \theta_s, x_i)

        :math:`\theta_s` are the first draws to use, so that the two belong together. Each :math:`y_{is}` is resampled
        by importance weights from draws around the mode of the row given :math:`\theta_s`. Rows are independent of each
        other given :math:`\theta_s`, so that a few rows, or one chunk after the other, can be asked for.

        Args:
            names: sites in plates; all by default.
            rows: indices of rows in the plate that was integrated out row by row; all by default.
            draws: how many of the draws to use, from the first on; all by default.
            seed: of the drawing: the same seed gives the same values.

        Raises:
            ValueError: if no latents were integrated out, for a name that is no site in a plate, rows that are not
                there, more draws than there are, or if a loaded posterior has no model.

        Cost: one pass over the rows for each draw; memory: the values that are returned.

        Source: Rubin 1988 (sampling-importance resampling, in *Bayesian Statistics 3*).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("row", len(x), subsample_size=20) as index:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])
        >>> posterior = pf.fit(model, torch.linspace(-2.0, 4.0, 60), draws=200, progress=False)
        >>> posterior.local_samples("z", rows=[0, 59])["z"].shape
        torch.Size([200, 2])
        """
        density, z = self._need_density(), self._first(draws)
        self._hand_on("local_samples()")
        wanted = [names] if isinstance(names, str) else names
        with alone(), torch.no_grad():
            return density.local_samples(z, wanted, rows, seed=seed)

    def predictive(
        self,
        *args: object,
        draws: int | None = None,
        seed: int = 0,
        model_kwargs: Mapping[str, object] | None = None,
    ) -> dict[str, Tensor]:
        """Draw from the posterior predictive distribution: ``{name: (draws, *shape)}`` for each observed site.

        Without arguments, at the data of the fit. With arguments, the model is run on these: sites that are observed
        in that run are drawn anew, as are latent sites that the fit did not have (``y`` where ``y=None`` is passed);
        deterministic sites are there too.

        Args:
            args: the model's arguments, positional.
            draws: how many of the draws to use, from the first on; all by default.
            seed: of the drawing: the same seed gives the same values.
            model_kwargs: the model's keyword arguments.

        Raises:
            ValueError: if there are fewer draws, if a loaded posterior has no model, or if a latent site of the fit is
                missing from the new run or has another shape there.
        """
        density, z = self._need_density(), self._first(draws)
        self._hand_on("predictive()")
        if density.by_rows or (not args and model_kwargs is None):  # by rows, it is an error that says what to do
            return density.predictive(z, seed=seed)
        return arviz_groups.predict(density, z, *usable(density.model, args, model_kwargs), seed=seed)

    def _first(self, draws: int | None) -> Tensor:
        """Return so many of the draws to use, unconstrained, from the first on."""
        count = len(self._used)
        if draws is not None and draws > count:
            raise ValueError(f"draws: expected at most {count}, the draws that there are, got {draws}.")
        return self._used[:draws]
