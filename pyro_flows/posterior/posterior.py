"""The frozen result of a fit: draws, weights, verdict, ArviZ, files."""

from __future__ import annotations

import copy
import html
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_flows import _arviz, _checks
from pyro_flows.flows.flow import Flow
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.model.log_density import LogDensity
from pyro_flows.results import arviz_groups, files
from pyro_flows.results.dims import Labels, coordinate_names
from pyro_flows.results.record import Record
from pyro_flows.results.scoring import check_memory, score_pool
from pyro_flows.results.stage import Stage
from pyro_flows.verdict.deciding import POOL, Draw, decide, resample
from pyro_flows.verdict.weighing import Weighing, weigh

if TYPE_CHECKING:
    import pandas as pd

    from pyro_flows.comparison.evidence import Evidence
    from pyro_flows.comparison.loo import Loo
    from pyro_flows.comparison.sensitivity import Sensitivity

ROWS_SHOWN = 30
UNPICKLED = "unpickled without a model"


@dataclass(frozen=True, eq=False, repr=False)
class Posterior(Record):
    """What a fit (or :func:`diagnose`) found. Nothing in it changes; methods give new values.

    If the verdict is unreliable, all methods that hand draws on (``summary``, ``to_arviz``, ``predictive``,
    ``resample``, ``save``), and :func:`load`, warn with an :class:`UnreliableWarning`, once for each line that calls
    them. Attributes and figures do not; figures show the status.

    Attributes:
        samples: the draws to use, constrained, deterministic sites too: ``{name: (draws, *shape)}``. Raw draws of the
            guide if the verdict is ok or unreliable, importance-resampled ones if it is corrected, draws of chains,
            one chain after the other, if it is refined.
        z: raw draws in unconstrained coordinates (S, D).
        log_p, log_q: unnormalised log posterior and log guide density of ``z`` (S,).
        log_weights: Pareto-smoothed, normalised log importance weights of ``z`` (S,).
        used: unconstrained coordinates of ``samples`` (S, D); ``used_log_p`` and ``used_log_q`` are their densities.
        k_hat: Pareto shape of the weights.
        ess: effective sample size of the weights (S is the best).
        elbo: evidence lower bound, nats, mean of ``log_p - log_q``.
        log_evidence: importance-sampling estimate of the log normaliser, nats.
        verdict: whether to believe the draws.
        losses: negative ELBO of each optimisation step (empty for :func:`diagnose`); with several runs, of the best.
        history: what happened during the fit, one dict a stage. Each has ``stage``, its name, and ``elbo``, what it
            reached in nats, None where a stage has none; the other entries go by the stage.
        settings: everything that :func:`fit` was told or chose, JSON values only.
        coordinates: names of the unconstrained coordinates.
        guide: the guide that drew ``z``; None after :func:`load` without a model. It knows of no weights: what it draws
            is like ``z``, and like ``samples`` unless these are importance-resampled.
        guide_name: its class.
        flow: the guide's :class:`Flow` over the unconstrained coordinates, a ``FlowMixture`` after runs that disagree;
            None if it has none. ``flow.log_prob(z)`` is ``log_q``.
        density: the model as a log density; None after :func:`load` without a model.
        missing: for each of ``guide``, ``flow`` and ``density`` that is None, why; and why ``groups`` of the ArviZ
            object are missing, if any are.
        chains: what a sampler came to, if :meth:`refine` was called, by ``fit`` or since: draws of each chain, and all
            that it takes to go on.

    It can be pickled (joblib, Dask): draws, verdict and flow go along, model, data and guide stay behind.
    """

    # what it says ---------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        sites = ", ".join(self.samples)
        return (
            f"Posterior of {sites}: {len(self.used)} draws, {self.z.shape[1]} unconstrained coordinates, "
            f"ELBO {self.elbo:.2f}, log evidence {self.log_evidence:.2f}, guide {self.guide_name}\n{self.verdict}"
        )

    __repr__ = __str__  # what a REPL shows

    def _repr_html_(self) -> str:
        table = self._table()
        hidden = len(table) - ROWS_SHOWN
        note = f"<p>and {hidden} more rows: <code>summary()</code> has them all</p>" if hidden > 0 else ""
        about = html.escape(str(self).partition("\n")[0])
        return f"<p>{about}<br>{self.verdict._repr_html_()}</p>{table.head(ROWS_SHOWN).to_html()}{note}"

    def summary(
        self,
        names: str | Sequence[str] | None = None,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        ci_kind: str | None = None,
        ci_prob: float | None = None,
        round_to: int | str = "auto",
    ) -> pd.DataFrame:
        r"""Return a table of the draws to use, one row a scalar.

        Columns: mean, sd, interval, :math:`\text{sd} / \sqrt{\text{ess}}`, and ``ess``, the number of independent
        posterior draws that these are worth (:attr:`effective`; NaN if the verdict is unreliable). Draws are
        independent, so there is no R-hat; with verdict refined, each row has ``ess_bulk``, ``ess_tail`` and ``r_hat``
        of its own.

        Args:
            names: sites to show; all by default.
            coords: labels of dimensions, see :meth:`to_arviz`.
            dims: names of dimensions, see :meth:`to_arviz`.
            ci_kind: ``"hdi"`` or ``"eti"``; the installed ArviZ's default otherwise.
            ci_prob: the interval's probability; the installed ArviZ's default otherwise.
            round_to: decimals, ``"auto"`` for three digits of each row's sd, or ``"none"``.

        Raises:
            ValueError: for a name that is no site, an unknown kind or a probability outside of (0, 1).

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(1.0, 2.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))
        >>> guide = lambda: pyro.sample("x", dist.Normal(0.6, 0.8**0.5))
        >>> posterior = pf.diagnose(model, guide, draws=1000)
        >>> list(posterior.summary("x", ci_kind="eti", ci_prob=0.9).columns)
        ['mean', 'sd', 'eti90_lb', 'eti90_ub', 'mcse_mean', 'ess']
        """
        table = self._table(names, coords=coords, dims=dims, ci_kind=ci_kind, ci_prob=ci_prob, round_to=round_to)
        self._hand_on("summary()")
        return table

    def _table(
        self,
        names: str | Sequence[str] | None = None,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        ci_kind: str | None = None,
        ci_prob: float | None = None,
        round_to: int | str = "auto",
    ) -> pd.DataFrame:
        draws = _arviz.relabel({"posterior": self._draws()}, coords, dims)["posterior"]
        if names is not None:
            wanted = [names] if isinstance(names, str) else names
            draws = draws[[_checks.choice("names", name, map(str, draws)) for name in wanted]]
        kind, prob = (ci_kind, ci_prob) if ci_kind and ci_prob else _arviz.default_interval()
        kind = _checks.choice("ci_kind", ci_kind or kind, ("eti", "hdi"))
        prob = prob if ci_prob is None else ci_prob
        if prob is None or not 0 < prob < 1:
            raise ValueError(f"ci_prob: expected a number between 0 and 1, got {prob!r}.")
        return self._table_of(draws, kind=kind, prob=prob, round_to=round_to)

    def _table_of(self, draws: Any, *, kind: str, prob: float, round_to: int | str) -> pd.DataFrame:
        ess = None if self.verdict.status == "refined" else self.effective
        return _arviz.summary(draws, ess=ess, kind=kind, prob=prob, round_to=round_to)

    def _draws(self) -> Any:
        if self.stored is not None:
            return self.stored[0]["posterior"]
        return arviz_groups.draws_group(Labels(self._need_density().structure), self.samples, self.chain_count)

    def to_arviz(
        self,
        *,
        coords: Mapping[str, Any] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        predictive: bool = True,
    ) -> Any:
        """Return everything as one ArviZ object: a ``DataTree``, or an ``InferenceData`` where ArviZ 0.x is installed.

        Draws are one chain: they are independent and are not cut into false chains; those of a sampler (verdict
        refined) are as many chains as it had. Dimensions are named after plates (with the suffix ``_dim`` if a variable
        has that name), others ``{site}_dim_0`` and so on. Entries that a mask takes out (``obs_mask``) are left out,
        with one dimension ``{site}_entry`` for what remains.

        Groups: ``posterior``, the draws to use; ``sample_stats`` with their ``log_p``, ``log_q`` (unconstrained
        coordinates), ``log_weight`` (the normalised log weight that a draw still carries) and ``lp``;
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
        packed = _arviz.pack(_arviz.relabel(groups, coords, dims), attrs)
        self._hand_on("to_arviz()")
        return packed

    def _groups(self, predictive: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.stored is None:
            return arviz_groups.all_groups(self, self._need_density(), predictive=predictive), arviz_groups.attributes(
                self
            )
        groups, attrs = self.stored
        if "groups" in self.missing:
            warnings.warn(f"only the groups {', '.join(groups)} are there: {self.missing['groups']}.", stacklevel=3)
        drawn = () if predictive else ("posterior_predictive", "prior", "prior_predictive")
        return {name: group for name, group in groups.items() if name not in drawn}, attrs

    # more draws -----------------------------------------------------------------------------------------------------

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
        count = len(self.z) if draws is None else _checks.integer("draws", draws, 1)
        self._hand_on("resample()")
        weights = self.used_log_weights if self.verdict.status == "refined" else self.log_weights
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
        progress: bool = False,
    ) -> Posterior:
        r"""Let a sampler finish the work: many short chains in the flow's latent space, begun at its draws.

        Where the flow T is close to the posterior, the target in latent space,
        :math:`\log\tilde p(T(x)) + \log|\det J_T(x)|`, is close to the base distribution, and a few leaps of
        Hamiltonian dynamics make a new draw. Step size and trajectory length are adapted across chains (ChEES). Chains
        begin in superchains of eight at importance-resampled draws, and go on until nested R-hat is at most 1.01,
        R-hat 1.05, and the effective sample size 1000 in the bulk and in the tails of each coordinate and of the log
        density. Then the search for missed modes is made once more, from the chains' draws. The verdict is ``refined``
        if nothing speaks against that; if chains need more time, it is what it was, with a reason or a note.

        Called again, it goes on where it was, as if it had not been cut short. The guide's own draws stay: ``z``.

        Args:
            method: ``"hmc"``; ``"imh"``: with four independent proposals of the flow, or mixture, before each move;
                ``"smc"``: chains begin where particles come to that are annealed from the flow to the posterior, which
                also gives ``log_evidence`` (its standard error is in ``history``); ``"nuts"``: four chains of Pyro's
                NUTS in the same space, slow, as a check; ``"auto"``: with one independent proposal before each move,
                unless the flow's weights tell that it would be in vain. Chains of a mixture move in the latent space of
                one part at a time, and change parts.
            chains: how many, a multiple of 8.
            max_steps: bound on the moves of each chain, warm-up included; a move takes a few gradients.
            max_seconds: bound on the seconds.
            seed: of all moves; the posterior's own by default. One seed, one answer.
            progress: show what is being done on one line.

        Returns:
            A new posterior. Its draws to use are the chains', at least as many as before, if it is refined.

        Raises:
            ValueError: for a bad option, NUTS with a mixture, or if a loaded posterior needs its model for this.

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
        from pyro_flows.correction.refine import refine

        options: dict[str, Any] = {"max_steps": max_steps, "max_seconds": max_seconds, "seed": seed}
        return refine(self, method=method, chains=chains, progress=progress, **options)

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
        from pyro_flows.correction.more import more_draws

        z = more_draws(self, _checks.integer("draws", draws, 1), seed=_checks.integer("seed", seed, 0))
        self._hand_on("sample()")
        return self._need_density().constrain(z)

    def predictive(
        self,
        *args: Any,
        draws: int | None = None,
        seed: int = 0,
        model_kwargs: Mapping[str, Any] | None = None,
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
        density = self._need_density()
        count = len(self.used) if draws is None else _checks.integer("draws", draws, 1)
        if count > len(self.used):
            raise ValueError(f"draws: expected at most {len(self.used)}, the draws that there are, got {count}.")
        self._hand_on("predictive()")
        z = self.used[:count]
        if not args and model_kwargs is None:
            return density.predictive(z, seed=seed)
        return arviz_groups.predict(density, z, args, dict(model_kwargs or {}), seed=seed)

    # evidence, cross-validation, sensitivity ------------------------------------------------------------------------

    def evidence(self, method: str = "auto", *, draws: int | None = None, seed: int = 0) -> Evidence:
        r"""Estimate the log evidence :math:`\log Z = \log \int \tilde p(z)\,dz`, nats, with an honest standard error.

        ``importance``: the mean of :math:`\tilde p / q` over fresh draws of the flow. ``bridge``: Meng and Wong's
        bridge between q and the draws to use, where these are of the posterior, that is, Markov chains; q is the flow,
        or, without one, a Student t fitted to the first half of each chain. ``smc``: what a run of sequential Monte
        Carlo left in ``history``. ``auto``: all that can be used; the one with the smallest standard error is chosen,
        and all are listed.

        Args:
            method: ``"auto"``, ``"importance"``, ``"bridge"`` or ``"smc"``.
            draws: of the flow or guide, 16 000 by default, each scored once. Without a model, the raw ones are taken.
            seed: of these draws.

        Returns:
            An :class:`Evidence`, which unpacks as ``value, standard_error, method``. The error is infinite where the
            verdict is unreliable, or k-hat too high for one.

        Raises:
            ValueError: for an unknown method, or one that these draws do not allow.

        References: Meng and Wong 1996; Frühwirth-Schnatter 2004; Vehtari et al. 2024.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        >>> guide = lambda: pyro.sample("x", dist.Normal(0.5, 0.75))
        >>> value, error, method = pf.diagnose(model, guide).evidence()
        >>> round(value, 1), error < 0.01, method
        (-1.5, True, 'importance')
        """
        from pyro_flows.comparison.evidence import evidence

        found = evidence(self, method=method, draws=draws, seed=seed)
        self._hand_on("evidence()")
        return found

    def loo(self, sites: str | Sequence[str] | None = None, *, draws: int | None = None, seed: int = 0) -> Loo:
        r"""Estimate the expected log predictive density by Pareto-smoothed leave-one-out cross-validation.

        .. math:: \text{elpd} = \sum_i \log p(y_i \mid y_{-i})

        Draws of q are weighted by :math:`\tilde p(z) / (q(z)\, p(y_i \mid z))` (approximate-posterior LOO), resampled
        draws and chains by :math:`1 / p(y_i \mid z)`. Each entry of an observed site is one observation; those of event
        dimensions go together.

        Args:
            sites: observed sites to leave observations out of; all by default.
            draws: new draws of the flow or guide, resampled if the verdict is corrected. By default those in hand, or
                as many new ones as bring the Monte Carlo error down to .005 nats, 64 000 at most. Chains have no
                others.
            seed: of new draws.

        Returns:
            A :class:`Loo`: elpd with its errors, k-hat and elpd of each observation, leverage.

        Raises:
            ValueError: if the verdict is unreliable, for models with enumerated latents or without data, and for a
                name that is no observed site.

        Cost: the likelihood of all draws, and a sort of them for each observation.

        References: Vehtari, Gelman and Gabry 2017; Magnusson et al. 2019.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("mu", dist.Normal(y.mean(), len(y) ** -0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor([0.1, 1.2, -0.4, 0.7])).loo()
        >>> found.method, found.high
        ('approximate', ())
        """
        from pyro_flows.comparison.loo import loo

        return loo(self, sites=sites, draws=draws, seed=seed)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Return the pointwise log likelihood of the draws to use, nats: ``{site: (draws, *batch)}``.

        Entries that a mask leaves out are 0. Models with enumerated latents have none: the dict is empty.

        Raises:
            ValueError: if a loaded posterior has no model.
        """
        found = self._need_density().log_likelihood(self.used)
        self._hand_on("log_likelihood()")
        return found

    def sensitivity(
        self, names: str | Sequence[str] | None = None, *, prior_sites: str | Sequence[str] | None = None
    ) -> Sensitivity:
        r"""Tell how much the posterior hangs on the prior and on the likelihood, by power scaling, without a refit.

        .. math:: p_\alpha(z) \propto p(z \mid y)\, p(\theta)^{\alpha - 1}, \qquad
                  p_\alpha(z) \propto p(z \mid y)\, p(y \mid z)^{\alpha - 1}, \qquad \alpha = .99, 1.01

        The figure is how fast the cumulative distribution of a scalar changes with :math:`\log_2 \alpha` (cumulative
        Jensen-Shannon distance). Only priors at the top are scaled. A group effect's prior is a part of the model:
        scaled too, it hides the sensitivity to the others.

        Args:
            names: sites to show; all by default.
            prior_sites: sites whose priors are scaled, instead of those found to be at the top.

        Returns:
            A :class:`Sensitivity`, with a table, the sites that were scaled, and why the others were not.

        Raises:
            ValueError: for an unknown name, if no prior stands at the top, or if a loaded posterior has no model.

        Reference: Kallioinen et al. 2024, "Detecting and diagnosing prior and likelihood sensitivity with
        power-scaling".

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(5.0, 0.5))
        ...     pyro.sample("y", dist.Normal(mu, 0.5), obs=y)
        >>> guide = lambda y: pyro.sample("mu", dist.Normal((y + 5) / 2, 0.5 / 2**0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor(7.0)).sensitivity()
        >>> found.prior_sites, found.table.loc["mu", "diagnosis"]
        (('mu',), 'prior and likelihood conflict')
        """
        from pyro_flows.comparison.sensitivity import sensitivity

        found = sensitivity(self, self._draws(), names, prior_sites=prior_sites)
        self._hand_on("sensitivity()")
        return found

    # copies ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: draws, verdict, flow and the groups that take no model; neither model nor data."""
        state = {name: _compact(value) for name, value in vars(self).items()}
        state.update(guide=None, density=None, drawer=None)
        state["missing"] = {**self.missing, "guide": UNPICKLED, "density": UNPICKLED}
        if self.stored is None:
            density = self._need_density()
            state["stored"] = arviz_groups.modelless_groups(self, density), arviz_groups.attributes(self)
            state["missing"]["groups"] = f"it was {UNPICKLED}; call to_arviz() or save() where the model is"
        if isinstance(self.flow, Flow) and self.flow.recipe is None:  # the user's own, of a class that may be local
            try:
                pickle.dumps(self.flow)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                state["flow"], state["missing"]["flow"] = None, f"it could not be pickled ({error})"
        return state

    def __copy__(self) -> Posterior:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Posterior:
        """Copy everything but the model, its data and guides of other packages, which copies may share."""
        kept = {"density", "drawer", *(() if isinstance(self.guide, AutoFlow) else ("guide",))}
        found = {name: value if name in kept else copy.deepcopy(value, memo) for name, value in vars(self).items()}
        return type(self)(**found)

    # files ----------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory with ``posterior.nc`` (netCDF, for ArviZ), ``guide.pt`` (tensors), ``posterior.json``.

        A posterior that was saved there before is replaced in one step: a save that is killed leaves the old one or the
        new one, whole. Other files in the directory stay. The JSON holds digests of all three files.

        Raises:
            ValueError: if ``path`` is a file, a directory with content that is not a saved posterior, or one that
                cannot be replaced as a whole (the working directory, a mount point).
            OSError: if the disk is full or cannot be written to; what was saved there before is as it was.
        """
        target = files.check_target(path)
        groups, attrs = self._groups(True)
        files.write(self, groups, attrs, target)
        self._hand_on("save()")

    @classmethod
    def _restored(cls, fields: dict[str, Any], extra: Mapping[str, Any]) -> Posterior:
        return cls(**fields)


KINDS: dict[str, type[Posterior]] = {"Posterior": Posterior}  # which class a file holds; subclasses add themselves


def _compact(value: Any) -> Any:
    """Copy tensors: a pickled view takes along all that it is cut from."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return {name: _compact(item) for name, item in value.items()} if isinstance(value, dict) else value


def load(
    path: str | os.PathLike[str],
    model: Callable[..., Any] | None = None,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Posterior:
    """Read a posterior that :meth:`Posterior.save` wrote. Tensors and JSON only: nothing in the files is run.

    Without a model, draws, summary, ArviZ object, verdict and flow are there. With the model and the arguments of the
    fit, guide and log density are too, and so are predictive draws.

    Args:
        path: the directory.
        model: the model that was fitted.
        args: its positional arguments.
        model_kwargs: its keyword arguments.

    Raises:
        ValueError: if the directory is not a saved posterior, is damaged, was written in another format version, or if
            model and arguments give another log density than the saved one.
    """
    fields = files.read(path, model, args, dict(model_kwargs or {}))
    kind, extra = fields.pop("kind"), fields.pop("extra")
    found = KINDS[kind]._restored(fields, extra)
    found._hand_on("load()")
    return found


def from_draws(
    density: LogDensity,
    draw: Draw,
    *,
    draws: int,
    seed: int,
    guide: Any,
    losses: Tensor,
    history: Sequence[Stage] = (),
    settings: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    failures: Sequence[str] = (),
    notes: Sequence[str] = (),
    contained: bool = False,
    doubts: Sequence[str] = (),
) -> Posterior:
    """Draw, score, weigh and judge. ``draw(n)`` gives unconstrained draws and their log density under the guide.

    Where the clock of ``density`` ends the scoring, the draws scored so far are all that there are.
    """
    _checks.integer("draws", draws, 100)
    check_memory(density, draws)
    names = coordinate_names(density.structure)
    with torch.no_grad():
        pool = score_pool(density, draw, POOL * draws)
        if len(pool.log_p) < POOL * draws:
            failures = [*failures, f"time for {len(pool.log_p)} of {POOL * draws} draws to judge by"]
            draws = len(pool.log_p) // POOL
        found = decide(
            lambda n: (pool.z[:n], pool.log_q[:n]),
            lambda z: pool.log_p[: len(z)],
            names,
            draws=draws,
            seed=seed,
            warnings=[*warnings, *density.clock.reasons()],
            failures=failures,
            notes=notes,
            contained=contained,
            doubts=doubts,
            again=lambda: _weighed_again(density, draw, POOL * draws),
            complaint=lambda z: density.complaint(z[: pool.checked]),
        )
        samples = density.constrain(found.used)
    flow = guide._flow if isinstance(guide, AutoFlow) else None
    guide_name = type(guide).__name__ if isinstance(guide, torch.nn.Module) else getattr(guide, "__name__", "guide")
    return Posterior(
        samples=samples,
        z=found.z,
        log_p=found.log_p,
        log_q=found.log_q,
        log_weights=found.log_weights,
        used=found.used,
        used_log_p=found.used_log_p,
        used_log_q=found.used_log_q,
        k_hat=found.weighing.k_hat,
        ess=found.verdict.ess_ratio * draws,
        elbo=found.weighing.elbo,
        log_evidence=found.weighing.log_evidence,
        verdict=found.verdict,
        losses=losses,
        history=tuple(stage.as_dict() for stage in history),
        settings={"draws": draws, "seed": seed, "noncentred": density.structure.noncentred, **dict(settings or {})},
        coordinates=tuple(names),
        guide=guide,
        guide_name=guide_name,
        flow=flow,
        density=density,
        missing={} if flow is not None else {"flow": f"the guide ({guide_name}) is not a flow guide of pyro_flows"},
        drawer=None if flow is not None else draw,
    )


def _weighed_again(density: LogDensity, draw: Draw, count: int) -> Weighing:
    """Weigh a second pool of draws."""
    pool = score_pool(density, draw, count)
    return weigh(pool.z, pool.log_p, pool.log_q)
