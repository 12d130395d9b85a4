"""The frozen result of a fit: what it says of its model, its copies and its files; ``Drawn`` has its draws."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_flows.flows.flow import Flow
from pyro_flows.guides.autoflow import AutoFlow
from pyro_flows.inference.record import attributes
from pyro_flows.posterior.drawn import Drawn
from pyro_flows.posterior.export import arviz_groups, files
from pyro_flows.support import arviz, checks
from pyro_flows.support.numbers.arrays import Chosen
from pyro_flows.support.process.progress import Bar

if TYPE_CHECKING:
    from pyro_flows.posterior.comparison.compare import Comparison
    from pyro_flows.posterior.comparison.evidence import Evidence
    from pyro_flows.posterior.comparison.loo import Loo
    from pyro_flows.posterior.comparison.sensitivity import Sensitivity

UNPICKLED = "unpickled without a model"


@checks.methods
@dataclass(frozen=True, eq=False, repr=False)
class Posterior(Drawn):
    r"""What a fit (or :func:`diagnose`) found. Nothing in it changes; methods give new values.

    If the verdict is unreliable, all methods that hand draws on (``summary``, ``to_arviz``, ``predictive``,
    ``resample``, ``save``), and :func:`load`, warn with an :class:`UnreliableWarning`, once for each line that calls
    them. Attributes, figures and reports do not; figures and reports show the status.

    Attributes:
        samples: the draws to use, constrained, deterministic sites too: ``{name: (draws, *shape)}``. Raw draws of the
            guide if the verdict is ok or unreliable, importance-resampled ones if it is corrected, draws of chains,
            one chain after the other, if it is refined.
        z: raw draws in unconstrained coordinates (S, D).
        log_p: unnormalized log posterior density of ``z`` (S,).
        log_q: log guide density of ``z`` (S,).
        log_weights: Pareto-smoothed, normalized log importance weights of ``z`` (S,).
        k_hat: Pareto shape of the weights.
        ess: effective sample size of the weights (S is the best).
        elbo: evidence lower bound, nats, mean of ``log_p - log_q``.
        log_evidence: importance-sampling estimate of the log normalizer, nats. If the verdict is refined and the
            guide's weights are not good enough for it: an estimate by bridge sampling from the chains. :meth:`evidence`
            gives a standard error.
        method: what made the draws to use, such as ``"trained flow"``; see :attr:`Verdict.guide_method`.
        verdict: whether to believe the draws.
        losses: negative ELBO of each optimization step (empty for :func:`diagnose`); with several runs, of the best.
        history: what happened during the fit, one dict a stage. Each has ``stage``, its name, and ``elbo``, what it
            reached in nats, None where a stage has none; the other entries go by the stage.
        settings: everything that :func:`fit` was told (``asked``, ``flow``) or chose (``sampler``), JSON values only.
        coordinates: names of the unconstrained coordinates.
        guide: the guide that drew ``z``; None after :func:`load` without a model. It knows of no weights: what it draws
            is like ``z``, and like ``samples`` unless these are importance-resampled.
        guide_name: its class.
        flow: the guide's :class:`Flow` over the unconstrained coordinates, a ``FlowMixture`` after runs that disagree;
            None if it has none. ``flow.log_prob(z)`` is ``log_q``.
        density: the model as a log density; None after :func:`load` without a model.
        missing: for each of ``guide``, ``flow`` and ``density`` that is None, why; and why ``groups`` of the ArviZ
            object are missing, if any are.
        chains: :class:`McmcDraws`, what a sampler came to, if :meth:`refine` was called, by ``fit`` or since: draws of
            each chain, and all that it takes to go on. Or the chains that :func:`from_mcmc` was given.

    Methods that run the model again do so on the data of the fit. Arguments of at most 16 MB in all are copied for
    that. Larger ones are not: if they have changed since, these methods raise a ``ValueError`` that names the argument.
    They do so, too, if the log density at a draw is not what it was: the model reads something else that has changed.
    Not noticed are changes from outside of the arguments, or inside of modules and other objects among them, that leave
    this density as it is. ``summary`` needs no data.

    It can be pickled (joblib, Dask): draws, verdict and flow go along, model, data and guide stay behind.

    The weights are :math:`w_i \propto \tilde p(z_i) / q(z_i)`, smoothed as in Vehtari et al. 2024 (arXiv 1507.02646).
    Cost: draws and figures are computed once, by the call that makes it.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> posterior.verdict.status, posterior.samples["mu"].shape
    ('ok', torch.Size([400]))
    """

    # what it says of its model, as text or page -----------------------------------------------------------------------

    def evidence(
        self, method: str = "auto", *, draws: int | None = None, error: float | None = None, seed: int = 0
    ) -> Evidence:
        r"""Estimate the log evidence :math:`\log Z = \log \int \tilde p(z)\,dz`, nats, with an honest standard error.

        ``importance``: the mean of :math:`\tilde p / q` over fresh draws of the flow. ``bridge``: Meng and Wong's
        bridge between q and the draws to use, where these are of the posterior, that is, Markov chains; q is the flow,
        or, without one, a Student t fitted to the first half of each chain. ``auto``: all that can be used; that with
        the smallest standard error is chosen, and all are listed. Importance sampling more than 3 joint errors from the
        bridge has no error: its weights say nothing of what q does not draw, and the chains were there.

        Args:
            method: ``"auto"``, ``"importance"`` or ``"bridge"``.
            draws: of the flow or guide, 16 000 by default, each scored once. Without a model, the raw ones are taken.
            error: standard error that is asked of importance sampling, nats, in the place of ``draws``. Draws are added
                to those of the posterior until it is reached, 16 000 at most. Where latents in plates were integrated
                out, each is a pass over all rows: then 0.05 is the default, and there are 1000 draws at most.
            seed: of these draws.

        Returns:
            An :class:`Evidence`, which unpacks as ``value, standard_error, method``. The error is infinite where the
            verdict is unreliable, or k-hat too high for one.

        Raises:
            ValueError: for an unknown method, or one that these draws do not allow; for both ``draws`` and ``error``.

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
        from pyro_flows.posterior.comparison.evidence import evidence

        found = evidence(self, method=method, draws=draws, error=error, seed=seed)
        self._hand_on("evidence()")
        return found

    def loo(
        self,
        sites: str | Sequence[str] | None = None,
        *,
        draws: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Loo:
        r"""Estimate the expected log predictive density by Pareto-smoothed leave-one-out cross-validation.

        .. math:: \text{elpd} = \sum_i \log p(y_i \mid y_{-i})

        Draws of q are weighted by :math:`\tilde p(z) / (q(z)\, p(y_i \mid z))` (approximate-posterior LOO), resampled
        draws and chains by :math:`1 / p(y_i \mid z)`. Each entry of an observed site is one observation; those of event
        dimensions go together. The target is a Monte Carlo error of a fiftieth of the standard error over observations,
        or of .02 nats if that is more. The total error is then .02 % larger than by observations alone. Where k-hat is
        not below its limit, and where it is the cheaper way to that target, draws are moved to where the posterior
        without the observation lies, and weighted there. The Monte Carlo error does not hold the bias of Pareto
        smoothing: of 40 normal data it is -.010 nats with 1000 draws, where an error of .003 is stated. One seed of a
        model of five groups is .2 nats too high, at an error of .04 and k-hat below .7.

        An observation in ``poutine.scale`` counts with its scale s, as in ``log_p``: :math:`p(y_i \mid z)^s` takes the
        place of :math:`p(y_i \mid z)`. So a row that stands for s rows leaves all of them out. For a tempered
        likelihood, this is no score of predictions. A ``pyro.factor`` is never left out.

        After a fit of minibatches, an observation is a row of the plate whose latents are integrated out, with all its
        data: :math:`p(y_i \mid z)` is its likelihood given the other latents. The draws in hand are used.

        Args:
            sites: observed sites, or plates after a fit of minibatches, to leave observations out of; all by default.
            draws: new draws of the flow or guide, resampled if the verdict is corrected. By default those in hand, or
                as many new ones as bring the Monte Carlo error down, 64 000 at most, and fewer where they are moved:
                two million for all observations together. Our own chains are gone on with, for two million gradients
                at most; those of another sampler have no more draws.
            seed: of new draws.
            progress: show what is being done, as :func:`fit` does, if it takes more than two seconds.

        Returns:
            A :class:`Loo` with elpd, its errors, k-hat and elpd of each observation, and leverage.

        Raises:
            ValueError: if the verdict is unreliable, for models with enumerated latents or without data, and for a
                name that is no observed site.

        Cost: the likelihood of all draws, and a sort of them for each observation; where draws are moved, the same for
        each observation: .03 to .2 seconds of one thread.

        References: Vehtari, Gelman and Gabry 2017; Magnusson et al. 2019; Paananen et al. 2021 (arXiv 1906.08850).

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
        from pyro_flows.posterior.comparison.loo import loo

        return loo(self, sites=sites, draws=draws, seed=seed, progress=progress)

    def log_likelihood(self) -> dict[str, Tensor]:
        """Return the pointwise log likelihood of the draws to use, nats: ``{site: (draws, *batch)}``.

        Entries that a mask leaves out are 0, and those in ``poutine.scale`` are multiplied by their scale, as in
        ``log_p``. Models with enumerated latents have none: the dict is empty.

        Raises:
            ValueError: if a loaded posterior has no model.
        """
        found = self._need_density().log_likelihood(self._used)
        self._hand_on("log_likelihood()")
        return found

    def sensitivity(
        self,
        var_names: str | Sequence[str] | None = None,
        *,
        filter_vars: str | None = None,
        coords: Mapping[str, object] | None = None,
        prior_sites: str | Sequence[str] | None = None,
    ) -> Sensitivity:
        r"""Tell how much the posterior hangs on the prior and on the likelihood, by power scaling, without a refit.

        .. math:: p_\alpha(z) \propto p(z \mid y)\, p(\theta)^{\alpha - 1}, \qquad
                  p_\alpha(z) \propto p(z \mid y)\, p(y \mid z)^{\alpha - 1}, \qquad \alpha = .99, 1.01

        The figure is how fast the cumulative distribution of a scalar changes with :math:`\log_2 \alpha` (cumulative
        Jensen-Shannon distance). Only priors at the top are scaled. A group effect's prior is a part of the model:
        scaled too, it hides the sensitivity to the others.

        Args:
            var_names: variables to show, as in ArviZ; all by default.
            filter_vars: ``"like"`` or ``"regex"``, as in ArviZ.
            coords: labels of the entries to show, ``{"school": ["Choate"]}``.
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
        from pyro_flows.posterior.comparison.sensitivity import sensitivity

        draws = arviz.select(arviz_groups.posterior_group(self), var_names, filter_vars, coords)
        found = sensitivity(self, draws, prior_sites=prior_sites)
        self._hand_on("sensitivity()")
        return found

    def methods_text(self) -> str:
        """Return a paragraph for the methods section of a paper: software, method, figures, seed; nothing of the model.

        It names the works that the method rests on; :meth:`references` has them as BibTeX.

        Cost: none, beside a few evaluations of the flow.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> posterior = pf.fit(model, torch.tensor(1.0), progress=False)
        >>> posterior.method, "an affine map of a Student-t base with 60 degrees of freedom" in posterior.methods_text()
        ('Gaussian', True)
        """
        from pyro_flows.posterior.export.methods_text import methods_text

        return methods_text(self)

    def references(self) -> str:
        """Return the works that :meth:`methods_text` cites, and this package, as BibTeX.

        >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))
        >>> found = pf.diagnose(model, guide, torch.tensor(1.0), draws=500).references()
        >>> "@article{Vehtari2024," in found, "1507.02646" in found, "Rue2009" in found
        (True, True, False)
        """
        from pyro_flows.posterior.export.methods_text import references

        return references(self)

    def report(
        self,
        path: str | os.PathLike[str] = "report.html",
        *,
        title: str | None = None,
        var_names: str | Sequence[str] | None = None,
        filter_vars: str | None = None,
        coords: Mapping[str, object] | None = None,
        comparison: Comparison | None = None,
        predictive: bool = True,
        source: bool = True,
        progress: bool = True,
    ) -> Path:
        """Write one HTML file to read and to send: what was found, whether to believe it, and how to make it again.

        On it: the verdict in plain words and what to do next; a table that sorts; figures; replicates against the data;
        the graph of the model, where graphviz and its Python package are installed; a comparison; settings and
        versions. The file takes no network and no other file, is light or dark as the reader's system is, and is read
        with a keyboard and on a phone. It is below 3 MB. An unreliable verdict is its first line, so no warning comes.

        Args:
            path: the file. An earlier report there is replaced in one step; any other file is refused.
            title: its heading; by default the sites.
            var_names: variables in table and figures, as in ArviZ; all by default.
            filter_vars: ``"like"`` or ``"regex"``: how names are matched, as in ArviZ.
            coords: labels to show, ``{"school": ["Choate"]}``, as in ArviZ.
            comparison: of :func:`~pyro_flows.compare`, to show.
            predictive: whether to draw replicates of the data.
            source: whether the source of the model stands on the page.
            progress: show what is being done, as :func:`~pyro_flows.fit` does, if it takes more than two seconds.

        Returns:
            The path of the file.

        Raises:
            ValueError: for a directory or a file that is no report, an unknown name or label, or a ``comparison`` that
                is none.
            OSError: if the file cannot be written.

        Cost: a few seconds for the figures, and 2500 runs of the model for prior draws and replicates.

        >>> import tempfile, torch, pyro, pyro.distributions as dist, pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))
        >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=500)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = posterior.report(f"{folder}/report.html").read_text()
        >>> "The draws can be used." in text, len(text) < 3_000_000
        (True, True)
        """
        from pyro_flows.posterior.report.page import Options, write

        chosen: Chosen = {"var_names": var_names, "filter_vars": filter_vars, "coords": coords}
        with Bar("report", progress, quick=True) as bar:
            bar.watch("the table")
            self._check_unchanged()
            options = Options(title, comparison, predictive, source, chosen, bar.watch)
            target = write(self, path, self._table(chosen), options)
            bar.close(str(target))
        return target

    # copies -----------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        """Return what is pickled: draws, verdict, flow and the groups that take no model; neither model nor data."""
        # copies of tensors: a pickled view takes along all that it is cut from
        state = tree_map_only(Tensor, lambda value: value.detach().clone(), dict(vars(self)))
        state.update(guide=None, density=None, _drawer=None)
        missing = {**self.missing, "guide": UNPICKLED, "density": UNPICKLED}
        state["missing"] = missing
        if self._stored is None:
            density = self._need_model()
            self._check_unchanged(runs=False)
            groups = self._labeling.applied(arviz_groups.all_groups(self, density, predictive=False, runs=False))
            state["_stored"] = groups, attributes(self)
            missing["groups"] = f"it was {UNPICKLED}; call to_arviz() or save() where the model is"
        if isinstance(self.flow, Flow) and self.flow.recipe is None:  # the user's own, of a class that may be local
            try:
                pickle.dumps(self.flow)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                state["flow"], missing["flow"] = None, f"it could not be pickled ({error})"
        return state

    def __copy__(self) -> Posterior:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, object]) -> Posterior:
        """Copy everything but the model, its data and guides of other packages, which copies may share."""
        kept = {"density", "_drawer", *(() if isinstance(self.guide, AutoFlow) else ("guide",))}
        if isinstance(self.guide, AutoFlow):
            memo.update({id(part): part for part in (self.guide._model, self.guide.create_plates)})
        found = {name: value if name in kept else copy.deepcopy(value, memo) for name, value in vars(self).items()}
        make: Callable[..., Posterior] = type(self)
        return make(**found)

    # files ------------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a directory with ``posterior.nc`` (netCDF, for ArviZ), ``guide.pt`` (tensors), ``posterior.json``.

        A posterior that was saved there before is replaced in one step: a save that is killed leaves the old one or the
        new one, whole. Other files in the directory stay. The JSON holds digests of all three files.

        Raises:
            ValueError: if ``path`` is a file, a directory with content that is not a saved posterior, or one that
                cannot be replaced as a whole (the working directory, a mount point).
            OSError: if the disk is full or cannot be written to; what was saved there before is as it was.
        """
        target = files.FILES.check_target(path)
        groups, attrs = self._groups(True)
        files.write(self, groups, attrs, target)
        self._hand_on("save()")


@checks.options
def load(
    path: str | os.PathLike[str],
    model: Callable[..., object] | None = None,
    *args: object,
    model_kwargs: Mapping[str, object] | None = None,
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

    Cost: reading the files; with a model, one pass of all draws through it.

    >>> import torch, pyro, pyro.distributions as dist, pyro_flows as pf
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> guide = lambda y: pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
    >>> posterior = pf.diagnose(model, guide, torch.tensor(1.0), draws=400)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     posterior.save(f"{folder}/saved")
    ...     again = pf.load(f"{folder}/saved")
    >>> torch.equal(again.samples["mu"], posterior.samples["mu"])
    True
    """
    found = Posterior(**files.read(path, model, args, dict(model_kwargs or {})))
    found._hand_on("load()")
    return found
